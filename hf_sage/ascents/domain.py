"""The ascent of DISAM: groups that have a low loss are perturbed the more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from hf_sage.ascents.l2 import L2Ascent
from hf_sage.rules import Need

Variance = Literal["groups", "samples"]


@dataclass(frozen=True)
class DomainAscent(L2Ascent):
    """SAM's ascent on ℓ − λ Var_k(ℓ_k) (Zhang et al. 2024, arXiv 2405.18861; DISAM).

    The second gradient is that of ℓ alone. The gradient of the ascent's loss is Σ_k [w_k − (2λ/K)(ℓ_k − ℓ̄)] g_k, made
    of the groups' gradients without a further pass.

    The public code builds its list of domains by ``set()`` on a tensor, whose elements are all different: its variance
    is one over samples, Σ_k w_k (ℓ_k − ℓ)², not over domains. Both are the same where all groups have as many rows.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.05 (the authors' instructions).
        variance_weight: λ ≥ 0 in units of 1/loss, default 0.1 (the authors' instructions).
        variance: ``"groups"``, the paper's, or ``"samples"``, the public code's.
    """

    variance_weight: float = 0.1
    variance: Variance = "groups"
    needs: ClassVar[frozenset[Need]] = frozenset({"groups"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.variance_weight < math.inf:
            raise ValueError(f"variance_weight must be a finite number, 0 or more; got {self.variance_weight!r}.")
        if self.variance not in get_args(Variance):
            raise ValueError(f"Unknown variance {self.variance!r}: use 'groups' (the paper's) or 'samples'.")

    def group_weights(self, losses: Tensor, weights: Tensor) -> Tensor:
        """∂/∂ℓ_k of ℓ − λ Var(ℓ_k); see `Ascent`."""
        shares = weights if self.variance == "samples" else (weights > 0) / (weights > 0).sum()
        deviations = losses - (shares * losses).sum()
        return weights - 2 * self.variance_weight * shares * deviations
