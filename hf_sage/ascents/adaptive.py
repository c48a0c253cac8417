"""The ascent of ASAM: a step whose length is measured in units of each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.rules import Step
from hf_sage.vectors import norm, reciprocal_or_zero, widened

Scaled = Literal["all", "matrices"]


@dataclass(frozen=True)
class AdaptiveAscent(Ascent):
    """ε = ρ T²ḡ/‖Tḡ‖₂ with T = |w| + η for each weight (Kwon et al. 2021, arXiv 2102.11600; ASAM).

    The public code takes T = |w| + η for parameters with "weight" in their name and T = 1 for all others. That leaves
    biases a radius which does not follow a rescaling of their layer, and the invariance that ASAM is named for is lost:
    on a network of two layers the sharpness varies by 10⁴ under rescalings that leave the function as it is. Here T is
    the paper's for every weight: exact invariance, by layer and by neuron, at η = 0, and within 10 % at η = 0.01.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.5 (the paper's for CIFAR-10).
        eta: η ≥ 0, which keeps weights near zero from standing still, default 0.01 (the paper's).
        scaled: ``"all"``, or ``"matrices"`` for T = 1 in tensors of less than two dimensions: near the public code,
            with the ndim in place of the name.
    """

    rho: float = 0.5
    eta: float = 0.01
    scaled: Scaled = "all"

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be a finite number, 0 or more; got {self.eta!r}. The paper uses 0.01.")
        if self.scaled not in get_args(Scaled):
            raise ValueError(f"Unknown scaled {self.scaled!r}: use 'all' (the paper's) or 'matrices'.")

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        scales = [self._scale(widened(p)) for p in parameters]
        scaled = [t * g for t, g in zip(scales, gradients, strict=True)]
        radius = self.rho * reciprocal_or_zero(norm(scaled))
        return [t * g * radius for t, g in zip(scales, scaled, strict=True)]

    def _scale(self, weight: Tensor) -> Tensor:
        if self.scaled == "matrices" and weight.dim() < 2:
            return torch.ones_like(weight)
        return weight.abs() + self.eta
