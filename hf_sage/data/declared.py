"""What a dataset is declared to hold, and what differs from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)

OnMismatch = Literal["error", "warn"]


@dataclass(frozen=True)
class HubCopy:
    """A copy on the Hub.

    Attributes:
        repo_id: Its repository.
        revision: The commit whose layout is known here; ``None`` where none is.
        splits: The splits that make up the whole.
        domain_column: The column of the domain.
    """

    repo_id: str
    revision: str | None
    splits: tuple[str, ...] = ("train",)
    domain_column: str = "domain"


@dataclass(frozen=True)
class DomainBedDataset:
    """What a dataset should hold.

    Attributes:
        name: DomainBed's name.
        folder: Its folder under DomainBed's data directory.
        domains: The folders of the domains, in the order of DomainBed's environments.
        class_count: The number of classes.
        total: Images in all.
        license: As its publisher or the card of the Hub copy states it.
        citation: The paper to cite.
        counts: Images by domain, where they are known.
        classes: The names of the classes, sorted, where they are known.
        hub: A copy on the Hub to rely on, if there is one.
        hint: Where downloads are known to differ.
    """

    name: str
    folder: str
    domains: tuple[str, ...]
    class_count: int
    total: int
    license: str
    citation: str
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    hub: HubCopy | None = None
    hint: str = ""

    def differences(
        self, domains: Iterable[str], classes: Iterable[str], counts: Mapping[str, int] | None = None
    ) -> list[str]:
        """What was found and is not as declared, a sentence each.

        Args:
            domains: The names of the domains found.
            classes: The names of the classes found.
            counts: Images by domain; ``None`` where nobody counted (streams).
        """
        domains, classes = list(domains), list(classes)
        found = _set_differences("domain", domains, self.domains)
        if self.classes:
            found += _set_differences("class", classes, self.classes)
        elif len(classes) != self.class_count:
            found.append(f"{len(classes)} classes instead of {self.class_count}")
        if counts is None:
            return found
        for domain, expected in self.counts.items():
            if domain in counts and counts[domain] != expected:
                found.append(f"{counts[domain]:,} images in {domain!r} instead of {expected:,}")
        if not self.counts and sum(counts.values()) != self.total:
            found.append(f"{sum(counts.values()):,} images instead of {self.total:,}")
        return found

    def require(self, differences: list[str], where: str, on_mismatch: OnMismatch) -> None:
        """Raises or warns if anything differs.

        Args:
            differences: As `differences` gives them.
            where: The folder or repository they were found in.
            on_mismatch: ``"error"`` raises; ``"warn"`` goes on.

        Raises:
            ValueError: If something differs and nobody said to go on.
        """
        if not differences:
            return
        message = f"{where} is not {self.name} as DomainBed has it: {'; '.join(differences)}."
        if self.hint:
            message += f" {self.hint}"
        if on_mismatch == "error":
            raise ValueError(f"{message} Mend the data, or go on with what is there by on_mismatch='warn'.")
        logger.warning("%s Going on with what is there.", message)


def _set_differences(kind: str, found: list[str], declared: tuple[str, ...]) -> list[str]:
    missing = [name for name in declared if name not in found]
    extra = [name for name in found if name not in declared]
    return [f"{kind} {name!r} is missing" for name in missing] + [f"{kind} {name!r} is not declared" for name in extra]
