"""What a method needs and a set-up may not have: said before training starts."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from hf_sage.methods import Method
from hf_sage.trainer.window import Inputs, class_indices

logger = logging.getLogger(__name__)

TWICE_DIFFERENTIABLE = ("eager", "sdpa", None)
"""Implementations of attention that have a second derivative; scaled_dot_product_attention by its plain kernel."""


def check_needs(method: Method, model: nn.Module, column: str | None, scope: str, scaler: Any) -> None:
    """Raises where a method needs what is not there.

    Args:
        method: The method.
        model: The network.
        column: The domain column, if there is one.
        scope: The scope of perturbations.
        scaler: The GradScaler, if there is one.

    Raises:
        ValueError: With what to do about it.
    """
    needs = method.needs
    tied = [rule for rule in (method.objective, method.hook, method.ascent) if rule is not None]
    if column is None and any("groups" in rule.needs for rule in tied):
        raise ValueError(
            f"Method {method.name!r} compares groups, and domain_column=None has none. Name the column that holds the "
            "domain by domain_column=..., or choose a method without groups."
        )
    if scope == "local" and ("memory" in needs or "features" in needs or method.hook is not None):
        raise ValueError(
            f"Method {method.name!r} needs the whole batch of every update, and perturbation_scope='local' gives each "
            "micro-batch a step of its own. Use perturbation_scope='global', the default."
        )
    if scaler is not None and method.hook is not None:
        raise ValueError(
            f"Method {method.name!r} updates the weights itself, past the GradScaler of fp16. Use bf16 or fp32."
        )
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if "curvature" in needs and attention not in TWICE_DIFFERENTIABLE:
        raise ValueError(
            f"Method {method.name!r} takes second derivatives, and the attention {attention!r} has none. Load the "
            "model with attn_implementation='sdpa' or 'eager'."
        )


def check_labels(method: Method, batch: Inputs) -> None:
    """Raises where the data does not tell the class of each row, for a method that asks for it.

    Args:
        method: The method.
        batch: Any rows of the training set as the step gets them.

    Raises:
        ValueError: With what the batch has, and what to do about it.
    """
    if class_indices(batch) is not None:
        return
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        found = f"'labels' of shape {tuple(labels.shape)} and type {str(labels.dtype).removeprefix('torch.')}"
    else:
        found = f"no 'labels', only {', '.join(map(repr, batch)) or 'nothing'}"
    raise ValueError(
        f"Method {method.name!r} needs the class of each row: 'labels' of integers, one a row, in every batch. Batches "
        f"of this training set have {found}. Name the column of the class indices 'labels' (or 'label'), or have the "
        "data_collator put them there; the methods 'vrex' and 'group_dro' do without."
    )


def warn_of_delays(method: Method, updates: int) -> None:
    """Warns of every rule whose full weight or search would set in only after the last update.

    Args:
        method: The method.
        updates: Updates of the training.
    """
    for rule in method.rules.values():
        if rule.sets_in >= updates:
            logger.warning(
                f"{type(rule).__name__} of the method {method.name!r} sets in after {rule.delayed_by}={rule.sets_in} "
                f"updates, and this training has {updates}. Set {rule.delayed_by} to less than {updates}, "
                "or train longer."
            )
