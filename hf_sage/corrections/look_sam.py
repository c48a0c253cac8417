"""The correction of LookSAM: between two perturbed passes, what SAM added at the last one is added again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.corrections.base import Correction, Descent
from hf_sage.rules import Need, remembered
from hf_sage.vectors import norm, projection, unit, widened


@dataclass(frozen=True)
class ReusedDirection(Correction):
    """g ← g + α‖g‖ g_v/‖g_v‖, g_v = g_p − proj_g g_p of the last perturbed update (Liu et al. 2022, arXiv 2203.02714).

    LookSAM's Algorithm 1, for a method with an ``ascent_interval``: perturbed updates descend g_p as it is. Norms and
    projections are over all parameters. The public code, which is not the authors', decomposes tensor by tensor, and
    puts the parameters of the last perturbed update back in every update.

    Attributes:
        alpha: α ≥ 0, default 0.7 (the public code).
    """

    alpha: float = 0.7
    needs: ClassVar[frozenset[Need]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number, 0 or more; got {self.alpha!r}.")

    @property
    def is_null(self) -> bool:
        """Whether α is zero."""
        return self.alpha == 0

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects in place, or remembers; see `Correction`."""
        memory = descent.step.memory
        if descent.perturbed:
            along = projection(gradients, descent.clean)
            across = [widened(g_p) - along * g for g_p, g in zip(gradients, descent.clean, strict=True)]
            memory["direction"] = unit(across)
            return {}
        direction = remembered(memory, "direction", gradients)
        if direction is not None:
            length = self.alpha * norm(gradients)
            for g, v in zip(gradients, direction, strict=True):
                g.add_((length * v).to(g.dtype))
        return {}
