"""The ascent of SAGM: SAM's, less a step of descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.rules import Step
from hf_sage.vectors import along


@dataclass(frozen=True)
class MatchingAscent(Ascent):
    """ε = ρ ḡ/‖ḡ‖₂ − α ḡ (Wang et al. 2023, arXiv 2303.10353; SAGM).

    The gradient at θ + ε minimises ℓ_p(θ − αḡ) ≈ ℓ_p(θ) − α⟨∇ℓ_p, ḡ⟩: the two gradients are pulled into one direction.
    What of it is descended is `hf_sage.corrections.MeanOfGradients`.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.05 (the paper's). At ρ = 0 nothing is perturbed, whatever α.
        alpha: α ≥ 0, a step size in units of parameters by gradient, default 1e-3 (the authors' code).
    """

    rho: float = 0.05
    alpha: float = 1e-3

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number, 0 or more; got {self.alpha!r}.")

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        descent = self.alpha / (step or Step()).gradient_scale
        epsilon = along(gradients, self.rho, parameters)
        return [e.sub_(g.to(e.dtype), alpha=descent) for e, g in zip(epsilon, gradients, strict=True)]
