"""The polar factor by odd polynomials of the singular values: matrix products alone, which is what a GPU does best."""

from __future__ import annotations

from torch import Tensor

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

_WIDE = 1.5
"""Sides of this ratio and up make the small Gram matrix the cheaper place to iterate in.

For n × rn matrices and five quintics the products are 20 r + 10 (in units of n³) with G, 4 r + 34 with GGᵀ.
"""

_SMALL = 128
"""Matrices of so few rows are iterated directly: little is saved, and a Gram matrix' square enlarges round-off."""

_GRAM_STEPS = 5
"""Polynomials applied to one Gram matrix, before that of the result is taken anew.

Round-off makes null eigenvalues negative. Each polynomial enlarges them by the square of its slope: five of them leave
them below 0.1, further ones would drive them to −∞.
"""


def iterate(x: Tensor, preset: str, steps: int) -> Tensor:
    """Applies ``steps`` odd polynomials to the singular values of matrices of Frobenius norm one.

    Args:
        x: Matrices of shape ``(..., m, n)``, m ≤ n.
        preset: ``"polar_express"``, ``"muon"`` or ``"cubic"``.
        steps: Number of polynomials, at least 1.

    Returns:
        A tensor of the same shape.
    """
    schedule = _schedule(preset, steps)
    if x.shape[-2] <= _SMALL or x.shape[-1] < _WIDE * x.shape[-2]:
        for coefficients in schedule:
            x = _even_part(x @ x.mT, coefficients) @ x
        return x
    for start in range(0, steps, _GRAM_STEPS):
        x = _product_of_even_parts(x @ x.mT, schedule[start : start + _GRAM_STEPS]) @ x
    return x


def _product_of_even_parts(gram: Tensor, schedule: list[Quintic]) -> Tensor:
    """What a matrix of this Gram matrix is multiplied by when the polynomials are applied to it one after the other."""
    factor = _even_part(gram, schedule[0])
    latest = factor
    for coefficients in schedule[1:]:
        gram = latest @ gram @ latest
        latest = _even_part(gram, coefficients)
        factor = latest @ factor
    return factor


def _even_part(gram: Tensor, coefficients: Quintic) -> Tensor:
    """p(x)/x in the Gram matrix: a I + b Y + c Y²."""
    a, b, c = coefficients
    polynomial = b * gram + c * (gram @ gram) if c else b * gram
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


def _schedule(preset: str, steps: int) -> list[Quintic]:
    """The polynomials of a preset; those of Polar Express but the limiting one composed with a slight shrinkage."""
    if preset == "cubic":
        return [_CUBIC] * steps
    if preset == "muon":
        return [_MUON] * steps
    s = _POLAR_EXPRESS_SAFETY
    safe = [(a / s, b / s**3, c / s**5) for a, b, c in _POLAR_EXPRESS[:steps]]
    return safe + [_POLAR_EXPRESS_LIMIT] * (steps - len(safe))
