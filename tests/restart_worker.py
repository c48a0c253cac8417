"""Trainings that stop; as ``python restart_worker.py``, one in a process of its own for each line of input.

The processes are forked: imports of their own would take each of them ten times as long as the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import CLASSES, SAGE, Rows, accuracy, build, entries, image_rows
from transformers import CLIPConfig, CLIPForImageClassification, EarlyStoppingCallback, set_seed

from hf_sage import SAGETrainer
from hf_sage.trainer.checkpoints import complete_checkpoints

UPDATES = 14
"""Of a life. An epoch has 4."""

OPTIONS = SAGE | {
    "rho": 0.05,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 24,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
}


def clip(dropout: float = 0.2) -> nn.Module:
    set_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"image_size": 16, "patch_size": 8, "attention_dropout": dropout}
    config = CLIPConfig(vision_config=vision, text_config=tower | {"vocab_size": 8}, num_labels=CLASSES)
    return CLIPForImageClassification(config)


class Augmented(Rows):
    """Draws from torch's global generator with each row that is read, as augmentations do."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return row | {"pixel_values": row["pixel_values"] + torch.randn(3, 16, 16)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the names and the bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


# ---- Trainers ----


class Watched(SAGETrainer):
    """Writes a line an update into a diary, and stops where it is told to.

    Attributes:
        stop: ``at`` a place that is named below, with ``step`` updates done, after ``skip`` more times there; with
            ``bytes`` in the first write beyond so many bytes of a file from there on.
        error: What it raises there; ``None`` kills the process.
        diary: A file, or ``None``.
        start: The weights at the start of the update.
    """

    stop: dict[str, Any] | None = None
    error: BaseException | None = None
    diary: Path | None = None
    start: dict[str, Tensor]

    def reach(self, place: str) -> None:
        stop = self.stop or {}
        if stop.get("at") != place or stop["step"] != self.state.global_step:
            return
        if stop.get("skip"):
            stop["skip"] -= 1
        elif "bytes" in stop:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # deadly, where Python ignores it
            resource.setrlimit(resource.RLIMIT_FSIZE, (stop["bytes"], resource.RLIM_INFINITY))
        elif self.error is not None:
            raise self.error
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self._window:
            self.reach("update")
            self.start, self.rows = {name: w.clone() for name, w in model.state_dict().items()}, []
        self.rows += inputs["pixel_values"][:, 0, 0, 0].tolist()  # which no two rows have in common
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training and any(not torch.equal(w, self.start[name]) for name, w in model.state_dict().items()):
            self.reach("second pass")
        return super().compute_loss(model, *args, **kwargs)

    def finish_step(self) -> None:
        before = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        super().finish_step()
        noise = {name: self.model.get_parameter(name).grad - g for name, g in before.items()}
        line = {"update": self.state.global_step, "rows": self.rows, "weights": digest(self.start)}
        line |= {"gradient": digest(before), "noise": digest(noise)}
        if self.diary is not None:
            with self.diary.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.reach("optimizer")

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.reach("evaluation")
        return super().prediction_step(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.reach("save model")
        super().save_model(*args, **kwargs)
        self.reach("save optimizer")

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        self.reach("save random state")
        super()._save_rng_state(*args, **kwargs)
        self.reach("save trainer state")

    def _load_best_model(self) -> None:
        self.reach("load best model")
        super()._load_best_model()


def at(place: str, step: int, **more: int) -> dict[str, Any]:
    """A moment, see `Watched.stop`."""
    return {"at": place, "step": step} | more


class Starved(Watched):
    """Has no memory for a second pass over more than 3 rows, and keeps the sizes it tried and its weights then."""

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tried: list[int] = []

    def reach(self, place: str) -> None:
        if self._train_batch_size > 3:
            super().reach(place)

    def get_train_dataloader(self) -> Any:
        """Where every attempt begins."""
        if self.tried:
            assert digest(self.model.state_dict()) == digest(self.start)
        self.tried.append(self._train_batch_size)
        return super().get_train_dataloader()


def prepare(folder: Path, *, model: Any = None, data: Any = None, **options: Any) -> Any:
    options = OPTIONS | {"trainer": Watched, "output_dir": str(folder), "compute_metrics": accuracy} | options
    return build(model or clip(), data or Rows(image_rows()), eval_dataset=Rows(image_rows(48, seed=5)), **options)


def trained(folder: Path, resume: str | None = None, **options: Any) -> Any:
    trainer = prepare(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- Lives ----


def live(
    folder: str,
    stop: dict[str, Any] | None = None,
    calls: int | None = None,
    patience: int | None = None,
    **options: Any,
) -> None:
    """Goes on from the last checkpoint that is whole until killed or through; then writes ``end.json``.

    It is killed by ``stop``, see `Watched`, or by function call number ``calls`` of the training, wherever that is.
    """
    callbacks = [] if patience is None else [EarlyStoppingCallback(patience)]
    options = {"max_steps": UPDATES, "save_steps": 2} | options
    trainer = prepare(Path(folder), callbacks=callbacks, **options)
    trainer.stop, trainer.diary = stop, Path(folder, "diary.jsonl")
    counter = count(1)

    def profile(_: Any, event: str, __: Any) -> None:
        if event.endswith("call") and next(counter) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    trainer.train(resume_from_checkpoint=bool(complete_checkpoints(folder)))
    sys.setprofile(None)
    log = entries(trainer, "epoch")[:-1]  # the last sums up what came after the restart
    log = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]
    state, weights = trainer.state, digest(trainer.model.state_dict())
    end = {"log": log, "weights": weights, "updates": state.global_step, "calls": next(counter)}
    end |= {"best": Path(state.best_model_checkpoint or "").name, "metric": state.best_metric}
    Path(folder, "end.json").write_text(json.dumps(end))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clip().save_pretrained(folder)  # the first time takes long
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Trainer's own lines
            try:
                live(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
