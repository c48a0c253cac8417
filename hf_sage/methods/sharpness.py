"""Sharpness-aware minimisation and its descendants."""

from __future__ import annotations

from hf_sage.ascents import (
    AdaptiveAscent,
    AlignAscent,
    DomainAscent,
    EigenAscent,
    FriendlyAscent,
    L2Ascent,
    MatchingAscent,
    VarianceSuppressedAscent,
)
from hf_sage.ascents.adaptive import Scaled
from hf_sage.ascents.domain import Variance
from hf_sage.corrections import (
    EigenvectorCorrection,
    GradientNorm,
    MeanOfGradients,
    ReusedDirection,
    SurrogateGap,
)
from hf_sage.corrections.eigenvector import Variant
from hf_sage.methods.base import Method


def sam(rho: float = 0.05) -> Method:
    """The gradient a step of length ρ uphill (Foret et al. 2021, arXiv 2010.01412).

    ρ = 0.05 is its paper's default.
    """
    return Method("sam", L2Ascent(rho))


def asam(rho: float = 0.5, eta: float = 0.01, scaled: Scaled = "all") -> Method:
    """SAM with a radius in units of each weight (Kwon et al. 2021, arXiv 2102.11600)."""
    return Method("asam", AdaptiveAscent(rho, eta, scaled))


def gsam(rho: float = 0.05, alpha: float = 0.4) -> Method:
    """SAM that also closes the surrogate gap (Zhuang et al. 2022, arXiv 2203.08065)."""
    return Method("gsam", L2Ascent(rho), (SurrogateGap(alpha),))


def gam(rho: float = 0.02, norm_rho: float = 0.2, alpha: float = 0.03) -> Method:
    """SAM that also descends the largest gradient norm nearby (Zhang et al. 2023, arXiv 2303.03108)."""
    return Method("gam", L2Ascent(rho), (GradientNorm(rho, norm_rho, alpha=alpha),))


def sagm(rho: float = 0.05, alpha: float = 1e-3) -> Method:
    """Clean and perturbed gradient, pulled into one direction (Wang et al. 2023, arXiv 2303.10353)."""
    return Method("sagm", MatchingAscent(rho, alpha), (MeanOfGradients(),))


def disam(rho: float = 0.05, variance_weight: float = 0.1, variance: Variance = "groups") -> Method:
    """SAM that perturbs groups of low loss the more (Zhang et al. 2024, arXiv 2405.18861)."""
    return Method("disam", DomainAscent(rho, variance_weight, variance))


def friendly_sam(rho: float = 0.2, decay: float = 0.6, sigma: float = 1.0) -> Method:
    """SAM along what sets the batch's gradient apart from those before it (Li et al. 2024, arXiv 2403.12350)."""
    return Method("friendly_sam", FriendlyAscent(rho, decay, sigma))


def look_sam(rho: float = 0.05, alpha: float = 0.7, interval: int = 5) -> Method:
    """SAM in every fifth update, its effect reused in between (Liu et al. 2022, arXiv 2203.02714)."""
    return Method("look_sam", L2Ascent(rho), (ReusedDirection(alpha),), ascent_interval=interval)


def vasso(rho: float = 0.05, theta: float = 0.9) -> Method:
    """SAM along a running mean of the gradients (Li and Giannakis 2023, arXiv 2309.15639)."""
    return Method("vasso", VarianceSuppressedAscent(rho, theta))


def align_sam(rho: float = 0.05, trade_off: float = 2.0, look_back_interval: int = 100) -> Method:
    """Up on the batch, down on an auxiliary one drawn independently (Align-SAM, under review)."""
    return Method("align_sam", AlignAscent(rho, trade_off, None, look_back_interval))


def align_asam(rho: float = 0.5, trade_off: float = 2.0, eta: float = 0.01, look_back_interval: int = 100) -> Method:
    """Align-SAM with a radius in units of each weight (Align-SAM, under review)."""
    return Method("align_asam", AlignAscent(rho, trade_off, eta, look_back_interval))


def x_sam(
    rho: float = 0.05, alpha: float = 0.2, interval: int = 3, iterations: int = 5, variant: Variant = "invariant"
) -> Method:
    """SAM less a part of the gradient along the Hessian's leading eigenvector (Duan et al. 2026, arXiv 2601.10251)."""
    return Method("x_sam", L2Ascent(rho), (EigenvectorCorrection(alpha, interval, iterations, variant),))


def eigen_sam(rho: float = 0.05, alpha: float = 0.2, interval: int = 100, iterations: int = 5) -> Method:
    """SAM turned towards the Hessian's leading eigenvector (Luo et al. 2024, arXiv 2501.12666)."""
    return Method("eigen_sam", EigenAscent(rho, alpha, interval, iterations))
