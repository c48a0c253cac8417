"""Fish: a few updates on one group after the other, and half of the way they lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sage.hooks.base import WeightHook, WeightPasses
from hf_sage.rules import Step


@dataclass(frozen=True)
class Fish(WeightHook):
    """θ ← θ + ε(θ_K − θ), θ_K being K updates of the base optimizer away, one on each group's rows.

    Shi et al. 2022, arXiv 2104.09937, Algorithm 1: to first order that descends the loss and ascends the inner products
    of the groups' gradients. The groups come in a random order. The inner optimizer is the trainer's own with its
    schedule, and keeps its state, as DomainBed's Adam does; gradients are not clipped on the way. Buffers (running
    statistics) stay where the passes have left them, where DomainBed interpolates them too.

    Attributes:
        meta_rate: ε in (0, 1], default 0.5 (DomainBed's ``meta_lr``).
    """

    meta_rate: float = 0.5

    replaces_update: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.meta_rate <= 1:
            raise ValueError(f"meta_rate must lie in (0, 1]; got {self.meta_rate!r}. Fish's own is 0.5.")

    @property
    def passes(self) -> float:
        """K passes over a K-th of the batch each."""
        return 1.0

    def __call__(self, parameters: Sequence[Tensor], passes: WeightPasses, step: Step) -> dict[str, Tensor]:
        """See `WeightHook`."""
        start = [p.detach().clone() for p in parameters]
        order = torch.randperm(len(passes.groups), generator=torch.Generator().manual_seed(step.seed))
        for k in order.tolist():
            passes.update_on(passes.groups[k])
        with torch.no_grad():
            for p, before in zip(parameters, start, strict=True):
                p.copy_(before.lerp_(p, self.meta_rate))
        return {}
