"""Reductions over ranks, on plain torch.distributed; one process needs none and pays nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hf_sage.agreement import gram_matrix

T = TypeVar("T")

Gradients: TypeAlias = list[Tensor | None]
"""An entry for each parameter, ``None`` where it has no gradient."""

BUCKET_BYTES = 25 * 2**20
"""Gradients travel in buckets of about this size, DistributedDataParallel's default."""


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """The place of this rank among all."""
    return dist.get_rank() if is_distributed() else 0


class Reduction:
    """What is made of the ranks' gradients: this one leaves each rank its own.

    A reduction is called where only its result matters. The gradients of groups, of which only the inner products and
    the sum are wanted whole, take three steps instead: each rank keeps a piece of each (`scatter`), the Gram matrix is
    taken of the pieces (`gram`), and one list of pieces is made whole (`gather`).
    """

    def __call__(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """The reduced gradient of each parameter in ``like``."""
        return list(gradients)

    def scatter(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """This rank's piece of the reduced gradient of each parameter in ``like``."""
        return list(gradients)

    def gram(self, pieces: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """The Gram matrix of the groups' reduced gradients, the same on all ranks that share them."""
        return gram_matrix(pieces)

    def gather(self, pieces: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """The reduced gradient that the pieces of all ranks make."""
        return list(pieces)

    def total(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over the ranks that share a gradient."""
        return x

    def everyones(self, own: T) -> tuple[list[T], int]:
        """What each of the ranks that share a gradient has, in their order, and which of these is this rank's."""
        return [own], 0


class MeanOverRanks(Reduction):
    """The mean over ranks that hold all parameters; afterwards every rank holds the same bits.

    A call sends 2(W−1)/W times the gradient from each of W ranks, as DistributedDataParallel does. For K groups the
    three steps send (K+1)/2 times that instead of K times, and each rank keeps a W-th of each group's gradient.
    ``None`` stands for zero, and stays ``None`` where no rank has a gradient.
    """

    def __call__(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """The mean gradient, written over this rank's own."""
        if not is_distributed():
            return list(gradients)
        mean = _zeros_where_others_have_more(gradients, like)
        for bucket in _buckets(mean):
            flat = torch.cat([g.reshape(-1) for g in bucket.values()])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for g, part in zip(bucket.values(), torch.split(flat, [g.numel() for g in bucket.values()]), strict=True):
                g.copy_(part.view_as(g))
        return mean

    def scatter(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """This rank's slice of each mean gradient: a W-th of its entries in a row, the last ones padded with zeros."""
        if not is_distributed():
            return list(gradients)
        world = dist.get_world_size()
        slices: Gradients = [None] * len(gradients)
        for bucket in _buckets(_zeros_where_others_have_more(gradients, like)):
            rows = [pad(g.reshape(-1), (0, -g.numel() % world)).view(world, -1) for g in bucket.values()]
            everyones = torch.cat(rows, dim=1)
            own = everyones.new_empty(everyones.shape[1])
            _reduce_scatter(own, everyones)
            own /= world
            for i, part in zip(bucket, torch.split(own, [row.shape[1] for row in rows]), strict=True):
                slices[i] = part
        return slices

    def gram(self, pieces: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """The Gram matrix of the groups' mean gradients: the sum over ranks of that of their slices."""
        return sum_over_ranks(gram_matrix(pieces))

    def gather(self, pieces: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
        """The mean gradient, from its slices."""
        if not is_distributed():
            return list(pieces)
        mean: Gradients = [None] * len(pieces)
        for bucket in _buckets(pieces):
            own = torch.cat(list(bucket.values()))
            everyones = own.new_empty(dist.get_world_size(), own.numel())
            _all_gather(everyones, own)
            columns = torch.split(everyones, [s.numel() for s in bucket.values()], dim=1)
            for i, slices in zip(bucket, columns, strict=True):
                mean[i] = slices.reshape(-1)[: like[i].numel()].view(like[i].shape)
        return mean

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return sum_over_ranks(x)

    def everyones(self, own: T) -> tuple[list[T], int]:
        """What each rank has."""
        return gathered(own), own_rank()


mean_over_ranks = MeanOverRanks()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks of a small tensor, on all of them."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(own: T) -> list[T]:
    """What each rank has, in their order; any object that can be pickled."""
    if not is_distributed():
        return [own]
    everyones = [own] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return everyones


def _zeros_where_others_have_more(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
    """The gradients with zeros for those that another rank has."""
    present = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=like[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    return [
        torch.zeros_like(p) if g is None and used else g
        for g, p, used in zip(gradients, like, present.tolist(), strict=True)
    ]


def _buckets(tensors: Sequence[Tensor | None]) -> Iterator[dict[int, Tensor]]:
    """Consecutive tensors of one dtype by their index, cut where a bucket is full."""
    bucket: dict[int, Tensor] = {}
    size = 0
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if bucket and (size >= BUCKET_BYTES or t.dtype != next(iter(bucket.values())).dtype):
            yield bucket
            bucket, size = {}, 0
        bucket[i] = t
        size += t.numel() * t.element_size()
    if bucket:
        yield bucket


def _reduce_scatter(own: Tensor, everyones: Tensor) -> None:
    renamed = getattr(dist, "reduce_scatter_single", None)  # torch 2.13, which warns of the name before
    (renamed or dist.reduce_scatter_tensor)(own, everyones.view(-1))


def _all_gather(everyones: Tensor, own: Tensor) -> None:
    renamed = getattr(dist, "all_gather_single", None)
    (renamed or dist.all_gather_into_tensor)(everyones.view(-1), own)
