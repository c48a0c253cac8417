"""IRM: one classifier is to be optimal in every group at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from hf_sage.objectives.base import FeatureObjective, Rows, annealed
from hf_sage.rules import Step


@dataclass(frozen=True)
class IRM(FeatureObjective):
    """Adds λ · mean_k D_k¹ D_k², D being ∂/∂s of the mean cross entropy of logits s·z at s = 1 (IRMv1).

    Arjovsky et al. 2019, arXiv 1907.02893, eq. 4 and Appendix D: the product over two halves of a group's rows is an
    unbiased estimate of the squared norm, and may be negative. The halves are the even and the odd rows, as in
    DomainBed. In closed form ∂/∂s CE(s z, y) at s = 1 is ⟨softmax(z) − onehot(y), z⟩, so no second derivative is taken.
    DomainBed makes the optimizer anew when the penalty sets in; here it keeps its state.

    Attributes:
        penalty: λ ≥ 0, default 100 (DomainBed).
        warmup: Updates with λ = 1 before it sets in, default 500 (DomainBed).
    """

    penalty: float = 100.0
    warmup: int = 500

    delayed_by: ClassVar[str | None] = "warmup"

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`. A group of one row has no second half, and no penalty."""
        penalties = []
        for rows in groups.values():
            logits = head(rows.features)
            error = softmax(logits, dim=-1) - one_hot(rows.labels, logits.shape[-1]).to(logits.dtype)
            slope = (error * logits).sum(-1)
            halves = [half.mean() if len(half) else half.sum() for half in (slope[::2], slope[1::2])]
            penalties.append(halves[0] * halves[1])
        return annealed(self.penalty, self.warmup, step) * torch.stack(penalties).mean()
