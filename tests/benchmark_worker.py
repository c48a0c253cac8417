"""Small benchmarks for the tests, and lives of jobs that end where a test wants them to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_sage.benchmark import store as storing
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.perform import perform
from hf_sage.benchmark.store import JobFolder

DOMAINS = ("day", "dusk", "night", "noon")


def paint(root: Path, images: int = 6) -> Path:
    """A folder of images, ``domain/class/*.png``: four domains, two classes."""
    rng = np.random.default_rng(0)
    for level, domain in enumerate(DOMAINS):
        for label in ("cat", "dog"):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 120, (16, 16, 3)) + 40 * level
                pixels[:8] += 15 * (label == "cat")
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def job(dataset: str | Path, **changes: Any) -> Job:
    arguments: dict[str, Any] = {
        "method": "sage",
        "held_out": ("night",),
        "seed": 0,
        "steps": 8,
        "evaluate_every": 4,
    }  # of 5 an epoch
    arguments |= {"transform": "domainbed", "rows_per_domain": 2}
    arguments |= {"hyperparameters": {"learning_rate": 1e-2, "rho": 1e-2, "gamma": 1e-3}}
    return Job(dataset=str(dataset), **arguments | changes)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(folder: Path, moment: str) -> None:
    """Performs a job and is killed at a moment: after ``update N``, or before ``result`` or ``done`` is written."""
    torch.set_num_threads(1)
    what, _, number = moment.partition(" ")

    def progress(step: int) -> None:
        if what == "update" and step == int(number):
            kill()

    write: Callable[[Path, str], None] = storing.write_atomic

    def write_until(path: Path, text: str) -> None:
        if path.name.startswith(what):
            kill()
        write(path, text)

    storing.write_atomic = write_until  # type: ignore[assignment]
    perform(JobFolder(folder), progress)


def sweep(folders: Sequence[JobFolder], diary: Path) -> None:
    """Performs all jobs that nobody else has, and writes what became of each."""
    torch.set_num_threads(1)
    diary.write_text("".join(f"{perform(folder, lambda _: None)}\n" for folder in folders))
