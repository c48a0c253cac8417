"""The correction of X-SAM: the gradient loses some of its part along the leading eigenvector of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from hf_sage.corrections.base import Correction, Descent
from hf_sage.curvature import LeadingEigenvector
from hf_sage.rules import Need
from hf_sage.vectors import inner, norm, reciprocal_or_zero, widened

Variant = Literal["invariant", "literal"]


@dataclass(frozen=True)
class EigenvectorCorrection(Correction):
    """g ← g_p − α⟨g_p, v⟩v, v the leading eigenvector of the Hessian at θ (Duan et al. 2026, arXiv 2601.10251; X-SAM).

    α = 0 is SAM, 1 removes the part along v, 2 reflects it. The rule as it is summarised in public,
    g_p/‖g_p‖ − α sign⟨g_p, v⟩⟨g_p, v⟩v, changes with the sign of v, which an eigenvector does not have, and subtracts a
    part of the gradient from a vector of length one. With v's sign such that ⟨g_p, v⟩ ≥ 0 and one scale for both terms
    it is the rule above. No code of the authors was found.

    Attributes:
        alpha: α in [0, 2], default 0.2 (the authors' instructions).
        interval: The eigenvector is refreshed in every so-manieth update, default 3 (the authors' instructions).
        iterations: Products with the Hessian a refresh, default 5 (Eigen-SAM's, which X-SAM builds on).
        variant: ``"invariant"``, or ``"literal"`` for the formula as summarised.
    """

    alpha: float = 0.2
    interval: int = 3
    iterations: int = 5
    variant: Variant = "invariant"
    needs: ClassVar[frozenset[Need]] = frozenset({"curvature", "memory"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 2:
            raise ValueError(f"alpha must be in [0, 2]; got {self.alpha!r}. 0 is SAM, 1 removes the part along v.")
        if self.variant not in get_args(Variant):
            raise ValueError(f"Unknown variant {self.variant!r}: use 'invariant' or 'literal'.")
        self._eigenvector()  # refuses bad numbers

    @property
    def is_null(self) -> bool:
        """Whether α is zero."""
        return self.alpha == 0 and self.variant == "invariant"

    @property
    def hessian_products(self) -> float:
        """Those of the power iteration."""
        return self._eigenvector().hessian_products

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects in place; see `Correction`."""
        v = self._eigenvector()(gradients, descent.step)
        parallel = inner(gradients, v)
        along, scale = parallel, torch.ones_like(parallel)
        if self.variant == "literal":
            loss_scale = descent.step.gradient_scale  # the formula is one of the gradient without it
            along, scale = parallel.abs(), loss_scale * reciprocal_or_zero(norm(gradients))
        for g, t in zip(gradients, v, strict=True):
            g.copy_(widened(g) * scale - self.alpha * along * t)
        return {}

    def _eigenvector(self) -> LeadingEigenvector:
        return LeadingEigenvector(self.interval, self.iterations)
