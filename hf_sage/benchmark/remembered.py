"""The configurations that the folder of a benchmark was run with: ``config.yaml``, of more ``config-2.yaml``, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from hf_sage.benchmark.config import OPTIONS
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.parsing import parse_config, read_config
from hf_sage.benchmark.records import write_atomic


def remember(folder: Path, entries: Mapping[str, Any]) -> None:
    """Keeps a configuration beside those that the folder has.

    Args:
        folder: The folder of a benchmark.
        entries: As `hf_sage.benchmark.parsing.read_config` reads them.
    """
    if any(own == entries for _, own in remembered(folder)):
        return
    names = ("config.yaml" if number == 1 else f"config-{number}.yaml" for number in count(1))
    free = next(name for name in names if not (folder / name).exists())
    write_atomic(folder / free, yaml.safe_dump(dict(entries), sort_keys=False))


def remembered(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The configurations of a folder and their files, by name.

    Raises:
        ValueError: If one cannot be read.
    """
    files = [*folder.glob("config.yaml"), *folder.glob("config-[0-9]*.yaml")]
    return [(file, read_config(file)) for file in sorted(files)]


def is_tuned(entries: Mapping[str, Any]) -> bool:
    """Whether trials are run with the first seeds only, and the one chosen with the others."""
    return entries.get("tuning_seeds") is not None and entries.get("trials", 1) > 1


def tuning_notes(folder: Path) -> list[str]:
    """What tables have to say of how trials were chosen, where that was not done for every seed by itself."""
    seeds = {entries["tuning_seeds"] for _, entries in remembered(folder) if is_tuned(entries)}
    return [
        f"All trials were run with the first {'seed' if number == 1 else f'{number} seeds'} of a method only; its "
        "other seeds repeat, for each held-out domain, the one trial that training-domain validation chose there."
        for number in sorted(seeds)
    ]


def repeats_to_come(folder: Path, jobs: Sequence[Job]) -> int:
    """How many runs of chosen trials are not among the jobs of a folder yet.

    Args:
        folder: The folder of a benchmark.
        jobs: Its jobs.
    """
    to_come = 0
    for file, entries in remembered(folder):
        if not is_tuned(entries):
            continue
        # Where the data is, which is checked, does not matter here, and may be another machine.
        config = parse_config({name: own for name, own in entries.items() if name not in OPTIONS}, str(file))
        seeds: dict[tuple[str, str, tuple[str, ...]], set[int]] = {}
        for job in jobs:
            if job.dataset in config.datasets and job.method in config.methods:
                seeds.setdefault((job.dataset, job.method, job.held_out), set()).add(job.seed)
        to_come += sum(len(set(config.seeds_of(method)) - own) for (_, method, _), own in seeds.items())
    return to_come
