"""The ascent of SAGE: every singular direction of a layer's gradient is probed with the same magnitude."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.ascents.layerwise import BiasRadius, check_bias_radius, layerwise
from hf_sage.polar import PolarPreset, check_polar, polar_factor
from hf_sage.rules import Step
from hf_sage.vectors import like_shard, whole

STACK_ON_CPU = 2**18
STACK_ELSEWHERE = 2**23
"""Matrices of one shape are computed as one stack of at most so many entries (or as one matrix that has more).

On a CPU 2¹⁸ entries, 1 MiB in fp32, stay in a core's cache: stacks of 64 × 64 cost less than half of a loop over them,
while stacks of 384 × 384 would cost a sixth more. Elsewhere 2²³ entries, 32 MiB, are several waves of work for a GPU;
the polar factor has about six tensors of that size at a time.
"""


@dataclass(frozen=True)
class SpectralAscent(Ascent):
    """ε_W = ρ‖W‖_F polar(G) for matrices, ε_b = ρ g/‖g‖₂ for 1-D tensors (Section 3.1 and Algorithm 1, phase 3).

    Tensors of three and more dimensions (convolution kernels) are read as matrices of shape (first, rest), as Muon
    does; 0-dimensional ones as vectors. ‖ε_W‖_F = ρ‖W‖_F √r for rank r: ρ is a *relative* radius per singular
    direction for matrices and an absolute one for vectors. A zero matrix stays where it is.

    Attributes:
        rho: Radius ρ ≥ 0, default 1e-6 (Appendix E.1, CLIP fine-tuning).
        polar: Preset of `hf_sage.polar.polar_factor`.
        polar_steps: Its number of iterations T, default 5 (Section 3.1).
        bias_radius: ``"fixed"``, the paper's rule, or ``"norm"``, ε_b = ρ‖b‖₂ g/‖g‖₂, which makes the claimed
            invariance to rescaling W ↦ αW true for layers with biases too.
        weight_scale: Whether to multiply by ‖W‖_F; without it ε_W = ρ polar(G) (the ablation "No Scaling").
    """

    rho: float = 1e-6
    polar: PolarPreset = "auto"
    polar_steps: int = 5
    bias_radius: BiasRadius = "fixed"
    weight_scale: bool = True

    def __post_init__(self) -> None:
        check_radius(self.rho)
        check_polar(self.polar, self.polar_steps)
        check_bias_radius(self.bias_radius)

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        return layerwise(parameters, gradients, self.rho, self._polar, self.bias_radius, self.weight_scale)

    def _polar(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The polar factors, matrices of one shape together."""
        factors: dict[int, Tensor] = {}
        for stack in _stacks(gradients):
            matrices = torch.stack([whole(gradients[i]).flatten(1) for i in stack])
            for i, factor in zip(stack, polar_factor(matrices, self.polar, self.polar_steps), strict=True):
                factors[i] = like_shard(factor.view(gradients[i].shape), gradients[i])
        return [factors[i] for i in range(len(gradients))]


def _stacks(gradients: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of the gradients, those of one shape together as far as a stack may go.

    They depend on shapes, dtypes and the kind of device alone: all ranks compute the same stacks in the same order.
    """
    alike: dict[tuple[int, int, torch.dtype], list[int]] = defaultdict(list)
    for i, g in enumerate(gradients):
        alike[g.shape[0], g.shape[1:].numel(), g.dtype].append(i)
    for (m, n, _), indices in alike.items():
        entries = STACK_ON_CPU if gradients[indices[0]].device.type == "cpu" else STACK_ELSEWHERE
        depth = max(1, entries // max(1, m * n))
        for start in range(0, len(indices), depth):
            yield indices[start : start + depth]
