"""BatchNorm in the second pass: batch statistics as in the first, running statistics at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of every BatchNorm of ``model`` as they are; batches are normalised as before.

    The perturbed pass would otherwise move them a second time, towards the statistics of θ + ε. Switching tracking off
    leaves the buffers untouched to the bit, where the customary momentum of 0 lets a NaN through.
    """
    tracking = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
