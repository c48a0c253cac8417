"""What every correction is: a rule that turns the perturbed gradient into the gradient that is descended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Descent:
    """What a correction may use besides the gradient.

    Attributes:
        agreement: S over the groups of this step, 0-dimensional.
        seed: Seed of this step's random numbers: a function of the run's seed and the step alone, the same on all
            ranks, so that replicas stay equal and a resumed run draws what the uninterrupted one would have drawn.
    """

    agreement: Tensor
    seed: int


class Correction(Protocol):
    """A rule applied to the gradient after clipping, in the order of the method's chain."""

    @property
    def is_null(self) -> bool:
        """Whether the rule changes nothing, whatever the gradient."""

    @property
    def needs_groups(self) -> bool:
        """Whether the rule uses the groups' gradients."""

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects the gradients in place.

        Returns:
            Entries for the log, 0-dimensional; none is fine.
        """
