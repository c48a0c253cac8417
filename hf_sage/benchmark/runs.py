"""One run of a benchmark: a method, a held-out domain, a seed; trained, evaluated, recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_sage.benchmark.records import Record
from hf_sage.data import domain_names, hold_out, load_embedded, preprocess
from hf_sage.metrics import DomainAccuracy, accuracy
from hf_sage.models import tiny_clip
from hf_sage.trainer import SAGEConfig, SAGETrainer

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        dataset: Name of an embedded dataset.
        method: Name of a method.
        held_out: The domain that is not trained on.
        seed: Seed of the split, the initial weights and the batches, so that methods are compared pair by pair.
        steps: Number of updates.
        rows_per_domain: Rows of each source domain in a batch.
        learning_rate: Peak learning rate of AdamW, warmed up over the first tenth and annealed along a cosine.
        hyperparameters: Fields of `SAGEConfig` for the method, e.g. rho.
    """

    dataset: str
    method: str
    held_out: str
    seed: int
    steps: int
    rows_per_domain: int = 16
    learning_rate: float = 1e-3
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for files and progress bars."""
        return f"{self.dataset}-{self.method}-{self.held_out}-seed{self.seed}"


def run(job: Job, scratch: Path, *, save_to: Path | None = None, progress: Progress | None = None) -> Record:
    """Trains on the source domains, chooses nothing, and tests once on the held-out domain after the last step.

    Args:
        job: What to run.
        scratch: A folder for the trainer.
        save_to: Where to save model and processor, if anywhere.
        progress: Called after every update with the number of updates done.

    Returns:
        The record of the run.
    """
    set_seed(job.seed)
    data = hold_out(load_embedded(job.dataset, seed=job.seed), job.held_out)
    model, processor = tiny_clip(data["train"].features["label"].names)
    train, validation, test = (preprocess(data[split], processor) for split in ("train", "validation", "test"))
    arguments = SAGEConfig(
        str(scratch),
        method=job.method,
        seed=job.seed,
        max_steps=job.steps,
        per_device_train_batch_size=job.rows_per_domain * len(domain_names(data["train"])),
        per_device_eval_batch_size=500,
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=job.steps // 10,
        logging_steps=max(1, job.steps // 50),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **job.hyperparameters,
    )
    trainer = SAGETrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[_Progress(progress)] if progress is not None else None,
    )
    trainer.remove_callback(PrinterCallback)  # the terminal belongs to the progress bar
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    source = trainer.evaluate()["eval_avg_accuracy"]
    prediction = trainer.predict(test)
    target = DomainAccuracy().compute(
        predictions=prediction.predictions.argmax(-1),
        references=prediction.label_ids,
        domains=[job.held_out] * len(test),
    )
    assert target is not None  # one process
    if save_to is not None:
        trainer.save_model(str(save_to))
    return Record(
        dataset=job.dataset,
        method=job.method,
        held_out=job.held_out,
        seed=job.seed,
        accuracy=target["accuracy"],
        source_accuracy=source,
        steps=job.steps,
        seconds=seconds,
        hyperparameters={"learning_rate": job.learning_rate} | job.hyperparameters,
        history=[entry for entry in trainer.state.log_history if "loss" in entry],
    )


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step)
