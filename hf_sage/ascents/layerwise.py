"""What ascents share that go a radius of its own in every tensor: SAGE's and its ablations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sage.vectors import norms, reciprocal_or_zero, widened

BiasRadius = Literal["fixed", "norm"]

NEGLIGIBLE = 1e-6
"""Gradients of less than this share of the whole gradient's norm are round-off and get no perturbation.

Some gradients are zero in exact arithmetic (the key bias of attention, biases before a BatchNorm). The rules here
ignore the gradient's length, so they would blow that round-off up to a full step, different on every machine.
"""


def check_bias_radius(bias_radius: str) -> None:
    """Raises a ValueError unless it is one of `BiasRadius`."""
    if bias_radius not in get_args(BiasRadius):
        raise ValueError(f"Unknown bias_radius {bias_radius!r}: use 'fixed' (the paper's) or 'norm'.")


def layerwise(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: float,
    directions: Callable[[Sequence[Tensor]], list[Tensor]],
    bias_radius: BiasRadius = "fixed",
    weight_scale: bool = True,
) -> list[Tensor]:
    """ε_W = ρ‖W‖_F direction(G) for tensors of two and more dimensions, ε_b = ρ g/‖g‖₂ for the others.

    Args:
        parameters: The parameters θ.
        gradients: Their gradients, at any scale.
        rho: The radius.
        directions: From the gradients G of two and more dimensions, in fp32 at the least, to tensors of their shapes,
            in memory of their own.
        bias_radius: ``"norm"`` multiplies ε_b by ‖b‖₂.
        weight_scale: Whether ε_W is multiplied by ‖W‖_F.

    Returns:
        ε, zero where a gradient is round-off.
    """
    lengths = norms(gradients)
    felt = lengths > NEGLIGIBLE * torch.linalg.vector_norm(lengths)
    wide = [widened(g) for g in gradients]
    matrices = iter(directions([g for g in wide if g.dim() >= 2]))
    epsilon = []
    for p, g, length, is_felt in zip(parameters, wide, lengths, felt, strict=True):
        is_matrix = g.dim() >= 2
        along = next(matrices) if is_matrix else g * reciprocal_or_zero(length)
        relative = weight_scale if is_matrix else bias_radius == "norm"
        radius = rho * is_felt.to(along.dtype)
        epsilon.append(along.mul_(radius * torch.linalg.vector_norm(p, dtype=along.dtype) if relative else radius))
    return epsilon
