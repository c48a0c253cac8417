"""What a step found, averaged between two log entries, and the warnings that what it found calls for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from hf_sage.engine import StepReport
from hf_sage.engine.distributed import is_distributed
from hf_sage.engine.precision import HALF, Realised, read_precision, realised_perturbation

logger = logging.getLogger(__name__)
T = TypeVar("T")

FAITHFUL = 0.9
"""The cosine between what the forward pass sees of ε and ε below which training is warned.

The rounding is then half as long as ε (tan arccos 0.9 = 0.48). For weights and ε of the usual bell shape the cosine is
0.9 where 70% of the entries survive, 0.8 at 55%, 0.25 at 11% and 0.09 at 2%.
"""


class StepLog:
    """Collects the reports of steps without a synchronisation with the device, and averages them when asked.

    Attributes:
        precision: What the forward pass sees of ε.
        skipped: The updates that were left out.
    """

    def __init__(self) -> None:
        self.precision = PrecisionGuard()
        self.skipped = SkippedSteps()
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._group_losses: dict[Hashable, list[tuple[torch.Tensor, float]]] = defaultdict(list)

    def add(self, report: StepReport, facts: Mapping[str, torch.Tensor]) -> None:
        """Adds one step and what its corrections reported."""
        if report.perturbed_loss is not None and report.perturbation_norm is not None:
            self._values["perturbed_loss"].append(report.perturbed_loss)
            self._values["sharpness"].append(report.perturbed_loss - report.loss)
            self._values["perturbation_norm"].append(report.perturbation_norm)
        if len(report.group_losses) > 1:
            self._values["agreement"].append(report.agreement)
        for name, value in facts.items():
            self._values[name].append(value)
        for group, loss in report.group_losses.items():
            self._group_losses[group].append(loss)

    def pop(self, names: Mapping[str, str]) -> dict[str, float]:
        """The averages since the last call, over ranks too; every rank must call it.

        Args:
            names: What to call a group, where not by its own name.
        """
        sums = {name: (float(torch.stack(v).double().sum()), float(len(v))) for name, v in self._values.items()}
        for group, losses in self._group_losses.items():
            if isinstance(group, str):
                total = torch.stack([loss for loss, _ in losses]).double().sum()
                sums[f"loss/{names.get(group, group)}"] = (float(total), sum(weight for _, weight in losses))
        self._values.clear()
        self._group_losses.clear()
        averages = {name: value / weight for name, (value, weight) in sorted(_over_ranks(sums).items()) if weight}
        return averages | self.precision.pop() | self.skipped.pop()


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


class SkippedSteps:
    """Counts the updates that were left out because a gradient was not finite, and warns once.

    Attributes:
        wants_groups: Whether the groups at fault are still to be told: until the warning.
        groups: Those that this rank found.
    """

    def __init__(self) -> None:
        self.wants_groups = True
        self.groups: list[str] = []
        self._steps = 0
        self._perturbations = 0

    def add(self, report: StepReport, update: int, *, warns: bool) -> None:
        """Counts one; every rank must call it.

        Args:
            report: Of the step.
            update: Its number.
            warns: Whether to warn of the first: a GradScaler leaves updates out as a matter of course.
        """
        self._steps += 1
        self._perturbations += not report.is_finite
        if not warns or not self.wants_groups:
            return
        self.wants_groups = False
        groups = sorted({name for own in _gathered(self.groups) for name in own})
        if is_distributed() and dist.get_rank():
            return
        if report.is_finite and not groups:
            cause, cure = "the gradient at the perturbed weights is not finite, that at the weights is", "lower rho"
        else:
            cause, cure = "the gradient is not finite", "look at its rows, or lower the learning rate"
        culprits = f", from the loss of {' and '.join(map(repr, groups))}" if groups else ""
        logger.warning(
            f"Update {update} was left out: {cause}{culprits}. To cure it, {cure}. Further ones are counted in the log "
            "(skipped_steps) and not warned of."
        )

    def pop(self) -> dict[str, float]:
        """The numbers since the last call: of updates, and of those among them whose clean gradient was the cause."""
        counts = {"skipped_steps": self._steps, "skipped_perturbations": self._perturbations}
        self._steps = self._perturbations = 0
        return {name: float(count) for name, count in counts.items() if count}


def _gathered(own: T) -> list[T]:
    """What each rank has."""
    if not is_distributed():
        return [own]
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _over_ranks(sums: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Adds up (sum, weight) pairs over ranks, whichever of them each rank has."""
    gathered = _gathered(sums)
    names = sorted({name for own in gathered for name in own})
    found = {name: [own[name] for own in gathered if name in own] for name in names}
    return {name: (sum(value for value, _ in pairs), sum(w for _, w in pairs)) for name, pairs in found.items()}
