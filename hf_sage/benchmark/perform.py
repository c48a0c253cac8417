"""One job from claim to result: done once, gone on with where it stopped, and told about where it failed."""

from __future__ import annotations

import os
import re
import subprocess
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from hf_sage.benchmark.claims import Claim, ClaimedError
from hf_sage.benchmark.disk import is_disk_full
from hf_sage.benchmark.launch import launch_command
from hf_sage.benchmark.records import write_atomic
from hf_sage.benchmark.runs import Progress, run
from hf_sage.benchmark.store import JobFolder

State = Literal["done", "was done", "elsewhere", "failed", "disk full"]

_ERROR = re.compile(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception)\b.*:")
_LAUNCHERS = re.compile("CalledProcessError|ChildFailedError")  # say no more than that a process has failed


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        state: ``done`` now, ``was done`` before, held ``elsewhere``, ``failed``, or stopped by a ``disk full``.
        message: Who holds it, or why it failed.
    """

    state: State
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.message}" if self.message else self.state


def perform(folder: JobFolder, progress: Progress, *, launch: Sequence[str] | None = None) -> Outcome:
    """Claims a job and runs it, unless it is done or another process has it.

    Args:
        folder: The job.
        progress: Called with the number of updates done.
        launch: Flags of ``accelerate launch`` to start it by; ``None`` runs it in this process.

    Returns:
        What became of it; an error is written to ``error.txt`` and returned, never raised.
    """
    try:
        with Claim(folder.path) as claim:
            if folder.is_done:
                return Outcome("was done")
            if launch is not None:
                return _launched(folder, launch)

            def still_ours(step: int) -> None:
                progress(step)
                if step % 50 == 0 and claim.lost:
                    raise ClaimedError("a process that took this one for dead")

            work(folder, still_ours)
            return Outcome("done")
    except ClaimedError as error:
        return Outcome("elsewhere", str(error))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        return fail(folder, f"{type(error).__name__}: {error}", text, is_disk_full(error, folder.path))


def work(folder: JobFolder, progress: Progress | None = None) -> None:
    """Runs a claimed job and, in the first process, writes its result."""
    options = folder.options
    result = run(
        folder.job,
        folder.path,
        options=options,
        checkpoints=True,
        save_to=folder.model if options.save_model else None,
        progress=progress,
    )
    if is_first_process():
        folder.finish(result)


def fail(folder: JobFolder, message: str, text: str, disk_full: bool) -> Outcome:
    """Notes a failure in the job's folder, if that takes anything."""
    with suppress(OSError):
        write_atomic(folder.error, text)
    return Outcome("disk full" if disk_full else "failed", message)


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that ``accelerate launch`` started; alone it is."""
    return int(os.environ.get("RANK", "0")) == 0


def _launched(folder: JobFolder, flags: Sequence[str]) -> Outcome:
    """The job in processes of its own; what they say is kept for the case that they fail."""
    on_cpu = bool(folder.job.training.get("use_cpu", False))
    command, environment = launch_command(flags, on_cpu=on_cpu)
    command += ["-m", "hf_sage.benchmark.process", str(folder.path)]
    ran = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if folder.is_done:
        return Outcome("done")
    said = ran.stdout.strip().splitlines()[-100:]
    errors = [line for line in said if _ERROR.match(line) and not _LAUNCHERS.search(line)]
    reason = [*said[-1:], *errors][-1] if said else "it said nothing"
    message = f"accelerate launch ended with status {ran.returncode}: {reason}"
    return fail(folder, message, "\n".join(said) + "\n", is_disk_full(RuntimeError("\n".join(said)), folder.path))
