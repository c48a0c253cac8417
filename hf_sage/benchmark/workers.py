"""Runs jobs in a few processes, one thread each, under a progress bar that shows what runs and how long is left."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_sage.benchmark.records import Record
from hf_sage.benchmark.runs import Job, run

PASSES = {"erm": 1, "sam": 2, "sage": 3}
"""Rough cost of an update, for the bar's estimate alone."""


def run_all(
    jobs: Sequence[Job],
    *,
    workers: int,
    console: Console,
    save_to: Callable[[Job], Path | None] | None = None,
) -> list[Record]:
    """Runs all jobs and returns their records in the order of the jobs.

    Args:
        jobs: What to run.
        workers: Number of processes.
        console: Where the progress bar goes.
        save_to: Where to save a job's model, if anywhere.

    Raises:
        Exception: What a job raised, after the others were cancelled.
    """
    context = mp.get_context("spawn")  # torch's threads do not survive a fork
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
    with (
        context.Manager() as manager,
        bar,
        ProcessPoolExecutor(workers, context, initializer=_quiet_and_on_one_thread) as pool,
    ):
        queue = manager.Queue()
        futures = [pool.submit(_work, i, job, save_to(job) if save_to else None, queue) for i, job in enumerate(jobs)]
        watch = _Watch(bar, jobs)
        pending = set(range(len(jobs)))
        try:
            while pending:
                watch.update(queue)
                for i in sorted(i for i in pending if futures[i].done()):
                    pending.discard(i)
                    record = futures[i].result()
                    if not console.is_terminal:  # where a bar cannot be drawn
                        console.print(f"{len(jobs) - len(pending)}/{len(jobs)} {jobs[i].name}: {record.seconds:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        watch.finish()
    return [future.result() for future in futures]


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Watch:
    """Turns messages (job, step) into one bar over all jobs."""

    def __init__(self, bar: Progress, jobs: Sequence[Job]) -> None:
        self._bar = bar
        self._jobs = jobs
        self._steps = [0] * len(jobs)
        self._task = bar.add_task("starting", total=sum(self._cost(job) * job.steps for job in jobs))

    @staticmethod
    def _cost(job: Job) -> int:
        return PASSES.get(job.method, 3)

    def update(self, queue: Any) -> None:
        try:
            while True:
                i, step = queue.get(timeout=0.2)
                self._steps[i] = step
        except Empty:
            pass
        running = [job for job, step in zip(self._jobs, self._steps, strict=True) if 0 < step < job.steps]
        done = sum(step == job.steps for job, step in zip(self._jobs, self._steps, strict=True))
        names = ", ".join(f"{job.method}/{job.held_out}/{job.seed}" for job in running) or "loading"
        cost = sum(self._cost(job) * step for job, step in zip(self._jobs, self._steps, strict=True))
        self._bar.update(self._task, completed=cost, description=f"{done}/{len(self._jobs)} runs · {names:<36}")

    def finish(self) -> None:
        self._bar.update(self._task, completed=self._bar.tasks[self._task].total, description="all runs done")


def _quiet_and_on_one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # the terminal belongs to the bar over all runs
    transformers.logging.set_verbosity_error()


def _work(i: int, job: Job, save_to: Path | None, queue: Any) -> Record:
    every = max(1, job.steps // 50)
    with tempfile.TemporaryDirectory() as scratch:
        return run(
            job,
            Path(scratch),
            save_to=save_to,
            progress=lambda step: queue.put((i, step)) if step % every == 0 or step == job.steps else None,
        )
