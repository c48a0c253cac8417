"""How a loss is normalised: measured, because what Trainer assumes is wrong for CLIP and others.

Trainer takes a ``forward(**kwargs)`` for a promise that the model divides its summed loss by ``num_items_in_batch``,
the number of label items in the whole accumulated batch over all ranks. CLIP, SigLIP, ResNet and others swallow the
argument and return a mean, which Trainer then neither divides by the accumulation steps nor leaves alone under several
ranks (huggingface/transformers#47688). Here two evaluations of the loss decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sage.engine import RandomState, frozen_running_statistics

IGNORED = -100
"""The label that losses of transformers leave out."""


def divides_by_items(loss: Callable[[Tensor | int], Tensor], num_items: Tensor | int, model: nn.Module) -> bool | None:
    """Whether a loss really is divided by the number of items it is told; ``None`` if these rows cannot tell.

    Args:
        loss: Computes the loss of some rows for a given number of items.
        num_items: A number of items.
        model: The network; its running statistics and the random generators are left as they are.
    """
    state = RandomState.capture()
    with torch.no_grad(), frozen_running_statistics(model):
        once = loss(num_items)
        state.restore()
        doubled = loss(2 * num_items)
        state.restore()
    # A model may add terms that are not divided (load balancing of experts), so the ratio need not be exactly ½.
    if not torch.isfinite(once) or once == 0:
        return None
    return bool(doubled.abs() < 0.75 * once.abs())


def count_items(inputs: Mapping[str, Any], rows: int, shifts_labels: bool) -> int:
    """The number of items a mean loss over these inputs averages over.

    Args:
        inputs: A batch.
        rows: Its number of examples.
        shifts_labels: Whether position 0 of each row of labels is no target (causal language models).

    Returns:
        The number of labels that are not ignored where labels are integers, the number of examples otherwise.
    """
    if not isinstance(inputs, Mapping):
        return rows
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return rows
    if shifts_labels and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())
