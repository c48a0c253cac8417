"""Updates that were left out because a gradient was not finite: counted, and the groups at fault named once."""

from __future__ import annotations

import logging

from hf_sage.engine import StepReport
from hf_sage.engine.distributed import gathered, own_rank

logger = logging.getLogger(__name__)


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
        groups = sorted({name for own in gathered(self.groups) for name in own})
        if own_rank():
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
