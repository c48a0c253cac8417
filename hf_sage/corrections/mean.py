"""The correction of SAGM: the clean loss is descended beside the perturbed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.corrections.base import Correction, Descent


@dataclass(frozen=True)
class MeanOfGradients(Correction):
    """g ← ½(g + g_p) (Wang et al. 2023, arXiv 2303.10353; SAGM).

    The paper's objective is the sum of both losses; its code descends the mean, whose gradient has the size that a
    learning rate for ERM expects.
    """

    needs_perturbation: ClassVar[bool] = True

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Corrects in place; see `Correction`."""
        for g_p, g in zip(gradients, descent.clean, strict=True):
            g_p.add_(g).mul_(0.5)
        return {}
