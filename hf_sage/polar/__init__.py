"""The polar factor of a matrix, by matrix products alone or exactly.

For G = U Σ Vᵀ the polar factor is UVᵀ: the singular vectors kept, every singular value set to one. It is the steepest
ascent direction under the spectral norm, and ⟨G, UVᵀ⟩ is the nuclear norm of G. SAGE perturbs each weight matrix along
the polar factor of its gradient (Section 3.1 of the paper).

All presets but ``"svd"`` apply odd polynomials to the singular values of G/‖G‖_F, so each of them computes *some*
factor U p(Σ) Vᵀ with p(σ) near one. How near depends on how small σ/‖G‖_F is: a flat spectrum of rank r sits at r^-1/2,
and decaying spectra reach far below. At five steps ``"polar_express"`` stays within 13 % of one down to σ/‖G‖_F = 0.01
and ``"muon"`` within 32 %, while ``"cubic"`` (eq. 7) returns 0.27 UVᵀ for a flat spectrum of rank 768. A radius found
with one preset therefore does not carry over to another.

This module needs torch alone.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["PRESETS", "PolarPreset", "polar_factor"]

PolarPreset = Literal["auto", "polar_express", "muon", "cubic", "svd"]

PRESETS: tuple[str, ...] = get_args(PolarPreset)
"""The presets that ``polar_factor`` knows."""

Quintic = tuple[float, float, float]
"""Coefficients (a, b, c) of the odd polynomial p(x) = a x + b x³ + c x⁵."""

_CUBIC: Quintic = (1.5, -0.5, 0.0)
"""Eq. 7 of the SAGE paper: X ← ½ X (3I − XᵀX)."""

_MUON: Quintic = (3.4445, -4.7750, 2.0315)
"""Newton–Schulz quintic of Muon (Jordan et al. 2024), which Algorithm 1 calls ``NewtonSchulz5``."""

_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""Minimax-optimal quintics of Polar Express (Amsel et al. 2025, arXiv 2505.16932) for singular values in [1e-3, 1]."""

_POLAR_EXPRESS_LIMIT: Quintic = (1.875, -1.25, 0.375)
"""What the minimax quintics tend to: the Padé-type Newton–Schulz quintic."""

_POLAR_EXPRESS_SAFETY = 1.01
"""Polar Express' margin against round-off pushing a singular value above one, where the quintics diverge."""


def polar_factor(g: Tensor, preset: PolarPreset | str = "auto", steps: int = 5) -> Tensor:
    """Approximates the polar factor UVᵀ of each matrix of a stack.

    The result does not depend on the scale of ``g``, is zero where ``g`` is zero, and commutes with rotations:
    ``polar(Q g R) = Q polar(g) R``.

    Args:
        g: Matrices of shape ``(..., m, n)``, any of m < n, m = n, m > n, of a floating dtype. Convolution kernels are
            flattened to two dimensions by the caller.
        preset: ``"polar_express"`` (minimax quintics), ``"muon"`` (the quintic of Algorithm 1), ``"cubic"`` (eq. 7),
            ``"svd"`` (exact up to round-off), or ``"auto"``, the nearest to UVᵀ at the least cost on the device at
            hand: today ``"polar_express"`` everywhere.
        steps: Number of iterations, at least 1; the paper's T, 5 by default. ``"svd"`` does not iterate.

    Returns:
        A tensor of the shape and dtype of ``g``. Half-precision input is computed in fp32: in bf16 the quintics lift
        round-off on null directions to half the size of the signal.

    Raises:
        ValueError: If ``preset`` is unknown, ``steps`` is below 1, or ``g`` is no floating-point matrix.
    """
    check_polar(preset, steps)
    if not g.is_floating_point():
        raise ValueError(f"The polar factor is computed for real floating-point matrices; got {g.dtype}.")
    if g.dim() < 2:
        raise ValueError(
            f"The polar factor is defined for matrices (..., m, n); got a tensor of shape {tuple(g.shape)}. "
            "Give 1-D tensors an L2 step instead, and flatten convolution kernels with `flatten(1)`."
        )
    if g.numel() == 0:
        return g.clone()
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # iterate on the smaller side: the Gram matrix x xᵀ is then the small one
    x = _normalized(x)
    x = _exact(x) if preset == "svd" else _iterate(x, preset, steps)
    return (x if wide else x.mT).to(g.dtype)


def check_polar(preset: str, steps: int) -> None:
    """Raises a ValueError unless the preset is known and the steps are a whole number, 1 or more."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown polar preset {preset!r}: use one of {', '.join(map(repr, PRESETS))}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"polar_steps must be a whole number, 1 or more; got {steps!r}. The paper uses 5.")


def _normalized(x: Tensor) -> Tensor:
    """Divides each matrix by its Frobenius norm; zero stays zero."""
    # The largest entry first: squares of fp16-scaled or vanishing gradients would leave the range.
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _iterate(x: Tensor, preset: str, steps: int) -> Tensor:
    """Applies ``steps`` odd polynomials to the singular values of wide matrices of Frobenius norm one."""
    for a, b, c in _schedule(preset, steps):
        gram = x @ x.mT
        polynomial = b * gram + c * (gram @ gram) if c else b * gram
        x = a * x + polynomial @ x
    return x


def _schedule(preset: str, steps: int) -> list[Quintic]:
    """The polynomials of a preset; those of Polar Express but the limiting one composed with a slight shrinkage."""
    if preset == "cubic":
        return [_CUBIC] * steps
    if preset == "muon":
        return [_MUON] * steps
    s = _POLAR_EXPRESS_SAFETY
    safe = [(a / s, b / s**3, c / s**5) for a, b, c in _POLAR_EXPRESS[:steps]]
    return safe + [_POLAR_EXPRESS_LIMIT] * (steps - len(safe))


def _exact(x: Tensor) -> Tensor:
    """UVᵀ by the SVD, with directions below round-off left at zero instead of an arbitrary unit vector."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    threshold = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    factor: Tensor = (u * (s > threshold).unsqueeze(-2)) @ vh
    return factor
