"""The ascent of VaSSO: along a running mean of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.rules import Need, Step, remembered
from hf_sage.vectors import along, widened


@dataclass(frozen=True)
class VarianceSuppressedAscent(Ascent):
    """ε = ρ d/‖d‖₂, d_t = (1 − θ) d_{t−1} + θ g_t (Li and Giannakis 2023, arXiv 2309.15639; VaSSO).

    The mean starts at the first gradient, as in the authors' code. θ = 1 is SAM.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.05 (the authors' code).
        theta: θ in (0, 1], default 0.9 (the authors' code; the Align-SAM paper tries 0.2 beside it).
    """

    rho: float = 0.05
    theta: float = 0.9
    needs: ClassVar[frozenset[Need]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 < self.theta <= 1:
            raise ValueError(f"theta must be in (0, 1]; got {self.theta!r}. 1 is SAM.")

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        step = step or Step()
        mean = [widened(g) / step.gradient_scale for g in gradients]
        before = remembered(step.memory, "mean", mean)
        if before is not None:
            mean = [(1 - self.theta) * d + self.theta * g for d, g in zip(before, mean, strict=True)]
        step.memory["mean"] = mean
        return along(mean, self.rho, parameters)
