"""MMD: features are to have the same distribution in every group, as far as Gaussian kernels tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from hf_sage.objectives.base import FeatureObjective, Rows
from hf_sage.rules import Step


@dataclass(frozen=True)
class MMD(FeatureObjective):
    """Adds γ · mean over pairs of groups of the squared maximum mean discrepancy.

    Li et al. 2018 ("Domain Generalization with Adversarial Feature Learning"), as DomainBed simplifies it: the kernel
    is Σ_b exp(−b‖x − y‖²) over seven bandwidths, and the estimate the biased one, with the diagonal, so that it is
    never negative.

    Attributes:
        penalty: γ ≥ 0, default 1 (DomainBed's ``mmd_gamma``).
    """

    penalty: float = 1.0

    BANDWIDTHS: ClassVar[tuple[float, ...]] = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`."""
        features = [rows.features for rows in groups.values()]
        own = [self._kernel(z, z) for z in features]
        distances = [
            own[i] + own[j] - 2 * self._kernel(features[i], features[j])
            for i, j in combinations(range(len(features)), 2)
        ]
        return self.penalty * torch.stack(distances).mean() if distances else features[0].sum() * 0

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of the kernel over all pairs of rows."""
        # By differences: ‖x‖² + ‖y‖² − 2⟨x, y⟩ loses in fp32 what the narrow kernels see.
        distance = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
        return torch.stack([torch.exp(-b * distance).mean() for b in self.BANDWIDTHS]).sum()
