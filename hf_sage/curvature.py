"""The leading eigenvector of the Hessian, followed from step to step by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sage.rules import Step, remembered
from hf_sage.vectors import inner, norm, normal_like, unit


@dataclass(frozen=True)
class PowerIteration:
    """Where a power iteration has got to.

    Attributes:
        vector: The iterate, of length one.
        value: Its Rayleigh quotient ⟨x, Hx⟩ at the last product, that of the iterate before.
        shift: c ≥ 0: what is added to H's diagonal.
    """

    vector: list[Tensor]
    value: float
    shift: float = 0.0


def power_iteration(
    product: Callable[[Sequence[Tensor]], list[Tensor]], start: Sequence[Tensor], iterations: int, shift: float = 0.0
) -> PowerIteration:
    """Iterates x ← (H + cI)x/‖(H + cI)x‖ towards the eigenvector of H's largest eigenvalue.

    Without c the iteration ends in the eigenvalue of largest magnitude, also if it is negative. As soon as a Rayleigh
    quotient is negative, c becomes ‖Hx‖ ≤ ‖H‖₂, which moves the negative end of the spectrum to about zero.

    Args:
        product: Hx.
        start: Where to start, any length but zero.
        iterations: The number of products.
        shift: c to begin with.

    Returns:
        The last iterate. It stays where it is where H is zero there, and where Hx is not finite.
    """
    x, value = unit(start), math.nan
    for _ in range(iterations):
        hx = product(x)
        value = float(inner(x, hx))
        if not math.isfinite(value):
            break
        if value < 0:
            shift = max(shift, float(norm(hx)))
        moved = [h + shift * t for h, t in zip(hx, x, strict=True)]
        x = unit(moved) if float(norm(moved)) > 0 else x
    return PowerIteration(x, value, shift)


@dataclass(frozen=True)
class LeadingEigenvector:
    """The eigenvector of the largest eigenvalue of the batch's Hessian, refreshed at an interval.

    Each refresh starts from the last vector and its shift, the first from random numbers. The eigenvalue's estimate is
    logged as ``hessian_eigenvalue`` in updates that refresh.

    Attributes:
        interval: The vector is refreshed in every so-manieth update, beginning with the first.
        iterations: Products with the Hessian a refresh.
    """

    interval: int
    iterations: int

    def __post_init__(self) -> None:
        for name in ("interval", "iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")

    @property
    def hessian_products(self) -> float:
        """Products a step, on average."""
        return self.iterations / self.interval

    def __call__(self, like: Sequence[Tensor], step: Step) -> list[Tensor]:
        """The vector, of length one; as a tensor for each of ``like``, and only to be read."""
        held = remembered(step.memory, "eigenvector", like)
        if held is not None and step.number - step.memory["refreshed"] < self.interval:
            return held
        start = normal_like(like, step.seed) if held is None else held
        shift = 0.0 if held is None else step.memory["shift"]
        found = power_iteration(step.passes.hessian_product, start, self.iterations, shift)
        step.memory |= {"eigenvector": found.vector, "shift": found.shift, "refreshed": step.number}
        step.facts["hessian_eigenvalue"] = like[0].new_tensor(found.value, dtype=found.vector[0].dtype)
        return found.vector
