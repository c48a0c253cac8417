"""BatchNorm in the second pass: batch statistics as in the first, running statistics at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hf_sage.engine.distributed import is_distributed


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Puts the running statistics of ``model`` back as they were; batches are normalised as ever.

    The perturbed pass would otherwise move them a second time, towards the statistics of θ + ε. A copy is bit-exact for
    every layer, where the customary momentum of 0 lets a NaN through and InstanceNorm ignores its tracking flag.
    """
    buffers = [b for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def same_running_statistics(model: nn.Module) -> None:
    """Gives all ranks the first one's running statistics, as DistributedDataParallel does before each forward pass.

    It does not inside ``no_sync``, where the step runs.
    """
    if is_distributed():
        for buffer in _running_statistics(model):
            dist.broadcast(buffer, src=0)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    return [b for m in model.modules() if isinstance(m, _NormBase) and m.training for b in m.buffers(recurse=False)]
