"""The auxiliary batches of Align-SAM: drawn independently of the training batches, from the same data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_sage.engine import Part
from hf_sage.trainer.sampler import DomainBalancedSampler
from hf_sage.trainer.window import Inputs, Rows, as_parts, items_by_group

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


def auxiliary_parts(
    pieces: list[Rows], loss: Callable[[Inputs], Tensor], divisor: float | None, world_size: int
) -> list[Part]:
    """A rank's rows of an auxiliary batch as parts whose losses, averaged over ranks, are the batch's mean loss.

    Every rank must call it.

    Args:
        pieces: The rows, if this rank has any.
        loss: The loss of some inputs, as the training batch has it.
        divisor: What that loss is divided by: the items of the training batch. ``None``: it is a mean.
        world_size: The number of ranks.
    """
    items = sum(items_by_group(pieces).values()) or 1
    if divisor is None:
        return as_parts(pieces, loss, world_size / items, scale_loss=True)
    factor = divisor / items  # multiplied back, and divided by the items of this batch
    return as_parts(pieces, lambda own: loss(own) * factor, factor, scale_loss=False)
