"""The rows that one run trains on and is evaluated on, from any source by the same path."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
import pyarrow.compute as pc

from hf_sage.benchmark.domainbed import environments
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.results import DataFacts
from hf_sage.data import OnBadImage, domain_names, load_domains, undecoded

TEST_CONVENTIONS = {
    "in_split": "the 80 % in-split of the held-out domain, DomainBed's convention",
    "full": "all rows of the held-out domain",
}
"""Which rows of a held-out domain are tested on, by name."""


@dataclass(frozen=True)
class Cell:
    """Consecutive rows of the evaluated set: one split of one domain."""

    domain: str
    split: str
    rows: int


class Splits(NamedTuple):
    """The two splits of one domain."""

    inside: datasets.Dataset
    outside: datasets.Dataset


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        train: The in-splits of the source domains, in the order of the domains.
        evaluated: Both splits of every domain, one after the other.
        cells: How they follow each other.
        facts: For the record.
        small: Whether the images may be processed once and kept in memory: those of the embedded sets.
    """

    train: datasets.Dataset
    evaluated: datasets.Dataset
    cells: tuple[Cell, ...]
    facts: DataFacts
    small: bool


def load_inputs(job: Job, data_root: str | Path | None = None) -> Inputs:
    """Loads the data of a run and splits every domain in two.

    Sets that come with splits (the embedded ones, no scan of which may be trained on in one style and tested in
    another) train on their training rows, are validated on their validation rows and tested on their test rows. All
    others are split as DomainBed does it.

    Args:
        job: The run.
        data_root: Folder of the local copies of DomainBed's datasets.

    Raises:
        ValueError: If the data cannot be had, a held-out domain does not exist, or a domain is too small to be split.
    """
    data = load_data(job.dataset, job.seed, job.on_bad_image, data_root)
    splits = _splits(data, job)
    if small := [domain for domain, own in splits.items() if not len(own.inside) or not len(own.outside)]:
        raise ValueError(
            f"{job.dataset}: too few images of {', '.join(map(repr, small))} to be split in 80 % and 20 %. Add images, "
            "at least 5 a domain, or leave the domain out."
        )
    sources = [domain for domain in splits if domain not in job.held_out]
    cells = [(domain, split) for domain in splits for split in Splits._fields]
    parts = [getattr(splits[domain], split) for domain, split in cells]
    return Inputs(
        train=datasets.concatenate_datasets([splits[domain].inside for domain in sources]),
        evaluated=datasets.concatenate_datasets(parts),
        cells=tuple(
            Cell(domain, split.removesuffix("side"), len(part))
            for (domain, split), part in zip(cells, parts, strict=True)
        ),
        facts=_facts(data),
        small=isinstance(data, datasets.DatasetDict),
    )


def load_data(name: str, seed: int, on_bad_image: str = "error", data_root: str | Path | None = None) -> Any:
    """All rows of a dataset, their images undecoded; for the embedded sets its three splits."""
    (bad,) = [known for known in get_args(OnBadImage) if known == on_bad_image]
    return undecoded(load_domains(name, seed=seed, on_bad_image=bad))


def check_held_out(dataset: str, domains: list[str], held_out: tuple[str, ...]) -> None:
    """Raises a ValueError if a domain does not exist, or fewer than two are left to train on."""
    if unknown := [name for name in held_out if name not in domains]:
        raise ValueError(
            f"{dataset} has no domain {', '.join(map(repr, unknown))} to hold out: use {', '.join(map(repr, domains))}."
        )
    if len(domains) - len(held_out) < 2:
        raise ValueError(
            f"{dataset}: holding out {' and '.join(map(repr, held_out))} of the domains "
            f"{', '.join(map(repr, domains))} leaves {len(domains) - len(held_out)}, and training across domains needs "
            "two or more. Hold out fewer, or add data of another domain."
        )


def _splits(data: Any, job: Job) -> dict[str, Splits]:
    """The two splits of every domain, in the order of the domains; of those held out by the test convention."""
    if isinstance(data, datasets.DatasetDict):
        rows = {split: _by_domain(own) for split, own in data.items()}
        check_held_out(job.dataset, list(rows["train"]), job.held_out)
        return {
            domain: Splits(rows["test" if domain in job.held_out else "train"][domain], outside)
            for domain, outside in rows["validation"].items()
        }
    splits = {d: Splits(own.inside, own.outside) for d, own in environments(data, job.seed).items()}
    check_held_out(job.dataset, list(splits), job.held_out)
    if job.test_convention == "full":
        splits |= {d: Splits(datasets.concatenate_datasets(splits[d]), splits[d].outside) for d in job.held_out}
    return splits


def _by_domain(data: datasets.Dataset) -> dict[str, datasets.Dataset]:
    codes = data.with_format("numpy")["domain"][:]
    names = data.features["domain"].names
    return {name: data.select((codes == names.index(name)).nonzero()[0]) for name in domain_names(data)}


def _facts(data: Any) -> DataFacts:
    """Counts rows and digests what tells one version of the data from another without decoding an image."""
    parts = list(data.values()) if isinstance(data, datasets.DatasetDict) else [data]
    feature = parts[0].features["domain"]
    classes = parts[0].features["label"].names
    digest = hashlib.sha256(json.dumps(classes).encode())
    rows: dict[str, int] = {}
    for part in parts:
        columns = part.with_format("arrow")[:]
        domains = columns["domain"].to_pylist()
        images = columns["image"].combine_chunks()
        sizes = pc.binary_length(images.field("bytes")).to_pylist()
        for domain, label, path, size in zip(
            domains, columns["label"].to_pylist(), images.field("path").to_pylist(), sizes, strict=True
        ):
            name = feature.int2str(domain) if isinstance(feature, datasets.ClassLabel) else str(domain)
            rows[name] = rows.get(name, 0) + 1
            file = "/".join(Path(path).parts[-3:]) if path else ""
            digest.update(f"{name}\0{label}\0{file}\0{os.stat(path).st_size if size is None else size}\n".encode())
    return DataFacts(digest.hexdigest()[:16], {name: rows[name] for name in domain_names(parts[0])}, classes)
