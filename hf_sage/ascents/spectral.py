"""The ascent of SAGE: every singular direction of a layer's gradient is probed with the same magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius, like_shard, norms, reciprocal_or_zero, whole
from hf_sage.polar import PolarPreset, check_polar, polar_factor
from hf_sage.rules import Step

BiasRadius = Literal["fixed", "norm"]

NEGLIGIBLE = 1e-6
"""Gradients of less than this share of the whole gradient's norm are round-off and get no perturbation.

Some gradients are zero in exact arithmetic (the key bias of attention, biases before a BatchNorm). Both rules below
ignore the gradient's length, so they would blow that round-off up to a full step, different on every machine.
"""


@dataclass(frozen=True)
class SpectralAscent(Ascent):
    """ε_W = ρ‖W‖_F polar(G) for matrices, ε_b = ρ g/‖g‖₂ for 1-D tensors (Section 3.1 and Algorithm 1, phase 3).

    Tensors of three and more dimensions (convolution kernels) are read as matrices of shape (first, rest), as Muon
    does; 0-dimensional ones as vectors. ‖ε_W‖_F = ρ‖W‖_F √r for rank r: ρ is a *relative* radius per singular
    direction for matrices and an absolute one for vectors. A zero matrix stays where it is.

    Attributes:
        rho: Radius ρ ≥ 0, default 1e-6 (Appendix E.1, CLIP fine-tuning).
        polar: Preset of `hf_sage.polar.polar_factor`.
        polar_steps: Its number of iterations T, default 5 (Section 3.1).
        bias_radius: ``"fixed"``, the paper's rule, or ``"norm"``, ε_b = ρ‖b‖₂ g/‖g‖₂, which makes the claimed
            invariance to rescaling W ↦ αW true for layers with biases too.
        weight_scale: Whether to multiply by ‖W‖_F; without it ε_W = ρ polar(G) (the ablation "No Scaling").
    """

    rho: float = 1e-6
    polar: PolarPreset = "auto"
    polar_steps: int = 5
    bias_radius: BiasRadius = "fixed"
    weight_scale: bool = True

    def __post_init__(self) -> None:
        check_radius(self.rho)
        check_polar(self.polar, self.polar_steps)
        if self.bias_radius not in get_args(BiasRadius):
            raise ValueError(f"Unknown bias_radius {self.bias_radius!r}: use 'fixed' (the paper's) or 'norm'.")

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        lengths = norms(gradients)
        felt = lengths > NEGLIGIBLE * torch.linalg.vector_norm(lengths)
        return [
            self._perturbation(p, g.to(torch.promote_types(p.dtype, torch.float32)), length) * is_felt
            for p, g, length, is_felt in zip(parameters, gradients, lengths, felt, strict=True)
        ]

    def _perturbation(self, parameter: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
        if gradient.dim() >= 2:
            matrix = whole(gradient).flatten(1)
            direction = polar_factor(matrix, self.polar, self.polar_steps).view(gradient.shape)
            direction = like_shard(direction, gradient)
            relative = self.weight_scale
        else:
            direction = gradient * reciprocal_or_zero(length)
            relative = self.bias_radius == "norm"
        radius = self.rho * torch.linalg.vector_norm(parameter, dtype=direction.dtype) if relative else self.rho
        return direction * radius
