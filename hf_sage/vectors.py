"""Lists of tensors as one vector: norms, inner products, directions.

The lists are those of the parameters and their gradients. Under FSDP the tensors are DTensors, which stand for whole
tensors in all of these. This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, as one vector in fp32 at the least.

    On a CPU the sums are taken in fp64: those in fp32 run to 1e-3 of error at 10⁷ entries there.
    """
    found = [torch.linalg.vector_norm(t, dtype=_accumulator(t)) for t in tensors]
    return whole(torch.stack(found)).to(_result(tensors))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all tensors, 0-dimensional."""
    length: Tensor = torch.linalg.vector_norm(norms(tensors))
    return length


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ over all tensors, 0-dimensional and as precise as `norms`."""
    products = [(x.to(_accumulator(x)) * y).sum() for x, y in zip(a, b, strict=True)]
    return whole(torch.stack(products)).sum().to(_result(a))


def unit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The vector of length one along another, in fp32 at the least; zero for zero."""
    scale = reciprocal_or_zero(norm(tensors))
    return [widened(t) * scale for t in tensors]


def projection(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The number c, 0-dimensional, for which c b is the orthogonal projection of a on b; 0 for b = 0."""
    reciprocal = reciprocal_or_zero(norm(b))
    return inner(a, b) * reciprocal * reciprocal


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The cosine of the angle between two vectors, 0-dimensional; 0 where one of them is zero."""
    return inner(unit(a), unit(b))


def along(vector: Sequence[Tensor], length: float, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A perturbation of the parameters of a given length along a vector; zero for zero.

    Returns:
        Tensors in memory of their own, in fp32 where the parameter has less.
    """
    scale = length * reciprocal_or_zero(norm(vector))
    return [v.to(torch.promote_types(p.dtype, scale.dtype)) * scale for p, v in zip(parameters, vector, strict=True)]


def normal_like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent standard normal numbers, in fp32 at the least: for one seed the same on all ranks.

    Args:
        tensors: What they are to be like in shape, device and sharding.
        seed: Seed of a generator on each device; the global ones are left alone.
    """
    generators: dict[torch.device, torch.Generator] = {}
    drawn = []
    for t in tensors:
        if t.device not in generators:
            generators[t.device] = torch.Generator(t.device).manual_seed(seed)
        dtype = torch.promote_types(t.dtype, torch.float32)
        noise = torch.randn(t.shape, dtype=dtype, device=t.device, generator=generators[t.device])
        drawn.append(like_shard(noise, t))
    return drawn


def widened(t: Tensor) -> Tensor:
    """The tensor in fp32 where it has less."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


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


def _accumulator(t: Tensor) -> torch.dtype:
    wide = t.dtype == torch.float64 or t.device.type == "cpu"
    return torch.float64 if wide else torch.float32


def _result(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
