"""The domain column on its way from the dataset to the step, past the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sage.trainer.groups import encode_groups


class DomainCollator:
    """Takes the domain out of each row, lets another collator batch the rest, and adds the domains as bytes.

    Rows without the column (an evaluation set of unknown domain) pass through.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], column: str) -> None:
        self.collator = collator
        self.column = column

    def __getattr__(self, name: str) -> Any:
        """What else the other collator has: some trainers ask theirs (sentence-transformers: its label columns)."""
        if name == "collator":  # not there yet while a worker process unpickles this
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[Any]) -> Any:
        """Batches the rows; the domains come under the column's own name, see `encode_groups`."""
        if not isinstance(features[0], Mapping) or self.column not in features[0]:
            return self.collator(features)
        batch = self.collator([{k: v for k, v in f.items() if k != self.column} for f in features])
        batch[self.column] = encode_groups(feature[self.column] for feature in features)
        return batch


def take_rows(inputs: Mapping[str, Any], rows: list[int], batch_size: int) -> dict[str, Any]:
    """The given rows of a batch: of tensors and lists with a row for each example, at any depth of dictionaries.

    Raises:
        ValueError: If a tensor has another number of rows than the batch: it cannot be cut by example.
    """
    return {name: _take(name, value, rows, batch_size) for name, value in inputs.items()}


def _take(name: str, value: Any, rows: list[int], batch_size: int) -> Any:
    if isinstance(value, Mapping):
        return take_rows(value, rows, batch_size)
    if isinstance(value, Tensor) and value.dim() > 0:
        if value.shape[0] != batch_size:
            raise ValueError(
                f"The input {name!r} has {value.shape[0]} rows in a batch of {batch_size} examples, so it cannot be "
                "cut into groups. Use a collator that keeps one row an example, or train without groups by "
                "domain_column=None."
            )
        return value[torch.tensor(rows, device=value.device)]
    if isinstance(value, list | tuple) and len(value) == batch_size:
        return [value[i] for i in rows]
    return value


def join_rows(parts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The batch that parts of one batch make, one after the other; undoes `take_rows`.

    Args:
        parts: What `take_rows` returned.
        sizes: The number of rows of each.
    """
    return {name: _join([part[name] for part in parts], sizes) for name in parts[0]}


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return join_rows(values, sizes)
    if isinstance(first, Tensor) and first.dim() > 0:
        return torch.cat(list(values))
    if isinstance(first, list | tuple) and all(len(v) == n for v, n in zip(values, sizes, strict=True)):
        return [row for value in values for row in value]
    return first
