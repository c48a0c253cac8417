"""The auxiliary batches of Align-SAM: drawn independently of the training batches, from the same data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_sage.trainer.sampler import DomainBalancedSampler

SHARE = 4
"""A training batch is so many times an auxiliary one (Section 5 of the Align-SAM paper)."""

_APART = 0x5EED_A11C  # keeps the shuffles apart from those of the training batches


class AuxiliaryBatches:
    """Batches that are a function of seed and step alone, so that a resumed training draws the same.

    Args:
        dataset: The training set, by rows.
        collator: Makes a batch of rows.
        domains: The domain of each row, to be balanced; the same for all rows for plain shuffles.
        batch_size: Rows of one auxiliary batch over all ranks.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If a batch has more rows than the data.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[Any]], dict[str, Any]],
        domains: Sequence[str],
        batch_size: int,
        seed: int,
    ) -> None:
        if batch_size > len(domains):
            raise ValueError(
                f"The auxiliary batch has {batch_size} rows, a {SHARE}th of the training batch, and the training set "
                f"has {len(domains)}. Lower per_device_train_batch_size or gradient_accumulation_steps."
            )
        balanced = domains if batch_size >= len(set(domains)) else [""] * len(domains)
        self._dataset = dataset
        self._collator = collator
        self._size = batch_size
        self._sampler = DomainBalancedSampler(balanced, batch_size, seed ^ _APART)

    def inputs(self, update: int, rank: int, world_size: int) -> dict[str, Any] | None:
        """This rank's rows of the auxiliary batch of an update, or ``None`` if it has none."""
        rows = list(self._sampler.rows(update * self._size, self._size))[rank::world_size]
        return self._collator([self._dataset[i] for i in rows]) if rows else None
