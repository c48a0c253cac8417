"""What every ascent is: a rule that turns parameters and their mean gradient into a perturbation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from hf_sage.rules import Rule, Step


class Ascent(Rule, ABC):
    """A rule for the perturbation ε of the ascent step."""

    rho: float
    """Perturbation radius ρ ≥ 0. At ρ = 0 the rule perturbs nothing, and the second pass is left out."""

    @abstractmethod
    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε.

        Args:
            parameters: The parameters θ.
            gradients: The mean gradient ḡ, a tensor of the same shape for each parameter. Its scale must not matter,
                or be divided by ``step.gradient_scale``.
                Under FSDP both are DTensors, which stand for whole tensors in elementwise rules, sums and `norms`; a
                rule that mixes the entries of one needs it `whole`, and returns its `like_shard`.
            step: The step, for rules that have a memory or take further passes.

        Returns:
            ε, a tensor for each parameter, in fp32 where the parameter has less, and in memory of its own: the step
            keeps the parameters in it while they are perturbed.
        """

    def group_weights(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The weights of the groups' gradients in the gradient that ε is computed from.

        Args:
            losses: The mean loss of each group, shape ``(K,)``, fp64.
            weights: Their share of the batch, w_k, summing to one.

        Returns:
            By default ``weights``: ε is computed from the gradient of the batch.
        """
        return weights


def check_radius(rho: float) -> None:
    """Raises a ValueError unless ρ is a finite number, 0 or more."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number, 0 or more; got {rho!r}. 0 switches the perturbation off.")


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, as one vector in fp32 at the least.

    On a CPU the sums are taken in fp64: those in fp32 run to 1e-3 of error at 10⁷ entries there.
    """
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found = [torch.linalg.vector_norm(t, dtype=torch.float64 if t.device.type == "cpu" else dtype) for t in tensors]
    return whole(torch.stack(found)).to(dtype)


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor of which each rank holds a shard; any other tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def like_shard(full: Tensor, reference: Tensor) -> Tensor:
    """What a rank keeps of a whole tensor where it holds a shard of ``reference``; otherwise all of it.

    Args:
        full: A tensor of the shape of ``reference``, the same on all ranks.
        reference: Any tensor.
    """
    if not isinstance(reference, DTensor):
        return full
    mesh = reference.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=reference.placements)


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x would be infinite."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x > tiny, 1 / torch.where(x > tiny, x, torch.ones_like(x)), torch.zeros_like(x))
