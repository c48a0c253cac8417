"""GroupDRO: the worst group is what counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sage.objectives.base import GroupWeights
from hf_sage.rules import Need, Step


@dataclass(frozen=True)
class GroupDRO(GroupWeights):
    """Σ_k q_k ℓ_k with q_k ∝ q_k exp(η ℓ_k) in every step (Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1).

    The weights are remembered by the groups' place in the step, so every step must hold the same groups; where their
    number changes they start anew, at 1/K. Generalisation adjustments of the paper are left out, as in DomainBed.

    Attributes:
        eta: Step size η ≥ 0 of the weights, default 0.01 (DomainBed's ``groupdro_eta``).
    """

    eta: float = 1e-2

    needs = GroupWeights.needs | frozenset[Need]({"memory"})

    def __call__(self, losses: Tensor, weights: Tensor, step: Step) -> Tensor:
        """See `GroupWeights`."""
        q = step.memory.get("q")
        if q is None or len(q) != len(losses):
            q = torch.full_like(losses, 1 / len(losses))
        q = q.to(losses) * torch.exp(self.eta * losses)
        q = q / q.sum()
        step.memory["q"] = q
        return q
