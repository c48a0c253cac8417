"""What a step found, averaged between two log entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

import torch
import torch.distributed as dist

from hf_sage.engine import StepReport
from hf_sage.engine.distributed import is_distributed


class StepLog:
    """Collects the reports of steps without a synchronisation with the device, and averages them when asked."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._group_losses: dict[Hashable, list[tuple[torch.Tensor, float]]] = defaultdict(list)
        self._skipped = 0

    def add(self, report: StepReport, facts: Mapping[str, torch.Tensor]) -> None:
        """Adds one step and what its corrections reported."""
        if not report.is_finite:
            self._skipped += 1
            return
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
        counts = {"skipped_perturbations": self._skipped}
        self.__init__()  # type: ignore[misc]
        averages = {name: value / weight for name, (value, weight) in sorted(_over_ranks(sums).items()) if weight}
        return averages | {name: float(count) for name, count in counts.items() if count}


def _over_ranks(sums: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Adds up (sum, weight) pairs over ranks, whichever of them each rank has."""
    if not is_distributed():
        return sums
    gathered: list[dict[str, tuple[float, float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sums)
    names = sorted({name for own in gathered for name in own})
    found = {name: [own[name] for own in gathered if name in own] for name in names}
    return {name: (sum(value for value, _ in pairs), sum(w for _, w in pairs)) for name, pairs in found.items()}
