"""SWAD: the average of the weights over the flat stretch of a training, found by the validation loss."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sage.vectors import widened

logger = logging.getLogger(__name__)

FILE = "swad.pt"
"""What a checkpoint holds of the averages."""


@dataclass
class Segment:
    """The weights between two evaluations: their mean, over how many updates, and the validation loss at its end."""

    mean: list[Tensor]
    updates: int
    last_update: int
    loss: float


class SWADCallback(TrainerCallback):
    """Averages the weights after every update, and keeps the average over the valley of the validation loss.

    Cha et al. 2021, arXiv 2102.08604, Algorithm 1, "dense and overfit-aware". Between two evaluations the weights are
    averaged. The valley begins with the first segment whose loss the next ``patience`` − 1 do not go below; it ends
    before the first ``overfit_patience`` segments in a row whose losses are all above ``tolerance`` times the mean loss
    of its beginning. When training ends the model's weights *are* the average; where no valley was found, that of the
    last segment. Running statistics are those of the end of training. The averages take up to ``overfit_patience`` + 2
    copies of the weights.

    It works with every method. Evaluations set the segments: choose ``eval_strategy="steps"`` (the paper's
    ``eval_steps``: 50 to 500). Averages are saved in each checkpoint and taken from it when training resumes.

    Args:
        metric: The validation loss, in what `evaluate` returns, default ``"eval_loss"``.
        patience: N_s, default 3 (the paper's).
        overfit_patience: N_e, default 6.
        tolerance: r, default 1.3 (1.2 for VLCS).
    """

    def __init__(
        self, metric: str = "eval_loss", patience: int = 3, overfit_patience: int = 6, tolerance: float = 1.3
    ) -> None:
        self.metric = metric
        self.patience = patience
        self.overfit_patience = overfit_patience
        self.tolerance = tolerance
        self._running: list[Tensor] | None = None
        self._count = 0
        self._valley: Segment | None = None  # the average over the valley so far
        self._pending: list[Segment] = []  # later segments, of which it is not yet known whether they belong to it
        self._threshold = math.inf
        self._is_over = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts anew, or from where the checkpoint left the averages."""
        if args.eval_strategy == "no":
            raise ValueError(
                'SWADCallback needs evaluations to find the valley by: set eval_strategy="steps" and eval_steps.'
            )
        if state.global_step == 0:
            self._forget()
            return
        file = Path(str(args.output_dir), f"checkpoint-{state.global_step}", FILE)
        if not file.is_file():
            raise ValueError(
                f"{file.parent} holds no averages of SWADCallback: it was not there when the checkpoint was saved, or "
                "the training was killed right then. Resume from an earlier checkpoint, or leave the callback out."
            )
        self._load(torch.load(file, map_location=args.device, weights_only=True))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Adds the weights to the running average."""
        if self._is_over:
            return
        weights = [p.detach() for p in model.parameters()]
        self._count += 1
        if self._running is None:
            self._running = [widened(w).clone() for w in weights]
        else:
            for mean, w in zip(self._running, weights, strict=True):
                mean.lerp_(w.to(mean.dtype), 1 / self._count)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Ends a segment."""
        if self._is_over or self._running is None or self.metric not in metrics:
            return
        self._pending.append(Segment(self._running, self._count, state.global_step, metrics[self.metric]))
        self._running, self._count = None, 0
        if self._valley is None:
            window = self._pending[-self.patience :]
            self._pending = window
            if len(window) == self.patience and window[0].loss <= min(segment.loss for segment in window):
                self._threshold = self.tolerance * fmean(segment.loss for segment in window)
                self._valley = self._pending.pop(0)
            return
        while len(self._pending) >= self.overfit_patience and not self._is_over:
            if min(segment.loss for segment in self._pending) > self._threshold:
                self._is_over, self._pending = True, []
            else:
                self._add(self._pending.pop(0))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the averages with the checkpoint."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if not (state.is_world_process_zero and folder.is_dir()):
            return
        unfinished = folder / f".{FILE}"
        try:
            torch.save(self._state(), unfinished)
            os.replace(unfinished, folder / FILE)  # whole or not at all: a half would stop the training that resumes
        finally:
            unfinished.unlink(missing_ok=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Puts the average in the model."""
        while self._valley is not None and self._pending and not self._is_over:
            if min(segment.loss for segment in self._pending) > self._threshold:
                break
            self._add(self._pending.pop(0))
        found = self._valley or (self._pending[-1] if self._pending else None)
        if found is None:
            logger.warning(
                "SWAD has nothing to average: no evaluation gave %r. The weights are the last ones.", self.metric
            )
            return
        with torch.no_grad():
            for p, mean in zip(model.parameters(), found.mean, strict=True):
                p.copy_(mean)
        if state.is_world_process_zero:
            logger.info("SWAD: the weights are the average of %d updates, up to %d.", found.updates, found.last_update)

    def _add(self, segment: Segment) -> None:
        """Every update of the valley counts the same."""
        assert self._valley is not None
        total = self._valley.updates + segment.updates
        for mean, own in zip(self._valley.mean, segment.mean, strict=True):
            mean.lerp_(own, segment.updates / total)
        self._valley.updates, self._valley.last_update = total, segment.last_update

    def _forget(self) -> None:
        self._running, self._count, self._valley = None, 0, None
        self._pending, self._threshold, self._is_over = [], math.inf, False

    def _state(self) -> dict[str, Any]:
        return {
            "running": self._running,
            "count": self._count,
            "pending": [vars(segment) for segment in self._pending],
            "valley": None if self._valley is None else vars(self._valley),
            "threshold": self._threshold,
            "is_over": self._is_over,
        }

    def _load(self, held: dict[str, Any]) -> None:
        self._running, self._count = held["running"], held["count"]
        self._pending = [Segment(**segment) for segment in held["pending"]]
        self._valley = None if held["valley"] is None else Segment(**held["valley"])
        self._threshold, self._is_over = held["threshold"], held["is_over"]
