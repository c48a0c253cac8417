"""One run of a benchmark: trained, evaluated on every domain, checkpointed, recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed

from hf_sage.benchmark.averaged import averaging_of, end_averaging, last_checkpoint
from hf_sage.benchmark.collator import USE, USES, CollatorByUse
from hf_sage.benchmark.entrants import has_muon, is_averaged, method_of
from hf_sage.benchmark.hyperparameters import as_fields
from hf_sage.benchmark.inputs import Inputs, load_inputs
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.results import Result, best_evaluation, library_versions
from hf_sage.benchmark.scores import Scores, class_and_loss, evaluations, without_times
from hf_sage.data import TensorDomains, preprocess
from hf_sage.data.callback import DrawsCallback
from hf_sage.models import image_classifier
from hf_sage.trainer import SAGEConfig, SAGETrainer
from hf_sage.trainer.checkpoints import STATE
from hf_sage.trainer.muon import muon

Progress = Callable[[int], None]
DEFAULTS = Options()

SET_BY_THE_BENCHMARK = {
    "output_dir": "the benchmark's folder",
    "method": "`methods`",
    "method_options": "`methods`",
    "seed": "`seeds`",
    "data_seed": "`seeds`",
    "max_steps": "`steps`",
    "num_train_epochs": "`steps`",
    "per_device_train_batch_size": "`rows_per_domain`",
    "learning_rate": "`learning_rate`",
    "eval_strategy": "`evaluate_every`",
    "eval_steps": "`evaluate_every`",
    "eval_on_start": "`evaluate_every`",
    "save_strategy": "`evaluate_every`",
    "save_steps": "`evaluate_every`",
    "save_total_limit": "`evaluate_every`",
    "logging_steps": "`evaluate_every`",
    "logging_strategy": "`evaluate_every`",
    "remove_unused_columns": "the benchmark",
    "load_best_model_at_end": "`save_models`",
    "metric_for_best_model": "`save_models`",
    "resume_from_checkpoint": "`hf-sage benchmark resume`",
    "domain_column": "the benchmark",
    "push_to_hub": "`hf-sage push`",
    "hub_token": "`hf auth login`",
}
"""Fields of `SAGEConfig` that a job's ``training`` may not hold, and what sets them."""


def run(
    job: Job,
    folder: Path,
    *,
    options: Options = DEFAULTS,
    checkpoints: bool = False,
    save_to: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Trains on the source domains and evaluates every domain, before the first update, on the way and at the end.

    A job whose ``evaluate_every`` is its ``steps`` is evaluated once, after the last update.

    Args:
        job: What to run.
        folder: A folder for the trainer.
        options: Where the data is.
        checkpoints: Whether every evaluation leaves a checkpoint in ``folder``; the run then goes on from the last one
            there, and comes out as if it had never stopped.
        save_to: Where to save model and processor, if anywhere, as they were at the best evaluation on the source
            domains (see `best_evaluation`).
        progress: Called after every update with the number of updates done.

    Returns:
        The result.

    Raises:
        ValueError: If data, model or arguments will not do; the message says what will.
    """
    set_seed(job.seed)
    inputs = load_inputs(job, options)
    model, processor = image_classifier(job.model, inputs.facts.classes, head=job.head, prompt=job.prompt)
    sources = [domain for domain in inputs.facts.rows if domain not in job.held_out]
    averaging = averaging_of(job)
    last = last_checkpoint(job, folder) if checkpoints else None
    arguments = _arguments(job, folder, len(sources), checkpoints, starts_anew=last is None, small=inputs.small)
    scores = Scores(inputs.cells, sources)
    in_memory = inputs.small and job.transform == "none"
    train, evaluated = _processed(inputs, processor) if in_memory else _undecoded(inputs, job)
    collator = None if in_memory else CollatorByUse(processor, job.transform)
    trainer = SAGETrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=processor,
        compute_metrics=scores,
        preprocess_logits_for_metrics=class_and_loss,
        callbacks=[_AtTheEnd()] if averaging is None else [_AtTheEnd(), averaging],
        optimizer_cls_and_kwargs=muon(arguments) if has_muon(job.method) else None,
    )
    if collator is not None:
        trainer.add_callback(DrawsCallback(collator.training))
    if progress is not None:
        trainer.add_callback(_Progress(progress))
    trainer.remove_callback(PrinterCallback)  # the terminal belongs to the progress bar
    if save_to is not None and averaging is None:
        trainer.add_callback(_SaveBest(trainer, save_to))
    before = None if last is None else TrainerState.load_from_json(str(last / STATE))
    scores.start([] if before is None else before.log_history)
    if last is not None and before is not None and before.global_step >= job.steps:  # killed after the last checkpoint
        trainer.state = before
        if averaging is not None:
            end_averaging(trainer, averaging, last)
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if averaging is not None:  # the weights are the average since training ended: it alone is what the run stands for
        trainer.evaluate()
        if save_to is not None:
            trainer.save_model(str(save_to))
    log = trainer.state.log_history
    found = evaluations(log) if averaging is None else evaluations(log)[-1:]
    return Result(
        job=job,
        data=inputs.facts,
        evaluations=found,
        log=without_times(log),
        seconds=max(entry.get("eval_elapsed", 0.0) for entry in log),
        device=torch.cuda.get_device_name() if arguments.device.type == "cuda" else arguments.device.type,
        processes=arguments.world_size,
        parameters=sum(p.numel() for p in model.parameters()),
        model_step=None if save_to is None else best_evaluation(found, sources).step,
        versions=library_versions(),
    )


def _arguments(
    job: Job, folder: Path, sources: int, checkpoints: bool, *, starts_anew: bool, small: bool
) -> SAGEConfig:
    once = job.evaluate_every >= job.steps
    settings: dict[str, Any] = {
        "per_device_eval_batch_size": 500 if small else 64,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
    }
    settings |= job.training | as_fields(job.hyperparameters)
    arguments = SAGEConfig(
        str(folder),
        method=method_of(job.method),
        seed=job.seed,
        max_steps=job.steps,
        eval_strategy="steps",
        eval_steps=min(job.evaluate_every, job.steps),
        eval_on_start=starts_anew and not once,
        save_strategy="steps" if checkpoints else "no",
        save_steps=min(job.evaluate_every, job.steps),
        save_total_limit=2 if is_averaged(job.method) else 1,  # the averages come when the one before is gone
        logging_steps=_logging_steps(job),
        remove_unused_columns=False,  # the collator reads the images itself
        **settings,
    )
    rows = job.rows_per_domain * sources
    shares = arguments.world_size * arguments.gradient_accumulation_steps
    if rows % shares:
        raise ValueError(
            f"A batch of {job.rows_per_domain} rows of each of {sources} domains is {rows} rows, which {shares} "
            "micro-batches (processes × gradient_accumulation_steps) cannot share equally. Change one of the three."
        )
    arguments.per_device_train_batch_size = rows // shares
    return arguments


def _logging_steps(job: Job) -> int:
    """About 50 entries a run, one with every checkpoint: what is averaged between entries is in no checkpoint."""
    every = min(job.evaluate_every, job.steps)
    return max(n for n in range(1, max(1, job.steps // 50) + 1) if every % n == 0)


def _processed(inputs: Inputs, processor: Any) -> tuple[Any, Any]:
    """The rows to train on and to evaluate, kept in memory; the latter without domains, so that they stay in order."""
    evaluated = preprocess(inputs.evaluated, processor)
    columns = {name: values for name, values in evaluated.columns.items() if name != "domain"}
    return preprocess(inputs.train, processor), TensorDomains(columns, evaluated.features)


def _undecoded(inputs: Inputs, job: Job) -> tuple[Any, Any]:
    """The same as stored, to be decoded when they are read."""
    uses = [use for cell in inputs.cells for use in [USES[cell.domain in job.held_out]] * cell.rows]
    return inputs.train, inputs.evaluated.remove_columns("domain").add_column(USE, uses)


class _AtTheEnd(TrainerCallback):
    """Evaluates after the last update, wherever that falls."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps


class _SaveBest(TrainerCallback):
    """Saves the model at every evaluation better than those before it, ahead of that evaluation's checkpoint."""

    def __init__(self, trainer: SAGETrainer, folder: Path) -> None:
        self._trainer = trainer
        self._folder = folder

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        *before, now = [entry["eval_avg_accuracy"] for entry in state.log_history if "eval_avg_accuracy" in entry]
        if now > max(before, default=-1.0):
            self._trainer.save_model(str(self._folder))


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step)
