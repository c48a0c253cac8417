"""Runs jobs in a few processes, one thread each, under a progress bar that shows what runs and how long is left."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from queue import Empty
from typing import Any, TypeVar

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_sage.benchmark.entrants import method_of
from hf_sage.benchmark.jobs import Job
from hf_sage.methods import METHODS

Outcome = TypeVar("Outcome")


def run_all(
    jobs: Sequence[Job],
    work: Callable[[int, Callable[[int], None]], Outcome],
    *,
    workers: int,
    console: Console,
    tell: Callable[[Outcome], str],
    stop: Callable[[Outcome], bool] = lambda _: False,
) -> dict[int, Outcome]:
    """Does the work of all jobs and returns what came of each, by its number; nothing of jobs that were stopped.

    On a CPU every job runs on one thread, so that its numbers do not depend on how many run beside it. Of several GPUs
    each worker sees one.

    Args:
        jobs: What is run.
        work: Does the job of a number, calling its second argument with the number of updates done. With several
            workers it is sent to other processes: it must be a function of a module, or a `functools.partial` of one.
        workers: Number of processes; 1 is this one.
        console: Where the progress bar goes.
        tell: What to print of an outcome where a bar cannot be drawn.
        stop: Whether an outcome makes the jobs that have not begun pointless.

    Raises:
        Exception: What a job raised, after the others were cancelled.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
    with bar:
        watch = _Watch(bar, jobs, tell)
        outcomes = _here(work, watch, stop) if workers == 1 else _beside(work, watch, stop, workers)
        watch.finish()
    return outcomes


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_context() -> Any:
    """How workers start: by a fork not of this process, which has threads, but of a server that has only imported."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hf_sage.benchmark.perform"])
    return context


def cost(method: str) -> int:
    """Rough cost of an update by a method, in passes over the batch: for the bar's estimate alone."""
    built = METHODS[method_of(method)]()
    return 1 + (built.ascent is not None) + built.needs_groups


def _here(work: Any, watch: _Watch, stop: Callable[[Any], bool]) -> dict[int, Any]:
    outcomes: dict[int, Any] = {}
    with _as_before():
        _quiet_and_on_one_thread()
        for i in range(len(watch.jobs)):
            outcomes[i] = work(i, lambda step, i=i: watch.show(i, step))
            watch.done(i, outcomes[i])
            if stop(outcomes[i]):
                break
    return outcomes


def _beside(work: Any, watch: _Watch, stop: Callable[[Any], bool], workers: int) -> dict[int, Any]:
    outcomes: dict[int, Any] = {}
    context = process_context()
    with context.Manager() as manager:
        devices = manager.Queue()
        for device in _devices(workers):
            devices.put(device)
        steps = manager.Queue()
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(devices,)) as pool:
            futures = [pool.submit(_work, work, i, job.steps, steps) for i, job in enumerate(watch.jobs)]
            pending = set(range(len(futures)))
            try:
                while pending:
                    watch.listen(steps)
                    for i in sorted(i for i in pending if futures[i].done()):
                        pending.discard(i)
                        if futures[i].cancelled():
                            continue
                        outcomes[i] = futures[i].result()
                        watch.done(i, outcomes[i])
                        if stop(outcomes[i]):
                            pool.shutdown(wait=False, cancel_futures=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return outcomes


def _devices(workers: int) -> list[str | None]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES names it."""
    count = torch.cuda.device_count()
    if not count:
        return [None] * workers
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else [str(i) for i in range(count)]
    return [gpus[i % len(gpus)] for i in range(workers)]


class _Watch:
    """One bar over all jobs."""

    def __init__(self, bar: Progress, jobs: Sequence[Job], tell: Callable[[Any], str]) -> None:
        self.jobs = jobs
        self._bar = bar
        self._tell = tell
        self._steps = [0] * len(jobs)
        self._finished: set[int] = set()
        self._task = bar.add_task("starting", total=sum(cost(job.method) * job.steps for job in jobs))

    def listen(self, steps: Any) -> None:
        """Takes messages (job, step) off a queue until none has come for a while."""
        try:
            while True:
                i, step = steps.get(timeout=0.2)
                self._steps[i] = step
        except Empty:
            pass
        self._draw()

    def show(self, i: int, step: int) -> None:
        """The job of a number has done so many updates."""
        self._steps[i] = step
        self._draw()

    def done(self, i: int, outcome: Any) -> None:
        """The job of a number has ended."""
        self._finished.add(i)
        self._steps[i] = self.jobs[i].steps
        if not self._bar.console.is_terminal:  # where a bar cannot be drawn
            line = f"{len(self._finished)}/{len(self.jobs)} {self.jobs[i].name}: {self._tell(outcome)}"
            self._bar.console.print(line, markup=False, highlight=False)
        self._draw()

    def _draw(self) -> None:
        running = [job for i, job in enumerate(self.jobs) if self._steps[i] > 0 and i not in self._finished]
        names = ", ".join(f"{job.method}/{'+'.join(job.held_out)}/{job.seed}" for job in running) or "loading"
        done = sum(cost(job.method) * step for job, step in zip(self.jobs, self._steps, strict=True))
        description = f"{len(self._finished)}/{len(self.jobs)} runs · {names:<36}"
        self._bar.update(self._task, completed=done, description=description)

    def finish(self) -> None:
        """No job is left to begin."""
        self._bar.update(self._task, description=f"{len(self._finished)}/{len(self.jobs)} runs done")


def _begin(devices: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = devices.get()
    if device is not None:  # before anything asks CUDA
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    _quiet_and_on_one_thread()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever. Its job resumes from its checkpoint."""
    if (parent := mp.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _quiet_and_on_one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # the terminal belongs to the bar over all runs
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


@contextmanager
def _as_before() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        enable = transformers.logging.enable_progress_bar, datasets.enable_progress_bars
        for shown, show in zip(bars, enable, strict=True):
            if shown:
                show()


def _work(work: Any, i: int, total: int, steps: Any) -> Any:
    every = max(1, total // 50)
    return work(i, lambda step: steps.put((i, step)) if step % every == 0 or step == total else None)
