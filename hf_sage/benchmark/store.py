"""The folder of a benchmark: a folder for each job, named by the digest of its arguments.

```
DIR/jobs/<digest>/job.json       the arguments, and options that change no number
                  claim-0        who runs it now
                  checkpoint-*   while it runs
                  result.json    when it has finished
                  model/         if models are saved
                  done           empty; written last, so that what it marks is whole
                  error.txt      why it failed, the last time it was tried
```
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_sage.benchmark.claims import living_owner
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.records import make_folder, write_atomic
from hf_sage.benchmark.results import Result


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job."""

    path: Path

    @cached_property
    def job(self) -> Job:
        """Its arguments.

        Raises:
            ValueError: If ``job.json`` is none; the message names it.
        """
        return Job.from_dict(self._description["arguments"])

    @property
    def options(self) -> Options:
        """Its options."""
        return Options(**self._description["options"])

    @cached_property
    def _description(self) -> dict[str, Any]:
        file = self.path / "job.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return {"arguments": values["arguments"], "options": values["options"]}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} does not describe a job ({error}). Remove its folder and run again.") from error

    @property
    def model(self) -> Path:
        """Where the model goes."""
        return self.path / "model"

    @property
    def error(self) -> Path:
        """Where a failure is told."""
        return self.path / "error.txt"

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        return (self.path / "done").exists()

    @property
    def state(self) -> str:
        """``done``, ``running (process ...)``, ``failed``, ``interrupted`` or ``waiting``."""
        if self.is_done:
            return "done"
        if owner := living_owner(self.path):
            return f"running ({owner})"
        if self.error.exists():
            return "failed"
        return "interrupted" if any(self.path.glob("checkpoint-*")) else "waiting"

    def result(self) -> Result:
        """The result.

        Raises:
            ValueError: If it cannot be read; the message names it.
        """
        file = self.path / "result.json"
        try:
            return Result.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: {error} Remove its folder, and the run is done again.") from error

    def finish(self, result: Result) -> None:
        """Writes the result, marks the job as done, and only then lets go of its checkpoints."""
        write_atomic(self.path / "result.json", result.to_json())
        write_atomic(self.path / "done", "")
        self.error.unlink(missing_ok=True)
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)


class Store:
    """All jobs in the folder of a benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """A folder that a benchmark has been run in.

        Raises:
            FileNotFoundError: If it is none.
        """
        if not (Path(folder) / "jobs").is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder of a benchmark: give the one that `hf-sage benchmark run` wrote to."
            )
        return cls(Path(folder))

    def add(self, jobs: Iterable[Job], options: Options) -> list[JobFolder]:
        """Makes the folders of jobs, those that exist already left as they are but for the options.

        Raises:
            OSError: If the folder cannot be written to.
        """
        make_folder(self.folder)
        folders = []
        for job in jobs:
            own = JobFolder(self.folder / "jobs" / job.digest)
            own.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"arguments": job.to_dict(), "options": asdict(options)}, indent=1) + "\n"
            file = own.path / "job.json"
            if not own.is_done and (not file.exists() or file.read_text(encoding="utf-8") != text):
                write_atomic(file, text)
            folders.append(own)
        return folders

    def jobs(self) -> list[JobFolder]:
        """All jobs: by dataset, seed, trial, held-out domain and method."""
        folders = [JobFolder(file.parent) for file in self.folder.glob("jobs/*/job.json")]
        return sorted(folders, key=lambda f: (f.job.dataset, f.job.seed, f.job.trial, f.job.held_out, f.job.method))

    def results(self) -> list[Result]:
        """The results of the jobs that are done.

        Raises:
            ValueError: If none is.
        """
        found = [folder.result() for folder in self.jobs() if folder.is_done]
        if not found:
            raise ValueError(f"No job in {self.folder} has finished: `hf-sage benchmark resume {self.folder}` goes on.")
        return found
