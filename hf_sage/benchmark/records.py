"""One run of a benchmark as tables see it; and files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One finished run: a method trained on all domains but one, with one seed.

    Args:
        dataset: Name of the benchmark's dataset.
        method: Name of the training method, as in `SAGEConfig.method`.
        held_out: Domain that was kept from training.
        seed: Seed of the split, the initial weights and the batches.
        accuracy: Accuracy on the test rows of the held-out domain, in [0, 1].
        source_accuracy: Accuracy on the validation rows of the source domains, averaged over these domains, in [0, 1].
        steps: Number of updates of the weights, at the checkpoint that counts.
        seconds: Wall-clock time of the training.
        hyperparameters: What the run was trained with (learning rate, rho, gamma, ...).
        history: Entries of the trainer's log, each with its `step` and e.g. `loss`, `agreement`, `noise_scale`.
    """

    dataset: str
    method: str
    held_out: str
    seed: int
    accuracy: float
    source_accuracy: float
    steps: int
    seconds: float
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) that is at every moment either absent or the old one, or complete.

    The text goes to a hidden file in the same folder, reaches the disk, and takes the place of `path` in one step.

    Args:
        path: File to write. Its folder must exist.
        text: Its content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder for results and checks that it takes them.

    Raises:
        OSError: If it cannot be made or written to; the message says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # others may try at the same moment
    except OSError as error:
        raise OSError(
            f"Cannot write to {folder} ({error.strerror}). Name a folder you may write to by --output-dir."
        ) from error


def by_run(records: Iterable[Record]) -> dict[tuple[str, str, int], Record]:
    """The runs of one dataset by (method, held-out domain, seed), in order of appearance.

    Raises:
        ValueError: If the runs are of several datasets, or two of them are of the same method, domain and seed: neither
            may be averaged over, so select first.
    """
    runs: dict[tuple[str, str, int], Record] = {}
    datasets: set[str] = set()
    for record in records:
        key = (record.method, record.held_out, record.seed)
        datasets.add(record.dataset)
        if len(datasets) > 1:
            raise ValueError(f"the runs are of several datasets, {sorted(datasets)}: pass those of one at a time.")
        if key in runs:
            raise ValueError(
                f"two runs of method {record.method!r} with {record.held_out!r} held out and seed {record.seed}: "
                "select one trial first, see `hf_sage.benchmark.selection`."
            )
        runs[key] = record
    return runs
