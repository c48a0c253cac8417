"""Accuracy of every split of every domain from one evaluation loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from hf_sage.benchmark.inputs import Cell
from hf_sage.benchmark.results import Evaluation, source_summary

_PREFIX = "eval_"
_SPLITS = ("in", "out")
SOURCE_LOSS = "source_loss"
"""Mean cross-entropy over the out-splits of the source domains: the loss that evaluation reports by itself is over the
held-out domain, too, and nothing may be chosen by that."""
TIMES = ("runtime", "per_second", "elapsed", "preparation_time")
"""Endings of the log's entries that differ from run to run."""


class Scores:
    """A `compute_metrics` over consecutive cells of rows.

    It returns ``<domain>/in`` and ``<domain>/out``, over the out-splits of the source domains ``avg_accuracy``,
    ``worst_accuracy``, ``gap`` and ``source_loss``, and ``elapsed``, the seconds since `start`.

    Args:
        cells: The splits of the domains, as they follow each other in the evaluated rows.
        sources: The domains that are trained on.
    """

    def __init__(self, cells: Sequence[Cell], sources: Sequence[str]) -> None:
        self._cells = cells
        self._sources = list(sources)
        self._started = time.perf_counter()

    def start(self, log: Sequence[dict[str, Any]]) -> None:
        """Starts the clock, where an interrupted run's log left it."""
        self._started = time.perf_counter() - max((entry.get("eval_elapsed", 0.0) for entry in log), default=0.0)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores classes and losses (see `class_and_loss`)."""
        classes, losses = prediction.predictions
        right = np.asarray(classes) == prediction.label_ids
        ends = np.cumsum([cell.rows for cell in self._cells])[:-1]
        accuracy: dict[str, dict[str, float]] = {}
        source_losses = []
        for cell, own, own_losses in zip(self._cells, np.split(right, ends), np.split(losses, ends), strict=True):
            accuracy.setdefault(cell.domain, {})[cell.split] = float(own.mean())
            if cell.split == "out" and cell.domain in self._sources:
                source_losses.append(float(own_losses.mean()))
        flat = {f"{domain}/{split}": value for domain, own in accuracy.items() for split, value in own.items()}
        elapsed = time.perf_counter() - self._started
        validation = {SOURCE_LOSS: fmean(source_losses)}
        return flat | source_summary(accuracy, self._sources) | validation | {"elapsed": elapsed}


def class_and_loss(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each row is taken for, and its cross-entropy: right after the pass, so that no logits pile up."""
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(-1), cross_entropy(scores.float(), labels, reduction="none")


def evaluations(log: Sequence[dict[str, Any]]) -> list[Evaluation]:
    """The evaluations in a trainer's log, in order."""
    found = []
    for entry in log:
        accuracy: dict[str, dict[str, float]] = {}
        for key, value in entry.items():
            domain, _, split = key.removeprefix(_PREFIX).rpartition("/")
            if key.startswith(_PREFIX) and domain and split in _SPLITS:
                accuracy.setdefault(domain, {})[split] = value
        if accuracy:
            found.append(Evaluation(entry["step"], accuracy))
    return found


def without_times(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The entries of training and evaluation as they are in every run of the same job."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in entries]
