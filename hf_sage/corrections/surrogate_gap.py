"""The correction of GSAM: the surrogate gap is closed without moving against the perturbed loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.corrections.base import Correction, Descent
from hf_sage.vectors import projection, widened


@dataclass(frozen=True)
class SurrogateGap(Correction):
    """g ← g_p − α(g − proj_{g_p} g) (Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1; GSAM).

    What of the clean gradient g is orthogonal to the perturbed one g_p raises ℓ_p − ℓ alone; it is ascended. The paper
    also lets ρ follow the learning rate; here ρ is constant, which is that schedule at ρ_min = ρ_max.

    Attributes:
        alpha: α ≥ 0, default 0.4 (the authors' code).
    """

    alpha: float = 0.4
    needs_perturbation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number, 0 or more; got {self.alpha!r}. 0 is SAM.")

    @property
    def is_null(self) -> bool:
        """Whether α is zero."""
        return self.alpha == 0

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects in place; see `Correction`."""
        along = projection(descent.clean, gradients)
        for g_p, g in zip(gradients, descent.clean, strict=True):
            wide = widened(g_p)
            g_p.copy_(wide - self.alpha * (g - along * wide))
        return {}
