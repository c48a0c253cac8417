"""The ascent of Friendly-SAM: what sets this batch's gradient apart from those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.rules import Need, Step, remembered
from hf_sage.vectors import along, widened


@dataclass(frozen=True)
class FriendlyAscent(Ascent):
    """ε = ρ d/‖d‖₂, d_t = g_t − σ m_t, m_t = λ m_{t−1} + (1 − λ) g_t (Li et al. 2024, arXiv 2403.12350; F-SAM).

    The mean starts at the first gradient, as in the authors' code; from zero it would be too small for 1/(1 − λ)
    updates. In the first update, where there is no mean yet, d = g. The authors' code subtracts m_{t−1}: for σ = 1, its
    and the paper's value, that is the same direction.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.2 (the authors' script for CIFAR).
        decay: λ in [0, 1), default 0.6 (the same script; the default of the code's class is 0.9).
        sigma: σ, the share of the mean that is taken off, default 1 (the paper's).
    """

    rho: float = 0.2
    decay: float = 0.6
    sigma: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {self.decay!r}.")
        if not math.isfinite(self.sigma):
            raise ValueError(f"sigma must be a finite number; got {self.sigma!r}. The paper uses 1.")

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        step = step or Step()
        now = [widened(g) / step.gradient_scale for g in gradients]
        before = remembered(step.memory, "mean", now)
        if before is None:
            step.memory["mean"] = now
            return along(now, self.rho, parameters)
        mean = [self.decay * m + (1 - self.decay) * g for m, g in zip(before, now, strict=True)]
        step.memory["mean"] = mean
        return along([g - self.sigma * m for g, m in zip(now, mean, strict=True)], self.rho, parameters)
