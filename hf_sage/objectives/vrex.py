"""V-REx: risks are to be equal over the groups, not only low on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.objectives.base import GroupWeights, annealed
from hf_sage.rules import Step


@dataclass(frozen=True)
class VREx(GroupWeights):
    """Σ_k w_k ℓ_k + λ Var_k ℓ_k (Krueger et al. 2021, arXiv 2003.00688, eq. 8), Var being the mean squared deviation.

    Its gradient by ℓ_k is w_k + 2λ(ℓ_k − ℓ̄)/K. DomainBed makes the optimizer anew when the penalty sets in; here it
    keeps its state, so that a schedule and a checkpoint mean what they say.

    Attributes:
        penalty: λ ≥ 0, default 10 (DomainBed).
        warmup: Updates with λ = 1 before it sets in, default 500 (DomainBed).
    """

    penalty: float = 10.0
    warmup: int = 500

    delayed_by: ClassVar[str | None] = "warmup"

    def __call__(self, losses: Tensor, weights: Tensor, step: Step) -> Tensor:
        """See `GroupWeights`."""
        scale = annealed(self.penalty, self.warmup, step)
        return weights + 2 * scale * (losses - losses.mean()) / len(losses)
