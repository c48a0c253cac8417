"""DomainBed's splits to the index, and the three conventions for what a held-out domain is tested on.

Gulrajani and Lopez-Paz 2021 (https://arxiv.org/abs/2007.01434): of every environment 20 % of the images, drawn by a
seed of the trial and the environment alone, are kept from training (the *out*-split) and 80 % are left (the
*in*-split). The order of the images within a domain decides which they are: DomainBed's is by path, which is that of
`hf_sage.data.load_domains` on folders; a copy on the Hub has an order of its own, and other images in its splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import datasets
import numpy as np

from hf_sage.data import domain_names, row_domains

TestConvention = Literal["in_split", "full", "official"]
TEST_CONVENTIONS: tuple[TestConvention, ...] = get_args(TestConvention)
"""What a held-out domain is tested on: its in-split of 80 % (DomainBed; the default), all of it, or the images that its
publisher's list names (DISAM and others). Numbers under different conventions do not compare to the decimal."""


def seed_hash(*args: object) -> int:
    """DomainBed's seed for a tuple of values: the MD5 digest of how Python prints it, modulo 2³¹."""
    return int(hashlib.md5(str(args).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def domainbed_split(
    n: int, trial_seed: int, env_index: int, holdout_fraction: float = 0.2
) -> tuple[list[int], list[int]]:
    """DomainBed's split of one environment.

    Args:
        n: Its number of images, in the order of their paths.
        trial_seed: DomainBed's trial, 0 to 2 in its tables.
        env_index: The environment's position among the sorted domains, held-out one included.
        holdout_fraction: Share of the out-split.

    Returns:
        The positions in the in-split and in the out-split, ⌊n · holdout_fraction⌋ of them, in DomainBed's order.

    Raises:
        ValueError: If the fraction is not in (0, 1).
    """
    if not 0 < holdout_fraction < 1:
        raise ValueError(f"holdout_fraction must lie between 0 and 1; got {holdout_fraction}.")
    keys = list(range(n))
    # int(): NumPy's integers print as np.int64(0), which is another seed.
    np.random.RandomState(seed_hash(int(trial_seed), int(env_index))).shuffle(keys)
    count = int(n * holdout_fraction)
    return keys[count:], keys[:count]


@dataclass(frozen=True)
class Environment:
    """One domain, split.

    Attributes:
        name: The domain.
        index: Its position among the sorted domains.
        inside: The in-split: trained on in source domains.
        outside: The out-split: validated on in source domains.
        whole: All its rows, in the order of the data.
        official: The rows that its publisher's test list names, if lists were given.
    """

    name: str
    index: int
    inside: datasets.Dataset
    outside: datasets.Dataset
    whole: datasets.Dataset
    official: datasets.Dataset | None = None

    def test(self, convention: TestConvention = "in_split") -> datasets.Dataset:
        """What the domain is tested on when it is held out; see `TEST_CONVENTIONS`.

        Raises:
            ValueError: If the convention is unknown, or official and no list was given.
        """
        if convention not in TEST_CONVENTIONS:
            raise ValueError(
                f"Unknown test convention {convention!r}: use one of {', '.join(map(repr, TEST_CONVENTIONS))}."
            )
        if convention == "in_split":
            return self.inside
        if convention == "full":
            return self.whole
        if self.official is None:
            raise ValueError(
                f"The official test images of {self.name!r} are not known. Give the folder of the lists by "
                "official_lists, or choose the test convention 'in_split' or 'full'."
            )
        return self.official


def environments(
    data: datasets.Dataset,
    trial_seed: int,
    holdout_fraction: float = 0.2,
    domain_column: str = "domain",
    official_lists: str | Path | None = None,
    image_column: str = "image",
) -> dict[str, Environment]:
    """Splits every domain as DomainBed does.

    Args:
        data: All domains, each in the order of its paths, images undecoded.
        trial_seed: DomainBed's trial.
        holdout_fraction: Share of the out-splits.
        domain_column: Column of the domain.
        official_lists: A folder of text files whose lines begin with the path of an image, ``domain/class/file``, and
            whose names hold "test"; needed for the test convention ``"official"`` alone.
        image_column: Column of the images; the lists are compared with their paths.

    Returns:
        Domain -> its environment, in the order of their indices.

    Raises:
        ValueError: If a domain has too few images for two parts, or a list names an image that is not there.
    """
    if isinstance(data, datasets.IterableDataset):
        raise ValueError("A stream cannot be split to the index: load the data without streaming.")
    rows: dict[str, list[int]] = {name: [] for name in domain_names(data, domain_column)}
    for i, name in enumerate(row_domains(data, domain_column)):
        rows[name].append(i)
    listed = _official_rows(data[image_column], Path(official_lists), rows) if official_lists is not None else None
    found = {}
    for index, (name, own) in enumerate(rows.items()):
        inside, outside = domainbed_split(len(own), trial_seed, index, holdout_fraction)
        if not outside:
            raise ValueError(
                f"The domain {name!r} has {len(own)} image(s), of which {holdout_fraction:.0%} is none: it cannot be "
                "validated on. Add images, leave the domain out, or raise the holdout fraction."
            )
        found[name] = Environment(
            name,
            index,
            data.select([own[i] for i in inside]),
            data.select([own[i] for i in outside]),
            data.select(own),
            None if listed is None else data.select(listed[name]),
        )
    return found


def _official_rows(
    images: Iterable[Mapping[str, str]], folder: Path, rows: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """The rows of each domain that the lists of test images name."""
    lists = sorted(path for path in folder.glob("*.txt") if "test" in path.stem)
    if not lists:
        raise ValueError(f"No text file with 'test' in its name in {folder}: the official lists belong there.")
    # A class folder may hold spaces; what follows the path is a number.
    named = {
        line.rpartition(" ")[0].strip() if line.rpartition(" ")[2].isdigit() else line
        for path in lists
        for line in map(str.strip, path.read_text(encoding="utf-8").splitlines())
        if line
    }
    paths = {"/".join(Path(image["path"] or "").parts[-3:]): i for i, image in enumerate(images)}
    if missing := sorted(named - set(paths)):
        raise ValueError(
            f"{len(missing)} image(s) of the lists in {folder} are not in the data, e.g. {missing[0]}. Lists go with "
            "the folders they were made for; copies on the Hub hold no paths."
        )
    chosen = {paths[name] for name in named}
    return {domain: [i for i in own if i in chosen] for domain, own in rows.items()}
