"""The batch of a step: its gradient under the method's objective, at whatever weights the network has now."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import Gradients, Reduction
from hf_sage.engine.features import FeatureTap, feature_pass
from hf_sage.engine.gradients import Backward, CleanPass, Part, clean_pass, gradient_of
from hf_sage.engine.joint import Joint, joint_clean_pass
from hf_sage.engine.perturbation import perturbed
from hf_sage.engine.randomness import RandomState
from hf_sage.engine.sharding import resharded
from hf_sage.methods import Method
from hf_sage.objectives import FeatureObjective, GroupWeights
from hf_sage.rules import Memory, Step


@dataclass
class Batch:
    """The rows of a step, and how they are passed through the network.

    Attributes:
        model: The network.
        parameters: θ.
        parts: The rows, group by group.
        groups: The groups on any rank.
        method: Its objective is what gradients are taken of.
        step: The step, without a memory.
        memories: What the method's rules remember, by the rules' names.
        backward: Backpropagates a loss into ``.grad``.
        reduce: Averages gradients over ranks.
        unnoticed: Surrounds every pass but the first.
        auxiliary: The auxiliary batch, if there is one; empty where this rank has no row of it.
        tap: Where features are heard.
        before: The objective's memory as the clean pass found it.
    """

    model: nn.Module
    parameters: Sequence[Tensor]
    parts: Sequence[Part]
    groups: Sequence[Hashable]
    method: Method
    step: Step
    memories: dict[str, Memory]
    backward: Backward
    reduce: Reduction
    unnoticed: Callable[[], AbstractContextManager[None]]
    auxiliary: Sequence[Part] | None
    tap: FeatureTap | None
    before: Memory = field(default_factory=dict)

    def at(self, rule: str) -> Step:
        """The step as a rule of the method sees it."""
        return replace(self.step, memory=self.memories.setdefault(rule, {}))

    def clean_pass(self, joint: Joint | None, record_randomness: bool) -> CleanPass:
        """Phases 1 and 2 of Algorithm 1, under the method's objective."""
        ascent = self.method.ascent
        self.before = dict(self.at("objective").memory)
        weigh_ascent = ascent.group_weights if ascent is not None and "groups" in ascent.needs else None
        if joint is not None and len(self.groups) > 1 and self.method.objective is None and weigh_ascent is None:
            clean = joint_clean_pass(
                self.model, self.parameters, self.parts, joint, self.backward, record_randomness, self.unnoticed
            )
            if clean is not None:
                return clean
        return self._pass(self.at("objective"), None, record_randomness, weigh_ascent)

    def gradient(self, parts: Sequence[Part], replay: Sequence[RandomState] | None) -> tuple[Gradients, Tensor]:
        """The objective's gradient and the loss at the weights as they are now."""
        if self.method.objective is None:
            gradient, loss = gradient_of(self.parameters, parts, self.backward, replay=replay)
            return self.reduce(gradient, self.parameters), loss
        # It finds the memory as the clean pass found it, and what it writes is forgotten.
        found = self._pass(replace(self.step, memory=dict(self.before)), replay, False, None)
        return found.gradient, found.loss

    def _pass(
        self,
        step: Step,
        replay: Sequence[RandomState] | None,
        record_randomness: bool,
        weigh_ascent: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> CleanPass:
        objective = self.method.objective
        if isinstance(objective, FeatureObjective):
            assert self.tap is not None
            return feature_pass(
                self.model,
                self.parameters,
                self.parts,
                self.backward,
                objective,
                self.tap,
                step,
                reduce=self.reduce,
                record_randomness=record_randomness,
                replay=replay,
            )
        return clean_pass(
            self.parameters,
            self.parts,
            self.backward,
            groups=self.groups,
            reduce=self.reduce,
            record_randomness=record_randomness,
            weigh=partial(objective, step=step) if isinstance(objective, GroupWeights) else None,
            weigh_ascent=weigh_ascent,
            replay=replay,
        )


class FurtherPasses:
    """Evaluations of a batch that rules ask for, see `hf_sage.rules.Passes`.

    Args:
        batch: The batch.
        theta: The parameters that have a gradient: those that rules see.
        parts: What a pass goes through.
        replay: The first pass's random states, if later passes are to draw the same numbers.
    """

    def __init__(
        self, batch: Batch, theta: Sequence[Tensor], parts: Sequence[Part], replay: Sequence[RandomState] | None
    ) -> None:
        self._batch = batch
        self._theta = theta
        self._parts = parts
        self._replay = replay
        device = theta[0].device.type  # rules are called without the autocast that passes may run in
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)

    def gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """The gradient of the batch's loss at θ + ε, or at θ."""
        batch = self._batch
        with self._at(epsilon):
            gradient, _ = batch.gradient(self._parts, self._replay)
        return self._of_theta(gradient)

    def auxiliary_gradient_at(self, epsilon: Sequence[Tensor] | None) -> list[Tensor]:
        """The gradient of the auxiliary batch's loss at θ + ε, or at θ."""
        batch = self._batch
        if batch.auxiliary is None:
            raise ValueError("This rule needs an auxiliary batch: pass its parts by two_pass_step(auxiliary=...).")
        with self._at(epsilon):
            gradient, _ = gradient_of(batch.parameters, batch.auxiliary, batch.backward)
        return self._of_theta(batch.reduce(gradient, batch.parameters))

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v by two backward passes; attention runs with a kernel that has a second derivative meanwhile."""
        batch = self._batch
        training = [module for module in batch.model.modules() if module.training]
        total: Gradients = [None] * len(self._theta)
        state = RandomState.capture()
        for module in training:
            module.training = False  # a fixed function: no dropout, and batch statistics at rest
        try:
            with torch.enable_grad(), self._autocast(), sdpa_kernel(SDPBackend.MATH), batch.unnoticed():
                for part in self._parts:
                    first = torch.autograd.grad(part.loss(), self._theta, create_graph=True, allow_unused=True)
                    inner = [(g * v.to(g.dtype)).sum() for g, v in zip(first, vector, strict=True) if g is not None]
                    second = torch.autograd.grad(torch.stack(inner).sum(), self._theta, allow_unused=True)
                    for i, h in enumerate(second):
                        held = total[i]
                        if h is not None:
                            total[i] = h if held is None else held + h
        finally:
            for module in training:
                module.training = True
            state.restore()
        mean = batch.reduce(total, list(self._theta))
        return [torch.zeros_like(p) if h is None else h for h, p in zip(mean, self._theta, strict=True)]

    @contextmanager
    def _at(self, epsilon: Sequence[Tensor] | None) -> Iterator[None]:
        model = self._batch.model
        moved = nullcontext() if epsilon is None else perturbed(self._theta, [e.clone() for e in epsilon])
        still = frozen_running_statistics(model)
        with torch.enable_grad(), self._autocast(), resharded(model), moved, still, self._batch.unnoticed():
            yield

    def _of_theta(self, gradient: Gradients) -> list[Tensor]:
        by_parameter = {id(p): g for p, g in zip(self._batch.parameters, gradient, strict=True)}
        found = [by_parameter[id(p)] for p in self._theta]
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._theta, strict=True)]
