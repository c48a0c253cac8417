"""Losses taken group by group: the loss of a batch as a sum of which each group's share is known.

Losses that are a mean or a sum over rows are summed over each group's rows, and the sums divided by what the mean
divides by. What a model or a trainer does with the result must be linear, as the division by a number of tokens is:
then each group's share of the loss is known, and that there is nothing else in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sage.engine.joint.collector import GroupRows

TOLERANCE = 1e-5
"""Relative: a loss with anything else in it differs by more, and round-off by less."""

_CLASSES = (F.cross_entropy, F.nll_loss)
_ENTRIES = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
)
_SIGNATURES = {function: inspect.signature(function) for function in (*_CLASSES, *_ENTRIES)}


class GroupLosses:
    """The losses of one forward pass."""

    def __init__(self, rows: GroupRows) -> None:
        self._rows = rows
        self._whole: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A loss function of torch, by groups where it is one of those known."""
        if function not in _SIGNATURES:
            return function(*args, **kwargs)
        bound = _SIGNATURES[function].bind(*args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        x, target, reduction = options.pop("input"), options.pop("target"), options.pop("reduction")
        by_class = function in _CLASSES
        if (
            reduction not in ("mean", "sum")
            or (options.pop("size_average", None), options.pop("reduce", None)) != (None, None)
            or not (self._rows.fit(x) and self._rows.fit(target) and len(x) == len(target))
            or not (by_class or (x.shape == target.shape and options.get("weight") is None))
            or (by_class and x.dim() < 2)
        ):
            return function(*args, **kwargs)
        pairs = zip(self._rows.split(x), self._rows.split(target), strict=True)
        sums = torch.stack([function(a, b, reduction="sum", **options) for a, b in pairs])
        if reduction == "mean":
            sums = sums / (_class_weights(x, target, options) if by_class else x.numel())
        self._sums.append(sums.detach())
        self._whole.append(sums.sum())
        return self._whole[-1]

    def take_apart(self, loss: Tensor) -> None:
        """Finds out what the loss of the batch makes of the losses it was computed from; to be called once."""
        found = [w for w in self._whole if w.requires_grad]
        if found and loss.requires_grad:
            slopes = torch.autograd.grad(loss, found, retain_graph=True, allow_unused=True)
            shares = [s * sums for s, sums in zip(slopes, self._sums, strict=True) if s is not None]
            if shares:
                self._found = torch.stack(shares).sum(0), loss.detach()
        self._whole.clear()

    def shares(self) -> Tensor | None:
        """Each group's share of the loss, (K,); ``None`` if they are not known, or not all there is in the loss."""
        if self._found is None:
            return None
        shares, loss = self._found
        return None if (shares.sum() - loss).abs() > TOLERANCE * loss.abs() else shares  # a NaN is no disagreement


def _class_weights(x: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """What the mean of a loss over classes divides by."""
    if target.is_floating_point():  # probabilities of classes
        return torch.tensor(x.numel() / x.shape[1], device=x.device)
    is_item = target != options["ignore_index"]
    weights: Tensor | None = options["weight"]
    if weights is None:
        return torch.sum(is_item)
    return torch.sum(weights[target.masked_fill(~is_item, 0)] * is_item)
