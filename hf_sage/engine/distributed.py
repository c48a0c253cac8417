"""Reductions over ranks, on plain torch.distributed; one process needs none and pays nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20
"""Gradients travel in buckets of about this size, DistributedDataParallel's default."""


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over ranks of each gradient; afterwards every rank holds the same bits.

    Args:
        gradients: This rank's gradient of each parameter, or ``None`` where it has none.
        like: The parameters.

    Returns:
        The mean gradients. ``None`` stands for zero, and stays ``None`` where no rank has a gradient.
    """
    if not is_distributed():
        return list(gradients)
    present = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=like[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    filled = [
        (g if g is not None else torch.zeros_like(p)) if used else None
        for g, p, used in zip(gradients, like, present.tolist(), strict=True)
    ]
    for bucket in _buckets([g for g in filled if g is not None]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, mean in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            g.copy_(mean.view_as(g))
    return filled


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks of a small tensor, on all of them."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, cut where a bucket is full."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (size >= BUCKET_BYTES or t.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel() * t.element_size()
    if bucket:
        yield bucket
