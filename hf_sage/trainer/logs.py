"""What the steps found, averaged between two log entries."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping

import torch

from hf_sage.engine import StepReport
from hf_sage.engine.distributed import gathered
from hf_sage.trainer.precision_guard import PrecisionGuard
from hf_sage.trainer.skipped_steps import SkippedSteps


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
        self.add_facts(facts)
        for group, loss in report.group_losses.items():
            self._group_losses[group].append(loss)

    def add_facts(self, facts: Mapping[str, torch.Tensor]) -> None:
        """Adds what rules have to say, by name; each is averaged over the steps that said it."""
        for name, value in facts.items():
            self._values[name].append(value)

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
        if math.isnan(averages.get("agreement", 0.0)):
            del averages["agreement"]  # of a method that does not tell the groups' gradients apart
        return averages | self.precision.pop() | self.skipped.pop()


def _over_ranks(sums: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Adds up (sum, weight) pairs over ranks, whichever of them each rank has."""
    everyones = gathered(sums)
    names = sorted({name for own in everyones for name in own})
    found = {name: [own[name] for own in everyones if name in own] for name in names}
    return {name: (sum(value for value, _ in pairs), sum(w for _, w in pairs)) for name, pairs in found.items()}
