"""Quantiles of Student's t, without SciPy."""

from __future__ import annotations

import math


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which a t-distributed number lies with a probability, by bisection of `t_within`.

    Args:
        probability: In [0.5, 1).
        degrees: Degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while t_within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return high


def t_within(t: float, degrees: int) -> float:
    """Probability that a t-distributed number lies in [-t, t]: Abramowitz & Stegun 26.7.3 and 26.7.4, exact."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    # The series in cos θ: each term is the one before it times cos² θ · k/(k+1).
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
