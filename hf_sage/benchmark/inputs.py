"""The rows that one run trains on and is evaluated on, from any source by the same path."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute as pc

from hf_sage.benchmark.domainbed import environments
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.results import DataFacts
from hf_sage.data import (
    DATASETS,
    EMBEDDED,
    domain_counts,
    domain_names,
    load_domains,
    load_embedded,
    row_domains,
    undecoded,
)


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


def load_inputs(job: Job, options: Options) -> Inputs:
    """Loads the data of a run and splits every domain in two.

    Sets that come with splits (the embedded ones, no scan of which may be trained on in one style and tested in
    another) train on their training rows, are validated on their validation rows and tested on their test rows. All
    others are split as DomainBed does it.

    Raises:
        ValueError: If the data cannot be had, a held-out domain does not exist, or a domain is too small to be split.
    """
    data = load_data(job.dataset, job.seed, options)
    splits = _splits(data, job, options)
    cells = [(domain, split) for domain in splits for split in Splits._fields]
    parts = [getattr(splits[domain], split) for domain, split in cells]
    return Inputs(
        train=datasets.concatenate_datasets([own.inside for d, own in splits.items() if d not in job.held_out]),
        evaluated=datasets.concatenate_datasets(parts),
        cells=tuple(
            Cell(domain, split.removesuffix("side"), len(part))
            for (domain, split), part in zip(cells, parts, strict=True)
        ),
        facts=_facts(data, job.dataset, options),
        small=isinstance(data, datasets.DatasetDict),
    )


def load_data(name: str, seed: int, options: Options) -> Any:
    """All rows of a dataset, their images undecoded; for the embedded sets its three splits."""
    return undecoded(
        load_domains(
            name,
            root=options.data_root,
            seed=seed,
            on_bad_image=options.on_bad_image,
            on_mismatch=options.on_mismatch,
        )
    )


def domains_of(name: str, options: Options) -> list[str]:
    """The domains of a dataset, from its declaration where there is one."""
    if name in DATASETS:
        return list(DATASETS[name].domains)
    return _embedded_domains(name) if name in EMBEDDED else domain_names(load_data(name, 0, options))


@cache
def _embedded_domains(name: str) -> list[str]:
    return domain_names(load_embedded(name)["train"])


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


def _splits(data: Any, job: Job, options: Options) -> dict[str, Splits]:
    """The two splits of every domain, in the order of the domains; of those held out by the test convention."""
    if isinstance(data, datasets.DatasetDict):
        rows = {split: _by_domain(own) for split, own in data.items()}
        check_held_out(job.dataset, list(rows["train"]), job.held_out)
        return {
            domain: Splits(rows["test" if domain in job.held_out else "train"][domain], outside)
            for domain, outside in rows["validation"].items()
        }
    found = environments(data, job.seed, official_lists=options.official_lists)
    check_held_out(job.dataset, list(found), job.held_out)
    return {
        domain: Splits(own.test(job.test_convention) if domain in job.held_out else own.inside, own.outside)
        for domain, own in found.items()
    }


def _by_domain(data: datasets.Dataset) -> dict[str, datasets.Dataset]:
    names = row_domains(data)
    return {domain: data.select([i for i, name in enumerate(names) if name == domain]) for domain in domain_names(data)}


def _facts(data: Any, name: str, options: Options) -> DataFacts:
    """Counts rows and digests what tells one version of the data from another, without decoding an image."""
    parts = list(data.values()) if isinstance(data, datasets.DatasetDict) else [data]
    classes = parts[0].features["label"].names
    digest = hashlib.sha256(json.dumps(classes).encode())
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(domain_counts(part))
        domains = iter(row_domains(part))
        for batch in part.with_format("arrow").iter(batch_size=10_000):
            images = batch["image"].combine_chunks()
            paths, sizes = images.field("path").to_pylist(), pc.binary_length(images.field("bytes")).to_pylist()
            for label, path, size in zip(batch["label"].to_pylist(), paths, sizes, strict=True):
                file = "/".join(Path(path).parts[-3:]) if path else ""
                digest.update(
                    f"{next(domains)}\0{label}\0{file}\0{os.stat(path).st_size if size is None else size}\n".encode()
                )
    hub = DATASETS[name].hub if name in DATASETS and options.data_root is None else None
    return DataFacts(
        fingerprint=digest.hexdigest()[:16],
        rows=dict(counts),
        classes=classes,
        repo_id=hub.repo_id if hub else None,
        revision=hub.revision if hub else None,
    )
