"""The precision guard: what the forward pass sees of ε, measured, logged, and warned of."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hf_sage.engine.precision import HALF, Realised, read_precision, realised_perturbation

logger = logging.getLogger(__name__)

FAITHFUL = 0.9
"""The cosine between what the forward pass sees of ε and ε below which training is warned.

The rounding is then half as long as ε (tan arccos 0.9 = 0.48). For weights and ε of the usual bell shape the cosine is
0.9 where 70% of the entries survive, 0.8 at 55%, 0.25 at 11% and 0.09 at 2%.
"""


class PrecisionGuard:
    """Measures what the forward pass sees of ε in the first step after each log entry, and warns once.

    `Realised` is logged where some weight is read in less than fp32: in fp32 nearly every entry survives (99.9% at
    ρ = 1e-6), and a warning says so where not.
    """

    def __init__(self) -> None:
        self.is_due = True
        self._found: Realised | None = None
        self._has_warned = False

    def inspect(
        self, theta: Sequence[torch.Tensor], epsilon: Sequence[torch.Tensor], autocast: torch.dtype | None
    ) -> None:
        """Measures ε.

        Args:
            theta: The parameters.
            epsilon: The perturbation.
            autocast: The type that automatic mixed precision casts to, if it is on.
        """
        self.is_due = False
        precisions = [read_precision(p, autocast) for p in theta]
        rounded = {str(p).removeprefix("torch.") for p in precisions if p not in (torch.float32, torch.float64)}
        found = realised_perturbation(theta, epsilon, precisions)
        if rounded:
            self._found = found
        if found.fidelity >= FAITHFUL or self._has_warned:
            return
        self._has_warned = True
        # ε is proportional to ρ for every ascent, near enough for a power of ten.
        factors = [10**n for n in range(1, 8)]
        faithful = (f for f in factors if realised_perturbation(theta, epsilon, precisions, f).fidelity >= FAITHFUL)
        enough = next(faithful, None)
        cures = [f"raise rho ({enough} times what it is would do)" if enough else "raise rho"]
        if low := {str(p.dtype) for p in theta if p.dtype in HALF}:
            cures.insert(0, f"keep the weights in fp32, not in {' and '.join(sorted(low))} (dtype=torch.float32)")
        elif rounded:
            cures.insert(0, "run the two passes in fp32 (full_precision_passes=True)")
        logger.warning(
            f"The perturbation is lost in rounding: read in {' and '.join(sorted(rounded)) or 'float32'}, "
            f"{found.survival:.2%} of the perturbed weights differ from the unperturbed ones, and the cosine between "
            f"that difference and the perturbation is {found.fidelity:.2f} (1: all of it arrives; below {FAITHFUL} "
            f"the rest is rounding noise). To have the sharpness that is asked for, {', or '.join(cures)}."
        )

    def pop(self) -> dict[str, float]:
        """What was measured since the last call."""
        found, self._found, self.is_due = self._found, None, True
        return {} if found is None else {f"perturbation_{name}": value for name, value in vars(found).items()}
