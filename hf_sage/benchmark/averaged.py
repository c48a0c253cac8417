"""SWAD in a benchmark: what is averaged and by which loss, and how a run that was killed goes on."""

from __future__ import annotations

import os
from pathlib import Path

from hf_sage.benchmark.entrants import is_averaged
from hf_sage.benchmark.hyperparameters import for_swad
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.scores import SOURCE_LOSS
from hf_sage.trainer import SAGETrainer
from hf_sage.trainer.checkpoints import complete_checkpoints
from hf_sage.trainer.swad import FILE as AVERAGES
from hf_sage.trainer.swad import SWADCallback


def averaging_of(job: Job) -> SWADCallback | None:
    """SWAD's callback, for a job that averages: its valley is found on the validation rows of the source domains."""
    if not is_averaged(job.method):
        return None
    return SWADCallback(f"eval_{SOURCE_LOSS}", **for_swad(job.hyperparameters))


def last_checkpoint(job: Job, folder: Path) -> Path | None:
    """The checkpoint to go on from; for SWAD one that has its averages."""
    whole = [Path(found) for found in complete_checkpoints(folder, int(os.environ.get("WORLD_SIZE", "1")))]
    if is_averaged(job.method):
        whole = [found for found in whole if (found / AVERAGES).is_file()]
    return whole[-1] if whole else None


def end_averaging(trainer: SAGETrainer, averaging: SWADCallback, checkpoint: Path) -> None:
    """What SWAD does when training ends, for a run that was killed after its last update."""
    trainer._load_from_checkpoint(str(checkpoint))  # for what is not averaged: running statistics
    trainer._load_rng_state(str(checkpoint))  # which DomainBed's validation images are augmented from
    averaging.on_train_begin(trainer.args, trainer.state, trainer.control)
    averaging.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
