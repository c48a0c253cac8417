"""Random search: hyperparameters drawn log-uniformly, the same draws for every method that has them."""

from __future__ import annotations

import hashlib
import math

import numpy as np

Ranges = dict[str, tuple[float, float]]
"""By hyperparameter, the lowest and the highest value to draw."""


def draw(name: str, low: float, high: float, trial: int, seed: int = 0) -> float:
    """A hyperparameter of a trial, log-uniform in a range, to three digits.

    It is a function of the arguments alone: where in its range the value lies depends on the name, the trial and the
    seed, so that methods with the same range share their values, and further methods, trials or hyperparameters change
    none that were drawn before.

    Args:
        name: The hyperparameter.
        low: The lowest value.
        high: The highest value.
        trial: Number of the trial, from 1: trial 0 is the defaults.
        seed: Seed of the search.
    """
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    share = np.random.default_rng([seed, trial, own]).random()
    return float(f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.2e}")


def check_range(name: str, values: object) -> tuple[float, float]:
    """A range as it was written, as numbers.

    Raises:
        ValueError: If it is none.
    """
    cure = f"write it as `{name}: [1e-6, 1e-3]`, the lowest and the highest value, both above 0"
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"The search range of {name!r} is {values!r}: {cure}.")
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise ValueError(f"The search range of {name!r} is {values!r}: {cure}.") from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"The search range of {name!r} is {values!r}, which has no logarithm to draw from: {cure}.")
    return low, high
