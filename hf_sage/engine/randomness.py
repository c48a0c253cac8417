"""Random numbers that a restart, another rank or a second pass can draw again."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch


def step_seed(seed: int, step: int) -> int:
    """Seed of one step's random numbers: a 63-bit digest of the run's seed and the step.

    The same on every rank and after every restart, so that nothing has to be saved beside the step's number.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a forward pass may draw from: torch on CPU and CUDA, NumPy and Python."""

    cpu: torch.Tensor
    cuda: list[torch.Tensor]
    numpy: dict[str, object] | tuple[object, ...]
    python: tuple[object, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """Takes the present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Puts the captured state back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]  # NumPy types the same value differently in and out
        random.setstate(self.python)

    def is_present(self) -> bool:
        """Whether nothing was drawn since the state was captured, nor any generator seeded."""
        now = RandomState.capture()
        return (
            torch.equal(self.cpu, now.cpu)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, now.cuda, strict=True))
            and str(self.numpy) == str(now.numpy)
            and self.python == now.python
        )
