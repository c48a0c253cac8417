"""θ + ε for the length of a block, and θ again after it, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def perturbed(parameters: Sequence[Tensor], epsilon: Sequence[Tensor]) -> Iterator[None]:
    """Adds ε to the parameters in place and puts a saved copy back when the block ends, also when it raises.

    Subtracting ε again would leave round-off behind. The copy takes ε's own memory where the dtypes agree, so that one
    copy of the parameters is all this costs; ``epsilon`` is used up.

    Args:
        parameters: Tensors to perturb, distinct from each other.
        epsilon: A tensor of the same shape for each parameter, in memory of its own. The sum is taken in
            the wider of the two dtypes.
    """
    saved: list[Tensor] = []
    try:
        with torch.no_grad():
            for p, e in zip(parameters, epsilon, strict=True):
                moved = p + e
                saved.append(e.copy_(p) if e.dtype == p.dtype else p.clone())
                p.copy_(moved)
        torch.clear_autocast_cache()  # an autocast around both passes holds casts of θ
        yield
    finally:
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with torch.no_grad():
                    for p, original in zip(parameters, saved, strict=False):  # fewer, if adding ε was cut short
                        p.copy_(original)
                break
            except KeyboardInterrupt as error:  # a Ctrl-C must not leave half of θ perturbed: it is raised afterwards
                interrupt = error
        torch.clear_autocast_cache()
        if interrupt is not None:
            raise interrupt
