"""Groups on their way from a column of the data to the step: by name, as rows of bytes.

A name travels as bytes and not as a number from a list, so that ranks, dataloader workers and streams agree on it
without talking, and any of them can tell it.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from hf_sage.engine import RandomState

WIDTH = 64
"""Bytes of a name in a batch; longer names end in a digest instead."""


def group_name(value: object) -> str:
    """A domain as text; 0-dimensional tensors and arrays, which hash by identity, as what they hold.

    Raises:
        ValueError: If the value is neither a string nor an integer.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        return group_name(value.item())
    raise ValueError(
        f"A domain must be a string, a ClassLabel or an integer; got {value!r} of type {type(value).__name__}. "
        "Give every row a domain, or train without groups by domain_column=None."
    )


def encode_groups(values: Iterable[object]) -> Tensor:
    """The domains of a batch as bytes: uint8 of shape ``(rows, WIDTH)``, UTF-8 padded with zeros.

    Raises:
        ValueError: If a value is neither a string nor an integer.
    """
    rows = []
    for value in values:
        name = group_name(value).encode()
        if len(name) > WIDTH:
            name = (
                name[: WIDTH - 17].decode(errors="ignore").encode() + b"~" + hashlib.md5(name).hexdigest()[:16].encode()
            )
        rows.append(name.ljust(WIDTH, b"\0"))
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), WIDTH)


def decode_groups(encoded: Tensor) -> list[str]:
    """The names that `encode_groups` wrote."""
    return [row.rstrip(b"\0").decode() for row in map(bytes, encoded.cpu().numpy())]


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of a dataset, or ``None`` where they cannot be known without reading from a stream."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return None if dataset.column_names is None else list(dataset.column_names)
    state = RandomState.capture()  # a row that is augmented draws random numbers that are not ours to take
    try:
        first = dataset[0]
    except (TypeError, NotImplementedError, IndexError, KeyError):
        return None
    finally:
        state.restore()
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


def domains_of(dataset: Any, column: str) -> list[str]:
    """The domain of every row of a map-style dataset.

    A `datasets.Dataset` is read in that column alone; of any other every row is read once.
    """
    if isinstance(dataset, datasets.Dataset):
        return [group_name(value) for value in dataset.with_format(None)[column]]
    if isinstance(dataset, Subset):
        whole = domains_of(dataset.dataset, column)
        return [whole[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [name for part in dataset.datasets for name in domains_of(part, column)]
    state = RandomState.capture()
    try:
        return [group_name(dataset[i][column]) for i in range(len(dataset))]
    finally:
        state.restore()


def class_names(dataset: Any, column: str) -> dict[str, str]:
    """What the integers of a ClassLabel column stand for, by their digits; nothing for other columns."""
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset, column)
    if isinstance(dataset, ConcatDataset):  # other parts may count their labels otherwise
        own = [class_names(part, column) for part in dataset.datasets]
        return own[0] if all(names == own[0] for names in own) else {}
    features = getattr(dataset, "features", None)  # any dataset may describe its columns as `datasets` does
    label = features.get(column) if isinstance(features, datasets.Features) else None
    return {str(i): name for i, name in enumerate(label.names)} if isinstance(label, datasets.ClassLabel) else {}
