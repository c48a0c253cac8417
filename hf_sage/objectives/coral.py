"""CORAL: features are to have the same mean and covariance in every group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from hf_sage.objectives.base import FeatureObjective, Rows
from hf_sage.rules import Step


@dataclass(frozen=True)
class CORAL(FeatureObjective):
    """Adds γ · mean over pairs of groups of mean (μ_i − μ_j)² + mean (C_i − C_j)².

    Sun & Saenko 2016 (arXiv 1607.01719) match covariances with the factor 1/(4d²); the means, and means over entries in
    place of that factor, are DomainBed's, whose form and default this is. C is the unbiased covariance, zero for a
    group of one row.

    Attributes:
        penalty: γ ≥ 0, default 1 (DomainBed's ``mmd_gamma``).
    """

    penalty: float = 1.0

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`."""
        moments = [_moments(rows.features) for rows in groups.values()]
        distances = [
            (mean_i - mean_j).square().mean() + (covariance_i - covariance_j).square().mean()
            for (mean_i, covariance_i), (mean_j, covariance_j) in combinations(moments, 2)
        ]
        return self.penalty * torch.stack(distances).mean() if distances else moments[0][0].sum() * 0


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    mean = z.mean(0)
    centred = z - mean
    return mean, centred.mT @ centred / max(len(z) - 1, 1)
