"""The polar factor by two Halley steps on the small Gram matrix: the nearest to UVᵀ at the least cost on a CPU.

The dynamically weighted Halley iteration (Nakatsukasa, Bai & Gygi 2010, "Optimizing Halley's iteration for computing
the matrix polar decomposition") maps each singular value by

    x ← x (a + b x²)/(1 + c x²) = x (b/c + (a − b/c)/(1 + c x²)),

with the weights that lift the smallest one furthest; its steps compose to Zolotarev's best rational functions
(Nakatsukasa & Freund 2016). Here all of it happens in Y = GGᵀ, on the smaller side of G: X = h(Y) G has the Gram matrix
Y h(Y)². So G itself is needed twice, at the beginning and at the end, and in between are two inverses by Cholesky.

The inverses are those of matrices whose condition number is below 2e4: they do not fail in fp32, whatever the rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-3
"""The two steps map singular values from here to 1 into [0.962, 1], smaller ones to 1672 times their size at most.

It is where Polar Express starts, too. A Gram matrix in fp32 knows singular values down to 3e-4 of the largest only.
"""

SMALL = 128
"""Up to so many rows (or columns) a CPU computes in fp64: there it costs little, and fp32 input is followed to 1e-6.

In fp32 the square in the Gram matrix enlarges round-off, to 1e-4 of the result where the gradient has a low rank.
"""

BLOCK = 192
"""Rows of a symmetric product that are computed at once: at 768 rows this saves a fifth to a third of the time."""


def _dynamic_weights(smallest: float, steps: int) -> list[tuple[float, float, float]]:
    """The weights (a, b, c) of each step, for singular values from ``smallest`` to 1."""
    weights = []
    for _ in range(steps):
        s = smallest**2
        d = (4 * (1 - s) / s**2) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - s) / (s * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        weights.append((a, b, c))
        smallest *= (a + b * s) / (1 + c * s)
    return weights


_WEIGHTS = _dynamic_weights(SMALLEST, steps=2)


def halley(x: Tensor) -> Tensor:
    """Applies two Halley steps to the singular values of x/‖xxᵀ‖_F^½.

    Args:
        x: Matrices of shape ``(..., m, n)``, fp32 or fp64, whose largest entries are near one: squares must neither
            overflow nor vanish.

    Returns:
        A tensor of the same shape and dtype; zero where ``x`` is zero.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and min(x.shape[-2:]) <= SMALL:
        return halley(x.double()).to(x.dtype)
    wide = x.shape[-2] <= x.shape[-1]
    gram = _symmetric_product(x, x.mT) if wide else _symmetric_product(x.mT, x)
    # Between the largest squared singular value and √rank times that: no singular value is above one.
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    gram.div_(norm)

    (a, b, c), second = _WEIGHTS
    constant, slope = b / c, a - b / c
    inverse = _inverse(gram, c)
    # Y h² = Y (b/c)² + 2 (b/c)(a − b/c) YZ + (a − b/c)² YZ², where YZ = (I − Z)/c
    gram.mul_(constant**2).sub_(_symmetric_product(inverse, inverse), alpha=slope**2 / c)
    gram.add_(inverse, alpha=slope * (slope - 2 * constant) / c)
    _plus_identity(gram, 2 * constant * slope / c)
    first_step = _plus_identity(inverse.mul_(slope), constant)

    a, b, c = second
    second_step = _plus_identity(_inverse(gram, c).mul_(a - b / c), b / c)
    factor = _symmetric_product(first_step, second_step).div_(norm.sqrt())
    return factor @ x if wide else x @ factor


def _inverse(y: Tensor, c: float) -> Tensor:
    """(I + cY)⁻¹, for Y positive semi-definite up to round-off."""
    cholesky, _ = torch.linalg.cholesky_ex(_plus_identity(c * y, 1.0))
    return torch.cholesky_inverse(cholesky).mT  # symmetric to the bit; transposed it lies by rows, as the others do


def _plus_identity(y: Tensor, scale: float) -> Tensor:
    """Adds ``scale`` times the identity in place."""
    y.diagonal(dim1=-2, dim2=-1).add_(scale)
    return y


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """A @ B, known to be symmetric: the lower half by blocks of rows, the upper half copied from there."""
    n = a.shape[-2]
    product = a.new_empty(*a.shape[:-1], n)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        product[..., start:end, :end] = a[..., start:end, :] @ b[..., :, :end]
        product[..., :start, start:end] = product[..., start:end, :start].mT
    return product
