"""The step where each rank holds a shard of each parameter: FSDP2, ``torch.distributed.fsdp.fully_shard``.

Such a parameter is a DTensor: it stands for the whole tensor, and sums, norms and elementwise rules are those of the
whole without a word here. FSDP averages each gradient over ranks by itself. What is left is to add up inner products
over the shards, and to hold FSDP to the shards while they are perturbed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from hf_sage.agreement import gram_matrix
from hf_sage.engine.distributed import Reduction, gathered, own_rank, sum_over_ranks

T = TypeVar("T")


class MeanByFSDP(Reduction):
    """Gradients that FSDP has averaged over ranks already, and of which each rank holds its shards."""

    def gram(self, pieces: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """The sum of the shards' Gram matrices; what several ranks hold alike counts once."""
        layouts: dict[tuple[DeviceMesh, tuple[bool, ...]], list[list[Tensor | None]]] = defaultdict(list)
        for column in zip(*pieces, strict=True):
            shards = [g for g in column if isinstance(g, DTensor)]
            if shards:
                layout = shards[0].device_mesh, tuple(p.is_replicate() for p in shards[0].placements)
                layouts[layout].append([g.to_local() if isinstance(g, DTensor) else None for g in column])
        grams = []
        for (mesh, replicated), columns in layouts.items():
            own = gram_matrix(list(zip(*columns, strict=True)))
            placements = [Replicate() if alike else Partial() for alike in replicated]
            grams.append(DTensor.from_local(own, mesh, placements, run_check=False).full_tensor())
        return torch.stack(grams).sum(0)

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return sum_over_ranks(x)

    def everyones(self, own: T) -> tuple[list[T], int]:
        """What each rank has."""
        return gathered(own), own_rank()


def is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether the parameters are sharded.

    Raises:
        ValueError: If only some of them are.
    """
    sharded = [isinstance(p, DTensor) for p in parameters]
    if any(sharded) and not all(sharded):
        raise ValueError(
            f"{sum(sharded)} of {len(sharded)} parameters are sharded. FSDP averages the gradients of these over ranks "
            "and of no others, so the step would differ from rank to rank: call fully_shard on the whole model, "
            "without ignored_params."
        )
    return any(sharded)


def reshard(model: nn.Module) -> None:
    """Makes the parameters of the model shards again where FSDP has left them whole.

    It leaves those of the outermost module so from a forward pass to the next backward pass: after an evaluation, or
    where a pass raised. The next pass would use them even if the shards had changed since.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """A block in which shards change, and change back: no pass before it, in it or after it sees what others left."""
    reshard(model)
    try:
        yield
    finally:
        reshard(model)


def check_same_passes(passes: Sequence[Hashable]) -> None:
    """Raises on every rank if they are about to go through different passes, in which FSDP would wait forever.

    Args:
        passes: The group of each pass of this rank, in their order.

    Raises:
        ValueError: If another rank goes through others.
    """
    everyones = gathered(list(passes))
    if any(other != everyones[0] for other in everyones):
        raise ValueError(
            f"The ranks have parts of different groups: {everyones}. Every rank takes part in every pass of FSDP, so "
            "all need the same groups in the same order. Give a rank without rows of a group a part of weight 0: any "
            "rows, and 0 times their loss."
        )
