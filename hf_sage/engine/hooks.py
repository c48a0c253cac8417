"""Hooks on the weights, and what they may do with the batch of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import Reduction
from hf_sage.engine.gradients import Backward, Part, clean_pass, gradient_of
from hf_sage.engine.step import StepReport, all_finite, trainable
from hf_sage.hooks import WeightHook
from hf_sage.rules import Step


class GroupPasses:
    """See `hf_sage.hooks.WeightPasses`.

    Attributes:
        losses: For each group that was passed through the network the sum of its losses and of their weights.
        is_finite: Whether every update had a gradient that is finite; one that is not is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        groups: Sequence[Hashable],
        update: Callable[[], None],
        backward: Backward,
        reduce: Reduction,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.losses: dict[Hashable, tuple[Tensor, float]] = {}
        self.is_finite = True
        self._model = model
        self._parts = parts
        self._groups = groups
        self._update = update
        self._backward = backward
        self._reduce = reduce
        self._parameters = parameters

    @property
    def groups(self) -> Sequence[Hashable]:
        """The groups of the batch."""
        return self._groups

    def update_on(self, group: Hashable) -> None:
        """One update of the base optimizer on the mean loss of one group."""
        own = [part for part in self._parts if part.group == group]
        weight = sum(part.weight for part in own)
        gradient, loss = gradient_of(self._parameters, own, self._backward)
        shares = self._reduce.total(torch.tensor([weight, 1.0], dtype=torch.float64, device=loss.device))
        mean = self._reduce(gradient, self._parameters)
        for p, g in zip(self._parameters, mean, strict=True):
            # g is w_k times the gradient of the group's mean loss, w_k being the mean of the ranks' weights.
            p.grad = None if g is None else g.div_(float(shares[0] / shares[1]))
        if all_finite([p.grad for p in self._parameters if p.grad is not None]):
            self._update()
        else:
            self.is_finite = False
        for p in self._parameters:
            p.grad = None
        self.losses[group] = (loss, weight)

    def look(self) -> tuple[Tensor, Tensor]:
        """The Gram matrix of the groups' gradients at the weights as they are, and the batch's loss."""
        grams: list[Tensor] = []
        with frozen_running_statistics(self._model):
            found = clean_pass(
                self._parameters,
                self._parts,
                self._backward,
                groups=self._groups,
                reduce=self._reduce,
                see_gram=grams.append,
            )
        total = self._reduce.total(torch.stack([found.loss.double(), torch.ones_like(found.loss).double()]))
        return grams[0] if grams else torch.ones(1, 1, dtype=torch.float64), total[0] / total[1]


def apply_hook(
    model: nn.Module,
    parts: Sequence[Part],
    hook: WeightHook,
    step: Step,
    update: Callable[[], None],
    *,
    backward: Backward = torch.Tensor.backward,
    groups: Sequence[Hashable] | None = None,
    reduce: Reduction | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
) -> StepReport | None:
    """Lets a hook move the weights.

    Args:
        model: The network.
        parts: The batch, in parts of one group each.
        hook: The hook.
        step: The step, with the hook's memory; what the hook has to say for the log is added to its facts.
        update: One update of the base optimizer by what is in ``.grad``.
        backward: Backpropagates a loss into ``.grad``.
        groups: See `two_pass_step`.
        reduce: See `two_pass_step`.
        parameters: See `two_pass_step`.

    Returns:
        What to report where the hook was the whole update, with the loss of each group as the hook met it; otherwise
        ``None``: the method's step is still to come.
    """
    parameters = trainable(model) if parameters is None else list(parameters)
    groups = list(dict.fromkeys(part.group for part in parts)) if groups is None else list(groups)
    passes = GroupPasses(model, parts, groups, update, backward, reduce or Reduction(), parameters)
    step.facts |= hook(parameters, passes, step)
    if not hook.replaces_update:
        return None
    loss = torch.stack([value for value, _ in passes.losses.values()]).sum()
    unknown = torch.full((), math.nan, dtype=torch.float64, device=loss.device)
    return StepReport(loss, None, unknown, None, passes.losses, passes.is_finite, step.facts)
