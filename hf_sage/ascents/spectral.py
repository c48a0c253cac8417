"""The ascent of SAGE: every singular direction of a layer's gradient is probed with the same magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.ascents.layerwise import BiasRadius, check_bias_radius, layerwise
from hf_sage.polar import PolarPreset, check_polar, polar_factor
from hf_sage.rules import Step
from hf_sage.vectors import like_shard, whole


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
        check_bias_radius(self.bias_radius)

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        return layerwise(parameters, gradients, self.rho, self._polar, self.bias_radius, self.weight_scale)

    def _polar(self, gradient: Tensor) -> Tensor:
        matrix = whole(gradient).flatten(1)
        return like_shard(polar_factor(matrix, self.polar, self.polar_steps).view(gradient.shape), gradient)
