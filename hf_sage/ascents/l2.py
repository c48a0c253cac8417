"""The ascent of SAM: a step of length ρ along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.rules import Step
from hf_sage.vectors import along


@dataclass(frozen=True)
class L2Ascent(Ascent):
    """ε = ρ ḡ/‖ḡ‖₂, the norm taken over all parameters (Foret et al. 2021, arXiv 2010.01412, eq. 2).

    Attributes:
        rho: Radius ρ ≥ 0 in units of the parameters, default 0.05 (the paper's). A zero gradient gives ε = 0.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        check_radius(self.rho)

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        return along(gradients, self.rho, parameters)
