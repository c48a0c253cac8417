"""All jobs of a benchmark, one after the other or side by side, whatever becomes of single ones."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch
from rich.console import Console

from hf_sage.benchmark.claims import is_abandoned
from hf_sage.benchmark.launch import launch_command
from hf_sage.benchmark.perform import Outcome, fail, perform
from hf_sage.benchmark.runs import Progress
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.benchmark.workers import available_cores, run_all

ATTEMPTS = 2
"""How often a job is begun whose process the system kills; of those killed together only one may be at fault."""


def drive(store: Store, folders: Sequence[JobFolder], *, workers: int | None = None, launch: str | None = None) -> int:
    """Performs the jobs that are not done, and sums up.

    Args:
        store: The benchmark.
        folders: Its jobs, in order.
        workers: Number of processes on this machine; by default one a GPU, or one a core.
        launch: Flags of ``accelerate launch``, to run every job by it.

    Returns:
        0, or 1 if a job has failed.

    Raises:
        ValueError: If the flags are not accelerate's, or both are given.
    """
    flags = None if launch is None else shlex.split(launch)
    if flags is not None:
        launch_command(flags)  # what is wrong with them is told before anything runs
        if workers is not None and workers > 1:
            raise ValueError("--launch runs the jobs in sequence, each in its own processes: leave --workers out.")
        workers = 1
    if workers is not None and workers < 1:
        raise ValueError(f"--workers needs a whole number, 1 or more; got {workers}.")
    console = Console()
    waiting = [folder for folder in folders if not folder.is_done]
    workers = min(workers or torch.cuda.device_count() or available_cores(), max(1, len(waiting)))
    how = f"{workers} process(es)" if launch is None else f"each by accelerate launch {launch}"
    done = len(folders) - len(waiting)
    console.print(f"{len(folders)} jobs in {store.folder}, {done} done before; {how}.", highlight=False, markup=False)
    outcomes = _perform_all(waiting, workers, flags, console)
    return _sum_up(store, folders, outcomes, console)


def _perform_all(
    folders: Sequence[JobFolder], workers: int, flags: Sequence[str] | None, console: Console
) -> dict[JobFolder, Outcome]:
    outcomes: dict[JobFolder, Outcome] = {}
    begun: Counter[JobFolder] = Counter()
    before = {folder: _failed_at(folder) for folder in folders}
    fruitless = 0
    while left := [folder for folder in folders if folder not in outcomes and not folder.is_done]:
        try:
            found = run_all(
                [folder.job for folder in left],
                partial(_work, left, flags),
                workers=min(workers, len(left)),
                console=console,
                tell=str,
                stop=lambda outcome: outcome.state == "disk full",
            )
            return outcomes | {left[i]: outcome for i, outcome in found.items()}
        except BrokenProcessPool as error:  # the system has killed a worker, and the pool the others
            if not any(is_abandoned(folder.path) or _failed_at(folder) != before[folder] for folder in left):
                fruitless += 1
                if fruitless == ATTEMPTS:
                    raise OSError(
                        "Processes are killed by the system before they begin a job, for want of memory perhaps: try "
                        "fewer --workers."
                    ) from error
            for folder in left:
                if _failed_at(folder) != before[folder]:
                    outcomes[folder] = Outcome("failed", "see its error.txt")
                elif is_abandoned(folder.path):
                    begun[folder] += 1
                    if begun[folder] == ATTEMPTS:
                        message = (
                            "its process was killed by the system, for want of memory perhaps: try fewer --workers"
                        )
                        outcomes[folder] = fail(folder, message, f"{message}\n", disk_full=False)
    return outcomes


def _failed_at(folder: JobFolder) -> int | None:
    """When a job failed the last time, by the file system's clock."""
    return folder.error.stat().st_mtime_ns if folder.error.exists() else None


def _work(folders: Sequence[JobFolder], flags: Sequence[str] | None, i: int, progress: Progress) -> Outcome:
    return perform(folders[i], progress, launch=flags)


def _sum_up(store: Store, folders: Sequence[JobFolder], outcomes: dict[JobFolder, Outcome], console: Console) -> int:
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    done = sum(folder.is_done for folder in folders)
    tell(f"{done} of {len(folders)} jobs are done.")
    again = f"`hf-sage benchmark resume {store.folder}`"
    if elsewhere := [folder for folder, outcome in outcomes.items() if outcome.state == "elsewhere"]:
        tell(f"{len(elsewhere)} run elsewhere; {again} does what they leave.")
    failed = {folder: outcome for folder, outcome in outcomes.items() if outcome.state in ("failed", "disk full")}
    alike: dict[str, list[JobFolder]] = {}
    for folder, outcome in failed.items():
        alike.setdefault(outcome.message, []).append(folder)
    for message, (folder, *others) in alike.items():
        more = f" and {len(others)} more" if others else ""
        tell(f"Failed: {folder.job.name}{more}: {message} ({folder.error})")
    if any(outcome.state == "disk full" for outcome in failed.values()):
        tell(
            f"The disk that holds {store.folder} is full. Nothing that was finished is lost: make room, then "
            f"{again} repeats only what was not written."
        )
    elif failed:
        tell(f"{again} tries the failed ones again, from their last checkpoints.")
    return 1 if failed else 0
