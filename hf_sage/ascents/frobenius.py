"""SAGE's ascent without the polar factor: the gradient itself in every layer, the radius still the layer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.ascents.layerwise import BiasRadius, check_bias_radius, layerwise
from hf_sage.rules import Step
from hf_sage.vectors import unit


@dataclass(frozen=True)
class FrobeniusAscent(Ascent):
    """ε_W = ρ‖W‖_F G/‖G‖_F, ε_b = ρ g/‖g‖₂: the ablation "No Newton-Schulz" of SAGE (Section 5.3, Figure 3).

    The paper says that the gradient is not orthogonalised and no more; the radius ρ‖W‖_F and the rule for vectors are
    kept, so that the direction is all that differs. ‖ε_W‖_F is √r times smaller than SAGE's for gradients of rank r.

    Attributes:
        rho: Radius ρ ≥ 0 relative to ‖W‖_F, default SAGE's 1e-6.
        bias_radius: See `hf_sage.ascents.SpectralAscent`.
    """

    rho: float = 1e-6
    bias_radius: BiasRadius = "fixed"

    def __post_init__(self) -> None:
        check_radius(self.rho)
        check_bias_radius(self.bias_radius)

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        return layerwise(parameters, gradients, self.rho, _normalized, self.bias_radius)


def _normalized(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [unit([gradient])[0] for gradient in gradients]
