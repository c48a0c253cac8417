"""The polar factor of a matrix, near enough at little cost or exactly.

For G = U Σ Vᵀ the polar factor is UVᵀ: the singular vectors kept, every singular value set to one. It is the steepest
ascent direction under the spectral norm, and ⟨G, UVᵀ⟩ is the nuclear norm of G. SAGE perturbs each weight matrix along
the polar factor of its gradient (Section 3.1 of the paper).

All presets but ``"svd"`` apply an odd function to the singular values of the normalised G, so each of them computes
*some* factor U p(Σ) Vᵀ with p(σ) near one. How near depends on how small σ/‖G‖_F is: a flat spectrum of rank r sits at
r^-1/2, and decaying spectra reach far below. Down to σ/‖G‖_F = 0.01, ``"halley"`` stays within 4 % of one and at five
steps ``"polar_express"`` within 13 % and ``"muon"`` within 32 %, while ``"cubic"`` (eq. 7) returns 0.27 UVᵀ for a flat
spectrum of rank 768. A radius found with one preset therefore does not carry over to another.

This package needs torch alone.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sage.polar.halley import halley
from hf_sage.polar.polynomials import iterate

__all__ = ["PRESETS", "PolarPreset", "polar_factor"]

PolarPreset = Literal["auto", "halley", "polar_express", "muon", "cubic", "svd"]

PRESETS: tuple[str, ...] = get_args(PolarPreset)
"""The presets that ``polar_factor`` knows."""


def polar_factor(g: Tensor, preset: PolarPreset | str = "auto", steps: int = 5) -> Tensor:
    """Approximates the polar factor UVᵀ of each matrix of a stack.

    The result does not depend on the scale of ``g``, is zero where ``g`` is zero, and commutes with rotations:
    ``polar(Q g R) = Q polar(g) R``.

    Args:
        g: Matrices of shape ``(..., m, n)``, any of m < n, m = n, m > n, of a floating dtype. Convolution kernels are
            flattened to two dimensions by the caller.
        preset: ``"halley"`` (two rational steps), ``"polar_express"`` (minimax quintics), ``"muon"`` (the quintic of
            Algorithm 1), ``"cubic"`` (eq. 7), ``"svd"`` (exact up to round-off), or ``"auto"``, the nearest to UVᵀ at
            the least cost on the device at hand: ``"halley"`` on a CPU, and elsewhere ``"polar_express"``, which
            consists of matrix products alone.
        steps: Number of polynomials, at least 1; the paper's T, 5 by default. ``"halley"`` always takes two steps of
            its own and ``"svd"`` none: they ignore it.

    Returns:
        A contiguous tensor of the shape and dtype of ``g``. Half-precision input is computed in fp32: in bf16 the
        quintics lift round-off on null directions to half the size of the signal.

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
    if preset == "auto":
        preset = "halley" if g.device.type == "cpu" else "polar_express"
    x = _bounded(g.to(torch.promote_types(g.dtype, torch.float32)))
    if preset == "halley":
        return halley(x).to(g.dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = _normalized(x if wide else x.mT)  # on the smaller side: the Gram matrix x xᵀ is then the small one
    x = _exact(x) if preset == "svd" else iterate(x, preset, steps)
    return (x if wide else x.mT).to(g.dtype).contiguous()


def check_polar(preset: str, steps: int) -> None:
    """Raises a ValueError unless the preset is known and the steps are a whole number, 1 or more."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown polar preset {preset!r}: use one of {', '.join(map(repr, PRESETS))}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"polar_steps must be a whole number, 1 or more; got {steps!r}. The paper uses 5.")


def _bounded(x: Tensor) -> Tensor:
    """Divides each matrix by its largest entry: squares of vanishing or huge gradients would leave the range."""
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    return x / torch.where(largest > 0, largest, torch.ones_like(largest))


def _normalized(x: Tensor) -> Tensor:
    """Divides each matrix by its Frobenius norm; zero stays zero."""
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _exact(x: Tensor) -> Tensor:
    """UVᵀ by the SVD, with directions below round-off left at zero instead of an arbitrary unit vector."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    threshold = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    factor: Tensor = (u * (s > threshold).unsqueeze(-2)) @ vh
    return factor
