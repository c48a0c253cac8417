"""The ascent of Eigen-SAM: SAM's, turned towards the leading eigenvector of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.curvature import LeadingEigenvector
from hf_sage.rules import Need, Step
from hf_sage.vectors import inner, unit


@dataclass(frozen=True)
class EigenAscent(Ascent):
    """ε = ρ(ĝ + α sign⟨ĝ, v⟩ v_⊥), ĝ = ḡ/‖ḡ‖, v_⊥ = v − ⟨v, ĝ⟩ĝ (Luo et al. 2024, arXiv 2501.12666; Eigen-SAM).

    v is the leading eigenvector of the Hessian; its sign does not matter. ‖ε‖ is up to ρ√(1 + α²): it is not scaled
    back to ρ. The public code's power iteration finds the eigenvalue of largest magnitude, which may be negative, and
    begins with update 100; here it is the largest, from the first update.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.05 (SAM's).
        alpha: α ≥ 0, default 0.2 (the authors' code).
        interval: The eigenvector is refreshed in every so-manieth update, default 100 (the authors' code).
        iterations: Products with the Hessian a refresh, default 5 (the authors' code).
    """

    rho: float = 0.05
    alpha: float = 0.2
    interval: int = 100
    iterations: int = 5
    needs: ClassVar[frozenset[Need]] = frozenset({"curvature", "memory"})

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number, 0 or more; got {self.alpha!r}.")
        self._eigenvector()  # refuses bad numbers

    @property
    def hessian_products(self) -> float:
        """Those of the power iteration."""
        return self._eigenvector().hessian_products

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        g, v = unit(gradients), self._eigenvector()(gradients, step or Step())
        parallel = inner(g, v)
        towards = self.alpha * parallel.sign()
        along, across = self.rho * (1 - towards * parallel), self.rho * towards
        return [along * a + across * b for a, b in zip(g, v, strict=True)]

    def _eigenvector(self) -> LeadingEigenvector:
        return LeadingEigenvector(self.interval, self.iterations)
