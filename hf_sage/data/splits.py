"""One domain held out, the others split into training and validation."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

import datasets
import numpy as np

from hf_sage.data.deal import deal

Data: TypeAlias = datasets.Dataset | datasets.DatasetDict
SPLITS = ("train", "validation", "test")


def hold_out(
    data: Data,
    held_out: str,
    validation_fraction: float = 0.2,
    seed: int = 0,
    domain_column: str = "domain",
    label_column: str = "label",
) -> datasets.DatasetDict:
    """Splits data for leave-one-domain-out: the held-out domain is in no row of training or validation.

    Args:
        data: One dataset, or splits ``train``, ``validation`` and ``test`` made beforehand (then the held-out domain's
            test rows are tested on, and the other domains' training and validation rows used for those).
        held_out: The domain to hold out, by name (integers by their digits).
        validation_fraction: Share of each source domain's rows to validate on, in each class where it has enough.
        seed: Seed of the split.
        domain_column: Column of the domain: strings, a ClassLabel or integers.
        label_column: Column of the label.

    Returns:
        Splits ``train``, ``validation`` (source domains) and ``test`` (the held-out domain, all rows of a single
        dataset). No image is decoded.

    Raises:
        ValueError: If the column or the domain does not exist, the fraction is not in (0, 1), or fewer than two domains
            are left.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1; got {validation_fraction}.")
    whole = data["train"] if isinstance(data, datasets.DatasetDict) else data
    names = domain_names(whole, domain_column)
    if held_out not in names:
        raise ValueError(f"Unknown held-out domain {held_out!r}: use one of {', '.join(map(repr, names))}.")
    if len(names) < 3:
        raise ValueError(
            f"Holding out {held_out!r} leaves {len(names) - 1} of the domains {', '.join(map(repr, names))}: training "
            "across domains needs two or more. Add data of another domain."
        )
    if isinstance(data, datasets.DatasetDict):
        return datasets.DatasetDict({s: _rows(data[s], held_out, domain_column, s == "test") for s in SPLITS})
    source = _rows(data, held_out, domain_column, False)
    train, validation = _stratified(source, validation_fraction, seed, domain_column, label_column)
    return datasets.DatasetDict(
        train=source.select(train),
        validation=source.select(validation),
        test=_rows(data, held_out, domain_column, True),
    )


def domain_names(dataset: datasets.Dataset, domain_column: str = "domain") -> list[str]:
    """The domains that occur in a dataset: a ClassLabel's in its order, others sorted.

    Raises:
        ValueError: If there is no such column.
    """
    found = set(row_domains(dataset, domain_column))
    feature = dataset.features[domain_column]
    return [n for n in feature.names if n in found] if isinstance(feature, datasets.ClassLabel) else sorted(found)


def domain_counts(dataset: datasets.Dataset, domain_column: str = "domain") -> dict[str, int]:
    """Rows by domain, in the order of `domain_names`."""
    counts = Counter(row_domains(dataset, domain_column))
    return {name: counts[name] for name in domain_names(dataset, domain_column)}


def row_domains(dataset: datasets.Dataset, column: str = "domain") -> list[str]:
    """The domain of every row, by name.

    Raises:
        ValueError: If there is no such column.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"There is no domain column {column!r}; the columns are {', '.join(map(repr, dataset.column_names))}. Name "
            "the one that holds the domain by domain_column (--domain_column); without one there is nothing to hold "
            "out, and SAGETrainer trains as one group by domain_column=None."
        )
    values = dataset.with_format(None)[column][:]
    feature = dataset.features[column]
    return [feature.int2str(v) if isinstance(feature, datasets.ClassLabel) else str(v) for v in values]


def _rows(dataset: datasets.Dataset, held_out: str, column: str, keep: bool) -> datasets.Dataset:
    """The rows of the held-out domain, or of all others."""
    return dataset.select([i for i, name in enumerate(row_domains(dataset, column)) if (name == held_out) == keep])


def _stratified(
    dataset: datasets.Dataset, fraction: float, seed: int, domain_column: str, label_column: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to validate on: of n rows of one domain, ⌊n·fraction⌋ (at least one of two or more) validate.

    Within a domain the rows are dealt class by class, so that each class gives its share up to rounding.
    """
    rng = np.random.default_rng(seed)
    domains = np.array(row_domains(dataset, domain_column))
    labels = np.array(dataset.with_format(None)[label_column][:])
    validation: list[int] = []
    for domain in sorted(set(domains.tolist())):
        own = np.flatnonzero(domains == domain)
        count = max(int(len(own) * fraction), min(1, len(own) - 1))
        validation += own[deal(labels[own], rng)[:count]].tolist()
    chosen = np.zeros(len(dataset), dtype=bool)
    chosen[validation] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
