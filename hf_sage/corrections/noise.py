"""The noise of SAGE: isotropic, and larger where the groups' gradients disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sage.agreement import noise_scale
from hf_sage.corrections.base import Correction, Descent
from hf_sage.rules import Need
from hf_sage.vectors import normal_like


@dataclass(frozen=True)
class AgreementNoise(Correction):
    """g ← g + β ξ with β = γ(1 − S) and ξ ~ N(0, I) over every parameter (Section 3.2; Algorithm 1, line 29).

    Added after clipping, so that the clip neither shrinks the noise nor counts it.

    Attributes:
        gamma: γ ≥ 0, an absolute scale in units of the gradient, default 1e-6 (Appendix E.1, CLIP fine-tuning). It
            depends on how the loss is reduced.
    """

    gamma: float = 1e-6
    needs: ClassVar[frozenset[Need]] = frozenset({"groups"})  # S is logged even where γ is zero
    after_clipping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        noise_scale(1.0, self.gamma)  # refuses a bad γ

    @property
    def is_null(self) -> bool:
        """Whether γ is zero."""
        return self.gamma == 0

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Adds the noise in place and reports β as ``noise_scale``; see `Correction`."""
        beta = noise_scale(descent.agreement, self.gamma)
        if not self.is_null:
            add_noise(gradients, beta, descent.step.seed)
        return {"noise_scale": beta}


def add_noise(gradients: Sequence[Tensor], scale: Tensor | float, seed: int) -> None:
    """Adds scale × ξ in place, ξ ~ N(0, I), rounded to the gradient's dtype first."""
    scale = torch.as_tensor(scale, dtype=torch.float64)
    for g, noise in zip(gradients, normal_like(gradients, seed), strict=True):
        g.add_((noise * scale.to(noise.device, noise.dtype)).to(g.dtype))
