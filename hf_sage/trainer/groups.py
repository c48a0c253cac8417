"""Groups as the trainer sees them: an integer for each row, and a name for each integer.

The integer is a function of the value alone, so that ranks, dataloader workers and streams agree on it without talking.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
from torch import Tensor


def group_id(value: object) -> int:
    """The integer that stands for a group: integers stand for themselves, strings get a 63-bit digest.

    Raises:
        TypeError: If the value is neither a string nor an integer.
    """
    value = plain_value(value)
    if isinstance(value, int):
        return value
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "big") >> 1


def plain_value(value: object) -> str | int:
    """A domain as a string or an integer; 0-dimensional tensors and arrays, which hash by identity, as what they hold.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        return plain_value(value.item())
    raise TypeError(
        f"A domain must be a string, a ClassLabel or an integer; got {value!r} of type {type(value).__name__}. "
        "Give every row a domain, or train without groups by domain_column=None."
    )


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of a dataset, or ``None`` where they cannot be known without reading it (some streams)."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return None if dataset.column_names is None else list(dataset.column_names)
    try:
        first = dataset[0]
    except (TypeError, NotImplementedError, IndexError, KeyError):
        return None
    return list(first) if isinstance(first, Mapping) else []


def check_column(dataset: Any, column: str) -> None:
    """Raises a ValueError if a training set is known not to have the domain column."""
    columns = columns_of(dataset)
    if columns is not None and column not in columns:
        raise ValueError(
            f"The training set has no domain column {column!r}. It has: {', '.join(map(repr, columns)) or 'none'}. "
            "Name the column that holds the domain by domain_column=..., or train without groups by "
            "domain_column=None."
        )


def domain_values(dataset: Any, column: str) -> list[str | int]:
    """The domain of every row of a map-style dataset; a `datasets.Dataset` is read in that column alone."""
    if isinstance(dataset, datasets.Dataset):
        return [plain_value(value) for value in dataset.with_format(None)[column]]
    return [plain_value(dataset[i][column]) for i in range(len(dataset))]


def group_names(dataset: Any, column: str, values: Iterable[object] | None = None) -> dict[int, str]:
    """The name of each group: a ClassLabel's own, otherwise the value as text.

    Args:
        dataset: Any dataset.
        column: The domain column.
        values: The domains of its rows, if they are at hand; a `datasets.Dataset` looks them up otherwise.
    """
    features = getattr(dataset, "features", None)  # any dataset may describe its columns as `datasets` does
    label = features.get(column) if isinstance(features, datasets.Features) else None
    if isinstance(label, datasets.ClassLabel):
        return dict(enumerate(label.names))
    if values is None:
        values = dataset.unique(column) if isinstance(dataset, datasets.Dataset) and label is not None else ()
    return {group_id(value): str(value) for value in set(values)}
