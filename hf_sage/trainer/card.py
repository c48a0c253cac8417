"""What a trainer knows of its model, for the model card; what it does not know is left out, not guessed."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import Trainer
from transformers.modelcard import TASK_MAPPING

from hf_sage.methods import Method
from hf_sage.publishing import CardFacts, Result
from hf_sage.publishing.checks import is_repo_id
from hf_sage.trainer.groups import class_names, domains_of
from hf_sage.trainer.papers import paper_of

HUB_FILE = re.compile(r"^hf://datasets/(?P<id>[^@]+)@(?P<revision>[^/]+)/")
SHOWN = (
    "learning_rate",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)
"""The fields of TrainingArguments that a card lists."""


def facts_of_trainer(trainer: Trainer, method: Method, column: str | None, **given: Any) -> CardFacts:
    """The facts that a trainer holds.

    Args:
        trainer: The trainer.
        method: Its method.
        column: Its domain column.
        given: Fields of `CardFacts` that the user states; those that are ``None`` count as not given.
    """
    state, args = trainer.state, trainer.args
    sources = _source_domains(trainer, column)
    base = _base_model(trainer.model)
    dataset_id, dataset_revision = _hub_dataset(trainer.train_dataset)
    results = results_of(state.log_history, state.best_global_step if _is_best(trainer) else state.global_step, sources)
    stated = {name: value for name, value in given.items() if value is not None}
    facts: dict[str, Any] = {
        "name": Path(args.output_dir).absolute().name,
        "method": method.name,
        "paper": paper_of(method.name),
        "method_settings": method_settings(method),
        "training_settings": {name: _plain(getattr(args, name)) for name in SHOWN if hasattr(args, name)}
        | {"steps": state.global_step},
        "base_model": base,
        "origin": base and f"Fine-tuned from [{base}](https://huggingface.co/{base}).",
        "dataset": dataset_id,
        "dataset_ids": [dataset_id] if dataset_id else [],
        "dataset_revision": dataset_revision,
        "source_domains": sources,
        "held_out": sorted({result.domain for result in results if result.held_out}),
        "results": results,
        "selection": _selection(trainer),
        "compute": _compute(trainer),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
        | {"hf_sage": version("hf-sage")},
        "limits": [
            "One training with one seed: the spread over seeds is not measured here.",
            *([] if results else ["These weights were not evaluated by domain."]),
            *([] if any(r.held_out for r in results) else ["No domain that was kept from training was tested on."]),
        ],
        "pipeline_tag": _task(trainer.model),
        "library_name": "peft" if hasattr(trainer.model, "peft_config") else "transformers",
    }
    return CardFacts(**facts | stated)


def method_settings(method: Method) -> dict[str, object]:
    """Every hyperparameter of a method: the fields of its rules, and its interval where it has one."""
    rules: list[Any] = list(method.rules.values())
    settings = {item.name: getattr(rule, item.name) for rule in rules if is_dataclass(rule) for item in fields(rule)}
    return settings if method.ascent_interval == 1 else settings | {"ascent_interval": method.ascent_interval}


def results_of(log: Iterable[Mapping[str, Any]], step: int | None, sources: Iterable[str]) -> list[Result]:
    """The metrics by domain that were logged at a step by evaluations under the names ``eval`` and ``test``.

    What was evaluated after the training counts too, whatever the step it was logged at: the best checkpoint may have
    been loaded since.

    Args:
        log: The trainer's log.
        step: The step of the published weights.
        sources: The domains that were trained on; empty where they are not known.
    """
    entries: dict[str, Any] = {}
    is_over = False
    for entry in log:
        is_over = "train_runtime" in entry or (is_over and "loss" not in entry)
        if is_over or entry.get("step") == step:
            entries |= entry
    known = set(sources)
    return [
        Result(domain, value, metric, domain not in known if known else None, split)
        for prefix, split in (("eval", "validation"), ("test", "test"))
        for domain, metric, value in _by_domain(entries, prefix)
    ]


def _by_domain(entries: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, float]]:
    """Domain, metric and value of the entries ``<prefix>_<domain>_<metric>``, for the metrics that have an average.

    Where there is a dictionary of evaluation sets, its names are the domains; those inside a set, which come as
    ``<prefix>_<set>_<domain>_<metric>`` beside the set's own average, are left to the log.
    """
    start = f"{prefix}_avg_"
    metrics = sorted((key.removeprefix(start) for key in entries if key.startswith(start)), key=len, reverse=True)
    for key, value in entries.items():
        metric = next((m for m in metrics if key.endswith(f"_{m}")), None)  # the longest: balanced_accuracy is none of
        if metric is None or metric.endswith("loss") or not key.startswith(f"{prefix}_"):  # accuracy's domains
            continue
        domain = key.removeprefix(f"{prefix}_").removesuffix(metric).removesuffix("_")
        parts = domain.split("_")
        is_inner = any(f"{prefix}_{'_'.join(parts[:i])}_avg_{metric}" in entries for i in range(1, len(parts)))
        if domain not in ("", "avg", "worst") and not is_inner:
            yield domain, metric, float(value)


def _source_domains(trainer: Trainer, column: str | None) -> list[str]:
    """The domains of the training set, where they are known without reading all of its rows."""
    logged = {k.removeprefix("loss/") for entry in trainer.state.log_history for k in entry if k.startswith("loss/")}
    data = trainer.train_dataset
    if not logged and column is not None and isinstance(data, datasets.Dataset) and column in data.column_names:
        names = class_names(data, column)
        logged = {names.get(value, value) for value in domains_of(data, column)}
    return sorted(logged)


def _base_model(model: Any) -> str | None:
    """The Hub id a model was loaded from.

    A path looks like an id, and may be gone by now: a name counts as an id if the Hub's cache has its configuration.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not is_repo_id(name) or Path(name).exists():
        return None
    return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None


def _hub_dataset(data: Any) -> tuple[str | None, str | None]:
    """The Hub id and commit of a training set, from where its files were downloaded."""
    info = data.info if isinstance(data, datasets.Dataset | datasets.IterableDataset) else None
    files: Iterable[str] = getattr(info, "download_checksums", None) or ()
    found = {(str(match["id"]), str(match["revision"])) for file in files if (match := HUB_FILE.match(file))}
    return next(iter(found)) if len(found) == 1 else (None, None)


def _task(model: Any) -> str | None:
    name = type(model).__name__
    for task, mapping in TASK_MAPPING.items():
        if any(name == known or (isinstance(known, tuple | list) and name in known) for known in mapping.values()):
            return str(task)
    return None


def _is_best(trainer: Trainer) -> bool:
    """Whether the weights are those of the best checkpoint, which is loaded when the training is over."""
    is_chosen = trainer.args.load_best_model_at_end and trainer.state.best_global_step is not None
    return bool(is_chosen and not trainer.is_in_train)


def _selection(trainer: Trainer) -> str:
    state = trainer.state
    if _is_best(trainer):
        return (
            f"The weights are those after step {state.best_global_step}, the best of the evaluated checkpoints by "
            f"`{trainer.args.metric_for_best_model}` ({state.best_metric:.4f})."
        )
    of = f" of {state.max_steps}" if trainer.is_in_train and state.global_step < state.max_steps else ""
    return f"The weights are those after step {state.global_step}{of}: nothing was chosen among checkpoints."


def _compute(trainer: Trainer) -> dict[str, str]:
    device = trainer.args.device
    compute = {
        "Device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "Processes": str(trainer.args.world_size),
        "Parameters": f"{sum(p.numel() for p in trainer.model.parameters()):,}",
    }
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return compute | ({"Seconds of training": f"{seconds[-1]:.0f}"} if seconds else {})


def _plain(value: Any) -> object:
    """An enumeration's member by its value."""
    return getattr(value, "value", value)
