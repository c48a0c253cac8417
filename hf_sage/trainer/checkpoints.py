"""Restarts: only from checkpoints that were written whole, and with the weights that they hold."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_sage.engine.distributed import gathered
from hf_sage.rules import Memory
from hf_sage.trainer.settings import Settings

STATE = "trainer_state.json"
"""What Trainer writes last."""

MEMORIES = "method.pt"
"""What the rules of a method remember."""


def complete_checkpoints(folder: str | Path, world_size: int = 1) -> list[str]:
    """The checkpoints of a folder that were written whole, oldest first.

    A checkpoint is whole if its trainer state, which the first rank writes last, can be read, and if every rank's
    random state is there where there are several.

    Args:
        folder: An ``output_dir``.
        world_size: The number of processes that wrote them.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return [str(path) for path in found if _is_complete(path, world_size)]


class Checkpoints(Settings):
    """Whole checkpoints only, all of their weights, and what the method's rules remember."""

    _memories: dict[str, Memory]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base's; ``resume_from_checkpoint=True`` takes the newest checkpoint that was written whole.

        The base takes the newest, which a killed run may have left half-written.

        Raises:
            ValueError: If there are checkpoints, but none is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_complete_checkpoint() or True  # none at all: the base says so
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_complete_checkpoint(self) -> str | None:
        folder = Path(str(self.args.output_dir))
        world_size = 1 if self.args.save_only_model else self.args.world_size
        own = [Path(path).name for path in complete_checkpoints(folder, world_size)]
        everyones = gathered(own)  # machines may have folders of their own
        common = [name for name in own if all(name in other for other in everyones)]
        if not common and any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"None of the checkpoints in {folder} was written whole"
                + (f" by {world_size} processes" if world_size > 1 else "")
                + ", so there is none to resume from. Start anew without resume_from_checkpoint, or name a checkpoint."
            )
        return str(folder / common[-1]) if common else None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # What an earlier run left under the same name would make this one look whole before it is, or be remembered.
        folder = Path(self._get_output_dir(trial=args[1] if len(args) > 1 else kwargs.get("trial")))
        folder = folder / f"checkpoint-{self.state.global_step}"
        stale = [folder / STATE, folder / MEMORIES] if self.args.should_save else []
        for file in [*stale, folder / f"rng_state_{self.args.process_index}.pth"]:
            file.unlink(missing_ok=True)
        super()._save_checkpoint(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._memories = {}  # also where a training begins anew with smaller batches
        return super()._inner_training_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and any(self._memories.values()):
            torch.save(self._memories, Path(output_dir, MEMORIES))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint, MEMORIES) if checkpoint is not None else None
        if file is not None and file.is_file():
            self._memories = torch.load(file, map_location=self.args.device, weights_only=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_renamed(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_renamed(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()


def load_renamed(model: nn.Module, folder: str) -> bool:
    """Loads the weights of a checkpoint that were saved under other names than the model's; says whether they were.

    transformers 5 saves some models (ViT among them) under the names of its earlier releases, and Trainer, which does
    not translate them back, goes on with whatever weights the model has (huggingface/transformers#43701).
    """
    file = Path(folder, "model.safetensors")
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return False
    with safe_open(str(file), framework="pt") as stored:
        if set(stored.keys()) <= set(model.state_dict()):
            return False
    translated = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(translated.state_dict())
    return True


def _is_complete(checkpoint: Path, world_size: int) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    states = [checkpoint / f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else []
    return all(zipfile.is_zipfile(file) for file in states)  # a zip's directory is its end
