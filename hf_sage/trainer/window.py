"""The micro-batches of an update, cut into parts of one group each whose losses sum to the batch's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_sage.engine import Joint, Part, Verdict
from hf_sage.engine.distributed import gathered
from hf_sage.trainer.collator import join_rows, take_rows

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one group in one micro-batch, and how many items their mean loss averages over.

    The group is ``None`` where the micro-batch is whole.
    """

    group: str | None
    inputs: Inputs
    items: int


def cut(inputs: Inputs, groups: list[str] | None, count: Callable[[Inputs, int], int]) -> list[Rows]:
    """Cuts a micro-batch by group.

    Args:
        inputs: The micro-batch without its domain column.
        groups: The group of each row; ``None`` keeps the micro-batch whole.
        count: The number of loss items of some inputs with so many rows.

    Returns:
        The rows of each group that has any item to learn from.
    """
    if groups is None:
        pieces = [Rows(None, inputs, count(inputs, batch_size(inputs)))]
    else:
        pieces = []
        for group in sorted(set(groups)):
            rows = [i for i, name in enumerate(groups) if name == group]
            own = inputs if len(rows) == len(groups) else take_rows(inputs, rows, len(groups))
            pieces.append(Rows(group, own, count(own, len(rows))))
    return [piece for piece in pieces if piece.items]


def items_by_group(rows: list[Rows]) -> dict[str | None, int]:
    """The number of items of each group over all ranks, in an order all ranks share."""
    own = Counter[str | None]()
    for piece in rows:
        own[piece.group] += piece.items
    total = sum(gathered(own), Counter[str | None]())
    return {group: total[group] for group in sorted(total, key=str)}


def as_parts(rows: list[Rows], loss: Callable[[Inputs], Tensor], weight: float, *, scale_loss: bool) -> list[Part]:
    """The parts of a step.

    Args:
        rows: The pieces of all micro-batches of this rank.
        loss: The loss of some inputs.
        weight: The weight of one item.
        scale_loss: Whether ``loss`` is a mean over the inputs' items that the weight is still to be applied to; if not,
            it is already divided by the items of the whole batch.
    """

    def share(piece: Rows, own_weight: float) -> Callable[[], Tensor]:
        def value() -> Tensor:
            try:
                mean = loss(piece.inputs)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):  # BatchNorm's, of torch
                    error.add_note(
                        f"The domain {piece.group!r} has one row in this batch, and each domain goes through the "
                        "network by itself. Raise per_device_train_batch_size until every domain has two rows or more."
                    )
                raise
            return mean * own_weight if scale_loss else mean

        return value

    return [
        Part(piece.group, piece.items * weight, share(piece, piece.items * weight), class_indices(piece.inputs))
        for piece in rows
    ]


def class_indices(inputs: Inputs) -> Tensor | None:
    """One integer label a row, if that is what the labels are."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return labels if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point() else None


def as_joint(
    rows: list[Rows], loss: Callable[[Inputs], Tensor], weight: float, verdict: Verdict, *, scale_loss: bool
) -> Joint | None:
    """The pieces of one micro-batch as one batch again, sorted by group; ``None`` where it is one piece anyway.

    Args:
        rows: The pieces.
        loss: See `as_parts`.
        weight: See `as_parts`.
        verdict: What earlier steps found out about the model.
        scale_loss: See `as_parts`.
    """
    if len(rows) < 2:
        return None
    sizes = [batch_size(piece.inputs) for piece in rows]
    whole = Rows(None, join_rows([piece.inputs for piece in rows], sizes), sum(piece.items for piece in rows))
    (part,) = as_parts([whole], loss, weight, scale_loss=scale_loss)
    return Joint([(piece.group, n) for piece, n in zip(rows, sizes, strict=True)], part.loss, verdict)


def batch_size(inputs: Mapping[str, Any]) -> int:
    """The number of rows of the first tensor that has rows, 1 if none has."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0), 1)
