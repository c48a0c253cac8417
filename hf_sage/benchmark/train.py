"""``hf-sage train``: one model on one dataset, with one domain held out."""

# ruff: noqa: T201 - a command prints

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser, set_seed

from hf_sage.benchmark.collator import USE, CollatorByUse
from hf_sage.benchmark.disk import full_disk_explained
from hf_sage.benchmark.launch import check_processes, leave_together, relaunch
from hf_sage.benchmark.parsing import read_config
from hf_sage.benchmark.records import make_folder, write_atomic
from hf_sage.data import OnBadImage, domain_names, hold_out, load_domains
from hf_sage.data.callback import DrawsCallback
from hf_sage.data.transforms import TransformName
from hf_sage.metrics import accuracy
from hf_sage.models import TINY, TINY_CLIP, image_classifier
from hf_sage.models.classifier import Head
from hf_sage.trainer import SAGEConfig, SAGETrainer

FULL_DISK_CURE = (
    "Checkpoints that were written whole are kept: make room, and give the same command with --resume_from_checkpoint "
    "true to go on from the newest (without one, start anew)."
)


@dataclass
class RunArguments:
    """What to train on.

    Attributes:
        dataset: ``style_digits``, ``rotated_digits`` or ``colored_digits``; a folder laid out ``domain/class/*.jpg``;
            or the name of a dataset on the Hub.
        held_out: The domain that is kept from training and tested on at the end.
        model: A checkpoint by Hub name or path, or ``tiny-clip`` or ``tiny-convnext``, which need no download.
        split: Split of a dataset on the Hub.
        revision: Its revision.
        image_column: Column of the images.
        label_column: Column of the labels.
        head: ``linear``, or ``zero_shot``: begun as the text features of the class names (CLIP, SigLIP).
        prompt: What a class name is put into for them.
        root: DomainBed's data directory, for its datasets by name (PACS, ...); else they come from the Hub.
        transform: Augmentation: ``none``, ``domainbed`` or ``swad``, see `hf_sage.data.image_transforms`.
        validation_fraction: Share of each source domain's rows that is validated on.
        on_bad_image: ``error`` names an unreadable image and stops; ``skip`` leaves such images out and counts them.
    """

    dataset: str = field(default="style_digits", metadata={"help": "Embedded name, folder or Hub name."})
    held_out: str | None = field(default=None, metadata={"help": "The domain to keep from training; needed."})
    model: str = field(default=TINY_CLIP, metadata={"help": f"Checkpoint by Hub name or path, or {' or '.join(TINY)}."})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    head: Head = field(default="linear", metadata={"help": "linear or zero_shot (CLIP, SigLIP)."})
    prompt: str = field(default="a photo of a {}.", metadata={"help": "What class names are put into."})
    root: str | None = field(default=None, metadata={"help": "DomainBed's data directory."})
    transform: TransformName = field(default="none", metadata={"help": "Augmentation: none, domainbed or swad."})
    validation_fraction: float = field(default=0.2, metadata={"help": "Share of each source domain to validate on."})
    on_bad_image: OnBadImage = field(default="error", metadata={"help": "Unreadable images: error or skip."})


def main(argv: Sequence[str]) -> int:
    """Runs ``hf-sage train``; see `train`."""
    metrics = train(argv)
    if int(os.environ.get("RANK", "0")) == 0:
        source = metrics.get("eval_avg_accuracy", metrics["eval_accuracy"])  # one group has no average
        print(f"held-out accuracy {metrics['test_accuracy']:.3f}, source {source:.3f}")
    return 0


def parse(argv: Sequence[str]) -> tuple[RunArguments, SAGEConfig, list[str]]:
    """Reads flags, over a YAML file if ``--config`` names one.

    Returns:
        Both groups of arguments, and the flags that belong to neither: those of ``accelerate launch``.

    Raises:
        ValueError: If the file has an entry that is no argument.
    """
    parser = HfArgumentParser((RunArguments, SAGEConfig), prog="hf-sage train", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these arguments; flags win over it.")
    file = _config_option(argv)
    written = [] if file is None else _as_flags(_arguments(file))  # before the flags, so that those win
    run, config, _, rest = parser.parse_args_into_dataclasses([*written, *argv], return_remaining_strings=True)
    return run, config, rest


def train(argv: Sequence[str]) -> dict[str, float]:
    """Trains, evaluates on the source domains and on the held-out one, and saves; the body of ``hf-sage train``.

    Returns:
        The metrics, also written to ``results.json`` in the output directory.

    Raises:
        ValueError, OSError: For arguments, data or folders that will not do; the message says what will.
    """
    run, config, launch_flags = parse(argv)
    if launch_flags:
        relaunch(argv, launch_flags, on_cpu=config.use_cpu)
    check_processes()
    make_folder(Path(config.output_dir))
    set_seed(config.seed)
    column = config.domain_column or "domain"
    columns = {run.image_column: "image", run.label_column: "label"}
    data = load_domains(
        run.dataset,
        seed=config.seed,
        root=run.root,
        split=run.split,
        revision=run.revision,
        on_bad_image=run.on_bad_image,
        image_column=run.image_column,
        label_column=run.label_column,
    )
    if run.held_out is None:
        known = domain_names(data["train"] if isinstance(data, DatasetDict) else data, column)
        raise ValueError(f"Which domain is to be held out? Choose by --held_out one of {', '.join(map(repr, known))}.")
    data = data.rename_columns({own: name for own, name in columns.items() if own != name})
    splits = hold_out(data, run.held_out, run.validation_fraction, config.seed, column)
    classes = splits["train"].features["label"].names
    model, processor = image_classifier(run.model, classes, head=run.head, prompt=run.prompt)
    collator = CollatorByUse(processor, run.transform)
    config.remove_unused_columns = False  # the collator reads the images itself
    trainer = SAGETrainer(
        model,
        config,
        data_collator=collator,
        train_dataset=splits["train"],
        eval_dataset=_used_for("validation", splits),
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[DrawsCallback(collator.training)],
    )
    newest = str(config.resume_from_checkpoint).lower() == "true"
    with full_disk_explained(Path(config.output_dir), FULL_DISK_CURE):
        result = trainer.train(resume_from_checkpoint=newest or config.resume_from_checkpoint)
        trainer.save_model()
        metrics = dict(result.metrics) | trainer.evaluate()
        metrics |= trainer.evaluate(_used_for("test", splits), metric_key_prefix="test")
        if trainer.is_world_process_zero():
            write_atomic(Path(config.output_dir) / "results.json", json.dumps(metrics, indent=1) + "\n")
    leave_together()
    return metrics


def _used_for(use: str, splits: DatasetDict) -> Dataset:
    """A split whose rows tell the collator what they are used for."""
    return splits[use].add_column(USE, [use] * len(splits[use]))


def _config_option(argv: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file: str | None = parser.parse_known_args(list(argv))[0].config
    return file


def _as_flags(entries: dict[str, Any]) -> list[str]:
    """A file's entries as flags, so that they meet the same types and choices."""
    flags: list[str] = []
    for name, value in entries.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
    return flags


def _arguments(file: str) -> dict[str, Any]:
    """A file's entries, all of them names of arguments."""
    entries = read_config(file)
    known = [f.name for kind in (RunArguments, SAGEConfig) for f in fields(kind) if f.init]
    for name in entries:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{file}: {name!r} is no argument" + (f"; did you mean {near[0]!r}?" if near else "."))
    return entries
