"""What every ascent is: a rule that turns parameters and their mean gradient into a perturbation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ascent(Protocol):
    """A rule for the perturbation ε of the ascent step.

    Attributes:
        rho: Perturbation radius ρ ≥ 0. At ρ = 0 the rule perturbs nothing, and the trainer leaves the second pass out.
    """

    @property
    def rho(self) -> float:
        """Perturbation radius ρ."""

    def __call__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Computes ε.

        Args:
            parameters: The parameters θ.
            gradients: The mean gradient ḡ, a tensor of the same shape for each parameter. Its scale must not matter.

        Returns:
            ε, a tensor for each parameter, in fp32 where the parameter has less.
        """


def check_radius(rho: float) -> None:
    """Raises a ValueError unless ρ is a finite number, 0 or more."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number, 0 or more; got {rho!r}. 0 switches the perturbation off.")


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, as one vector in fp32 at the least."""
    dtype = torch.float32 if all(t.dtype != torch.float64 for t in tensors) else torch.float64
    return torch.stack([torch.linalg.vector_norm(t, dtype=dtype) for t in tensors])


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, torch.ones_like(x)), torch.zeros_like(x))
