"""The correction of GAM: the largest gradient norm nearby is descended beside the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.corrections.base import Correction, Descent
from hf_sage.vectors import along, projection, widened


@dataclass(frozen=True)
class GradientNorm(Correction):
    """The accelerated rule of GAM (Zhang et al. 2023, arXiv 2303.03108, Appendix D), for use after SAM's ascent.

    With g₀ at θ and g₁ at θ + ρ g₀/‖g₀‖, d = g₁ − g₀ ≈ ρ H g₀/‖g₀‖ points to where the gradient's norm is largest:
    g₂ is taken at θ₂ = θ + ρ_n d/‖d‖ and g₃ at θ₂ + ρ g₂/‖g₂‖, so that g₃ − g₂ is the gradient of the norm there. With
    Q = β₁g₁ + β₃g₃ and P = g₀ + β₂g₂ the update is along Q − α(P − proj_Q P). d is a difference of two gradients that
    are almost the same: in less than fp32 it is noise.

    The paper's own rule takes two Hessian-vector products instead. The authors' code takes |β₂| of a β₂ of −1, which is
    the β₂ of 1 here.

    Attributes:
        rho: ρ > 0, that of the ascent, default 0.02 (the authors' code).
        norm_rho: ρ_n ≥ 0, default 0.2 (the authors' code).
        betas: β₁, β₂, β₃, default 1, 1, 1 (the authors' code).
        alpha: The share of P orthogonal to Q that is ascended, default 0.03 (γ in the authors' code).
    """

    rho: float = 0.02
    norm_rho: float = 0.2
    betas: tuple[float, float, float] = (1.0, 1.0, 1.0)
    alpha: float = 0.03
    needs_perturbation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.betas) != 3 or not all(map(math.isfinite, (*self.betas, self.alpha))):
            raise ValueError(f"GAM takes three finite betas and a finite alpha; got {self.betas} and {self.alpha}.")
        if not 0 <= self.norm_rho < math.inf:
            raise ValueError(f"norm_rho must be a finite number, 0 or more; got {self.norm_rho!r}.")

    @property
    def passes(self) -> float:
        """Those of g₂ and g₃."""
        return 2.0

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects in place; see `Correction`."""
        b1, b2, b3 = self.betas
        difference = [widened(g1) - g0 for g1, g0 in zip(gradients, descent.clean, strict=True)]
        outer = along(difference, self.norm_rho, descent.parameters)
        g2 = descent.step.passes.gradient_at(outer)
        inner = along(g2, self.rho, descent.parameters)
        g3 = descent.step.passes.gradient_at([a + b for a, b in zip(outer, inner, strict=True)])
        q = [b1 * widened(a) + b3 * b for a, b in zip(gradients, g3, strict=True)]
        p = [widened(a) + b2 * b for a, b in zip(descent.clean, g2, strict=True)]
        share = projection(p, q)
        for g, a, b in zip(gradients, q, p, strict=True):
            g.copy_(a - self.alpha * (b - share * a))
        return {}
