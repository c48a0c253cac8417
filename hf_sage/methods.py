"""Methods: an ascent and a chain of corrections under a name.

A method of one's own needs no registration: build a `Method` and pass it as ``SAGEConfig(method=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_sage.ascents import Ascent, BiasRadius, L2Ascent, SpectralAscent
from hf_sage.corrections import AgreementNoise, Correction
from hf_sage.polar import PolarPreset

__all__ = ["METHODS", "Method", "erm", "sage", "sam"]


@dataclass(frozen=True)
class Method:
    """A rule for one update: where the second gradient is taken, and what is done to it.

    Attributes:
        name: What tables and logs call it.
        ascent: Rule for ε, or ``None`` for no second pass.
        corrections: Rules applied to the clipped gradient, in order.
    """

    name: str
    ascent: Ascent | None = None
    corrections: tuple[Correction, ...] = ()

    @property
    def perturbs(self) -> bool:
        """Whether a second pass at θ + ε is due."""
        return self.ascent is not None and self.ascent.rho > 0

    @property
    def needs_groups(self) -> bool:
        """Whether the gradient of each group is needed."""
        return any(correction.needs_groups for correction in self.corrections)

    @property
    def is_plain(self) -> bool:
        """Whether the update is that of the base optimizer alone (law 1)."""
        return not self.perturbs and all(correction.is_null for correction in self.corrections)


def erm() -> Method:
    """Empirical risk minimisation: the base optimizer and nothing else."""
    return Method("erm")


def sam(rho: float = 0.05) -> Method:
    """Sharpness-aware minimisation (Foret et al. 2021); ρ = 0.05 is its paper's default."""
    return Method("sam", L2Ascent(rho))


def sage(
    rho: float = 1e-6,
    gamma: float = 1e-6,
    *,
    polar: PolarPreset = "auto",
    polar_steps: int = 5,
    bias_radius: BiasRadius = "fixed",
    weight_scale: bool = True,
) -> Method:
    """SAGE (Ballas and Diou 2026): spectral ascent, and noise that grows with the groups' disagreement.

    The defaults ρ = γ = 1e-6 are the paper's for fine-tuning CLIP (Appendix E.1); smaller networks trained from scratch
    want a ρ several orders larger.
    """
    ascent = SpectralAscent(rho, polar, polar_steps, bias_radius, weight_scale)
    return Method("sage", ascent, (AgreementNoise(gamma),))


METHODS: dict[str, Callable[..., Method]] = {"sage": sage, "sam": sam, "erm": erm}
"""The methods that ``SAGEConfig(method="...")`` knows by name."""
