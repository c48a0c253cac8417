"""SAGE, its ablations, and what it is compared with in its paper: ERM, and noise alone."""

from __future__ import annotations

from hf_sage.ascents import BiasRadius, FrobeniusAscent, SpectralAscent
from hf_sage.corrections import AgreementNoise, LangevinNoise
from hf_sage.methods.base import Method
from hf_sage.polar import PolarPreset


def erm() -> Method:
    """Empirical risk minimisation: the base optimizer and nothing else."""
    return Method("erm")


def sage(
    rho: float = 1e-6,
    gamma: float = 1e-6,
    *,
    polar: PolarPreset = "auto",
    polar_steps: int = 5,
    bias_radius: BiasRadius = "fixed",
    weight_scale: bool = True,
) -> Method:
    """Spectral ascent, and noise that grows with the groups' disagreement (Ballas and Diou 2026).

    The defaults ρ = γ = 1e-6 are the paper's for fine-tuning CLIP (Appendix E.1); smaller networks trained from scratch
    want a ρ several orders larger.
    """
    ascent = SpectralAscent(rho, polar, polar_steps, bias_radius, weight_scale)
    return Method("sage", ascent, (AgreementNoise(gamma),))


def sage_no_polar(rho: float = 1e-6, gamma: float = 1e-6, *, bias_radius: BiasRadius = "fixed") -> Method:
    """SAGE without orthogonalisation: the gradient's own direction in every layer (Ballas and Diou 2026).

    Its counterpart, orthogonalisation in the descent alone, is ERM with Muon for an optimizer: ``method="erm"`` with
    ``optimizer_cls_and_kwargs=hf_sage.trainer.muon.muon(args)``, and ``muon`` in a benchmark.
    """
    return Method("sage_no_polar", FrobeniusAscent(rho, bias_radius), (AgreementNoise(gamma),))


def sage_no_scale(
    rho: float = 1e-6,
    gamma: float = 1e-6,
    *,
    polar: PolarPreset = "auto",
    polar_steps: int = 5,
    bias_radius: BiasRadius = "fixed",
) -> Method:
    """SAGE without weight scaling: ε_W = ρ polar(G), an absolute radius (Ballas and Diou 2026).

    ρ is in units of the weights here: a value that suits SAGE is smaller by ‖W‖_F.
    """
    ascent = SpectralAscent(rho, polar, polar_steps, bias_radius, weight_scale=False)
    return Method("sage_no_scale", ascent, (AgreementNoise(gamma),))


def sage_no_noise(
    rho: float = 1e-6,
    *,
    polar: PolarPreset = "auto",
    polar_steps: int = 5,
    bias_radius: BiasRadius = "fixed",
    weight_scale: bool = True,
) -> Method:
    """SAGE without noise: the spectral ascent alone, which needs no groups (Ballas and Diou 2026)."""
    return Method("sage_no_noise", SpectralAscent(rho, polar, polar_steps, bias_radius, weight_scale))


def gga_l(gamma: float = 1e-3) -> Method:
    """ERM with noise that grows with the groups' disagreement (Ballas and Diou 2025, arXiv 2502.20162).

    γ = 1e-3 is the default of the authors' code. Their instructions speak of uniform noise, their code draws normal
    noise; so does this. Their code averages cosines over all parameters, as SAGE does.
    """
    return Method("gga_l", corrections=(AgreementNoise(gamma),))


def sgld(temperature: float = 1e-12) -> Method:
    """ERM with isotropic noise of constant temperature, Langevin dynamics (Welling and Teh 2011)."""
    return Method("sgld", corrections=(LangevinNoise(temperature),))
