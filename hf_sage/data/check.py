"""What is wrong with a set of images before any training: counts by domain and class, and everything worth mending."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import datasets

from hf_sage.data.names import look_alikes
from hf_sage.data.scan import FolderScan
from hf_sage.data.unreadable import readable_rows

HOLDOUT_FRACTION = 0.2
"""The share of a domain that DomainBed's protocol validates on."""


@dataclass
class Check:
    """The findings on a set.

    Attributes:
        counts: Domain -> class -> images, with zeros.
        problems: What is wrong, a sentence each.
        notes: What is worth knowing and no mistake.
    """

    counts: dict[str, dict[str, int]]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """The classes of all domains."""
        return list(next(iter(self.counts.values()), {}))

    @property
    def total(self) -> int:
        """Images in all."""
        return sum(sum(own.values()) for own in self.counts.values())


def check_images(data: datasets.Dataset, domains: Sequence[str], labels: Sequence[str]) -> Check:
    """Counts a set by domain and class, decodes every image, and compares the domains' classes.

    Args:
        data: Its images undecoded in the column ``image``.
        domains: The domain of every row, by name.
        labels: The class of every row, by name.
    """
    pairs = Counter(zip(domains, labels, strict=True))
    names, classes = sorted(set(domains)), sorted(set(labels))
    check = Check({domain: {label: pairs[domain, label] for label in classes} for domain in names})
    check.problems += compare_classes(check.counts)
    for domain, own in check.counts.items():
        images = sum(own.values())
        if images == 1:
            check.problems.append(f"The domain {domain!r} has one image: it cannot be split for validation.")
        elif not int(images * HOLDOUT_FRACTION):
            check.notes.append(
                f"The domain {domain!r} has {images} images, of which {HOLDOUT_FRACTION:.0%} is none: too few for "
                "hf-sage benchmark."
            )
    _, bad = readable_rows(data)
    check.problems += [f"Cannot be read as an image: {file}" for file in bad]
    return check


def compare_classes(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """In which domain which class is missing, and which classes may be the same one written differently."""
    present = {domain: [label for label, n in own.items() if n] for domain, own in counts.items()}
    problems = [
        f"The classes {a!r} and {b!r} differ in case, spaces, underscores or hyphens alone, and no domain has both: "
        "one class, written in two ways?"
        for a, b in look_alikes(present)
    ]
    for domain, own in counts.items():
        if absent := [label for label, n in own.items() if not n]:
            problems.append(
                f"Labels differ between domains: {domain!r} has no image of {', '.join(map(repr, absent))}."
            )
    return problems


def add_folder_findings(check: Check, scan: FolderScan) -> None:
    """Adds what only the folders tell: empty classes, and what lies beside domains, classes and images."""
    check.problems += [f"The class folder {domain}/{label} holds no image." for domain, label in scan.empty]
    check.notes += [f"Left out: {phrase}." for phrase in scan.left_out]
