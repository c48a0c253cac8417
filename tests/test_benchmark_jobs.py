"""Jobs: a name that follows from the arguments, one owner at a time, and the same result however often they are cut."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from benchmark_worker import DOMAINS, job, live, paint, sweep
from rich.console import Console

from hf_sage.benchmark import driver
from hf_sage.benchmark.claims import STALE_SECONDS, Claim, ClaimedError, living_owner
from hf_sage.benchmark.disk import is_disk_full
from hf_sage.benchmark.driver import drive
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.perform import Outcome, perform
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.benchmark.workers import process_context

DEAD = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": 0.0, "token": "dead"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("pictures"))


def folder_of(own: Job, root: Path, **options: Any) -> JobFolder:
    return Store(root).add([own], Options(**options))[0]


def quiet(_: int) -> None:
    """No progress bar."""


def timeless(result: Result) -> Result:
    return replace(result, seconds=0.0)


# ---- Names ----


def test_the_digest_is_the_same_in_every_process_and_follows_every_argument() -> None:
    own = Job("pictures", "sage", ("night", "day"), 0, 8, hyperparameters={"learning_rate": 1e-3, "rho": 0.1})
    assert own.digest == "2bdbdb94b115cb85"  # changes whenever finished runs would be done again
    assert Job.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    shuffled = replace(own, hyperparameters=dict(reversed(own.hyperparameters.items())))
    assert shuffled.digest == own.digest
    others = {
        "method": "erm", "held_out": ("day",), "seed": 1, "steps": 9, "trial": 1, "model": "m", "head": "zero_shot",
        "prompt": "{}", "rows_per_domain": 3, "evaluate_every": 2, "transform": "swad", "test_convention": "full",
        "hyperparameters": {}, "training": {"weight_decay": 0.1}, "dataset": "others",
    }  # fmt: skip
    assert set(others) == set(own.to_dict())
    assert len({own.digest, *(replace(own, **{name: value}).digest for name, value in others.items())}) == 16


# ---- Claims ----


@pytest.mark.parametrize("left_behind", [[], [DEAD], [DEAD, DEAD], ["cut short"]])
def test_one_of_many_gets_the_claim(left_behind: list[Any], tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for i, owner in enumerate(left_behind):
            (folder / f"claim-{i}").write_text(json.dumps(owner) if owner is DEAD else "{")
            os.utime(folder / f"claim-{i}", (0, 0))
        barrier, release, winners, losers = threading.Barrier(8), threading.Event(), [], []

        def contend(folder: Path = folder, barrier: Any = barrier, release: Any = release, *, won: Any = winners,
                    lost: Any = losers) -> None:  # fmt: skip
            barrier.wait()
            try:
                with Claim(folder) as claim:
                    won.append(claim)
                    release.wait(10)
            except ClaimedError:
                lost.append(1)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(losers) < 7 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(winners) <= 1  # while it is held
        release.set()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert not list(folder.iterdir())  # nothing is left behind


def test_a_claim_is_held_by_the_living_and_by_no_other(tmp_path: Path) -> None:
    with Claim(tmp_path):
        assert str(os.getpid()) in (living_owner(tmp_path) or "")
        with pytest.raises(ClaimedError, match=str(os.getpid())), Claim(tmp_path):
            pass
    assert living_owner(tmp_path) is None
    claim = tmp_path / "claim-0"
    claim.write_text(json.dumps(DEAD | {"pid": os.getpid()}))  # the number is in use again, by another process
    assert living_owner(tmp_path) is None
    claim.write_text(json.dumps(DEAD | {"host": "elsewhere"}))
    assert living_owner(tmp_path) is not None
    os.utime(claim, (time.time() - STALE_SECONDS - 1,) * 2)
    assert living_owner(tmp_path) is None


def test_a_sleeper_notices_that_it_was_succeeded(tmp_path: Path) -> None:
    with Claim(tmp_path) as sleeper:
        (tmp_path / "claim-0").write_text(json.dumps(DEAD | {"host": "elsewhere", "token": sleeper._token}))
        os.utime(tmp_path / "claim-0", (0, 0))
        with Claim(tmp_path) as successor:
            assert sleeper.lost
            assert not successor.lost


# ---- Interruptions ----


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a job that was never interrupted."""
    folder = folder_of(job(pictures), tmp_path_factory.mktemp("whole"))
    assert perform(folder, quiet) == Outcome("done")
    return folder.result()


def test_killed_anywhere_and_resumed_equals_never_killed(pictures: Path, whole: Result, tmp_path: Path) -> None:
    context = process_context()
    folder = folder_of(job(pictures), tmp_path)
    began = {}
    for moment in ("update 2", "update 6", "result", "done"):
        process = context.Process(target=live, args=(folder.path, moment))
        process.start()
        process.join()
        assert process.exitcode == -9, moment
        assert folder.state == ("waiting" if moment == "update 2" else "interrupted")
        began[moment] = sorted(path.name for path in folder.path.glob("checkpoint-*"))
    at_the_end = ["checkpoint-8"]
    assert began == {"update 2": [], "update 6": ["checkpoint-4"], "result": at_the_end, "done": at_the_end}
    steps: list[int] = []
    assert perform(folder, steps.append) == Outcome("done")
    assert steps == []  # nothing was left to train
    assert timeless(folder.result()) == timeless(whole)
    assert [evaluation.step for evaluation in whole.evaluations] == [0, 4, 8]
    assert sorted(path.name for path in folder.path.iterdir()) == ["done", "job.json", "result.json"]


def test_a_job_is_done_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(job(pictures, steps=2), tmp_path)
    assert perform(folder, quiet) == Outcome("done")
    before = (folder.path / "result.json").stat().st_mtime_ns
    monkeypatch.setattr("hf_sage.benchmark.perform.run", None)  # would fail
    assert perform(folder, quiet) == Outcome("was done")
    assert folder_of(job(pictures, steps=2), tmp_path).is_done
    assert drive(Store(tmp_path), [folder]) == 0
    assert (folder.path / "result.json").stat().st_mtime_ns == before


def test_a_job_of_another_process_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    folder = folder_of(job(pictures), tmp_path)
    with Claim(folder.path):
        assert perform(folder, quiet).state == "elsewhere"
        assert folder.state.startswith("running")


def test_processes_share_a_folder_without_doing_a_job_twice(pictures: Path, tmp_path: Path) -> None:
    folders = Store(tmp_path / "out").add([job(pictures, steps=2, seed=seed) for seed in range(4)], Options())
    tasks = [process_context().Process(target=sweep, args=(folders, tmp_path / str(i))) for i in range(2)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0]
    assert all(folder.is_done for folder in folders)
    outcomes = [line for i in range(2) for line in (tmp_path / str(i)).read_text().split("\n") if line]
    assert sorted(line for line in outcomes if line == "done") == ["done"] * 4
    assert all(line in ("done", "was done") or line.startswith("elsewhere") for line in outcomes)


def test_a_failing_job_is_told_about_and_the_others_go_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        job(pictures, steps=2, rows_per_domain=1, training={"gradient_accumulation_steps": 2}),
        job(pictures, steps=2),
    ]
    folders = Store(tmp_path).add(jobs, Options())
    assert drive(Store(tmp_path), folders, workers=1) == 1
    bad, good = folders
    assert (bad.state, good.state) == ("failed", "done")
    assert "cannot share equally" in bad.error.read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 jobs are done" in said
    assert str(bad.error) in said
    assert f"hf-sage benchmark resume {tmp_path}" in said


def test_a_full_disk_loses_nothing(
    pictures: Path, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Store(tmp_path).add([job(pictures), job(pictures, seed=1)], Options())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sage.benchmark.records.os.fsync", full)  # of results; checkpoints still fit
        assert drive(Store(tmp_path), folders, workers=1) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is full" in said
    assert f"hf-sage benchmark resume {tmp_path}" in said
    assert [folder.state for folder in folders] == ["interrupted", "waiting"]  # the second is not begun in vain
    steps: list[int] = []
    assert perform(folders[0], steps.append) == Outcome("done")
    assert steps == []  # repeats only what was not written
    assert timeless(folders[0].result()) == timeless(whole)


def test_a_full_disk_is_known_by_what_libraries_say(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path()
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"), here)
    assert is_disk_full(RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), here)
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "")
    assert is_disk_full(wrapped, here)
    assert not is_disk_full(ValueError("PytorchStreamWriter failed"), here)  # with room on the disk
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"), here)
    with monkeypatch.context() as patch:  # without room
        patch.setattr("hf_sage.benchmark.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8 vs 7"), here)
        assert not is_disk_full(RuntimeError("shape mismatch"), here)


def test_killed_workers_are_begun_again_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Store(tmp_path).add([job(pictures, seed=seed) for seed in (0, 1)], Options())
    begun: list[list[int]] = []

    def run_all(jobs: list[Job], *_: Any, **__: Any) -> dict[int, Outcome]:
        begun.append([own.seed for own in jobs])
        if 0 in begun[-1]:  # the system kills the worker that has this one
            (folders[0].path / f"claim-{len(begun)}").write_text(json.dumps(DEAD))
            raise BrokenProcessPool
        return dict.fromkeys(range(len(jobs)), Outcome("done"))

    monkeypatch.setattr(driver, "run_all", run_all)
    outcomes = driver._perform_all(folders, 2, None, Console(quiet=True))
    assert begun == [[0, 1], [0, 1], [1]]
    assert [outcomes[folder].state for folder in folders] == ["failed", "done"]
    assert "memory" in folders[0].error.read_text()


def test_what_failed_an_earlier_time_is_tried_when_workers_are_killed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Store(tmp_path).add([job(pictures, seed=seed) for seed in (0, 1)], Options())
    folders[1].error.write_text("of an earlier time")
    begun: list[list[int]] = []

    def run_all(jobs: list[Job], *_: Any, **__: Any) -> dict[int, Outcome]:
        begun.append([own.seed for own in jobs])
        if len(begun) == 1:
            (folders[0].path / "claim-0").write_text(json.dumps(DEAD))
            raise BrokenProcessPool
        return dict.fromkeys(range(len(jobs)), Outcome("done"))

    monkeypatch.setattr(driver, "run_all", run_all)
    outcomes = driver._perform_all(folders, 2, None, Console(quiet=True))
    assert begun == [[0, 1], [0, 1]]
    assert {outcome.state for outcome in outcomes.values()} == {"done"}


def test_workers_that_never_begin_are_given_up(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Store(tmp_path).add([job(pictures)], Options())
    tries: list[None] = []

    def run_all(*_: Any, **__: Any) -> dict[int, Outcome]:
        tries.append(None)
        assert len(tries) < 10
        raise BrokenProcessPool

    monkeypatch.setattr(driver, "run_all", run_all)
    with pytest.raises(OSError, match="--workers"):
        driver._perform_all(folders, 2, None, Console(quiet=True))
    assert len(tries) == driver.ATTEMPTS


# ---- Results ----


def test_every_evaluation_holds_every_domain_and_the_saved_model_is_the_best(pictures: Path, tmp_path: Path) -> None:
    folder = folder_of(job(pictures, steps=5, evaluate_every=2), tmp_path, save_model=True)
    assert perform(folder, quiet) == Outcome("done")
    result = folder.result()
    assert [evaluation.step for evaluation in result.evaluations] == [0, 2, 4, 5]
    for evaluation in result.evaluations:
        assert list(evaluation.accuracy) == list(DOMAINS)
        assert all(set(own) == {"in", "out"} for own in evaluation.accuracy.values())
    assert result.data.rows == dict.fromkeys(DOMAINS, 12)
    assert result.model_step in (0, 2, 4, 5)
    assert (folder.model / "model.safetensors").exists()
    entries = [entry for entry in result.log if "eval_avg_accuracy" in entry]
    assert all({"eval_worst_accuracy", "eval_gap"} <= set(entry) for entry in entries)
    best = max(entries, key=lambda entry: entry["eval_avg_accuracy"])
    assert result.model_step == best["step"]
    assert Result.from_json(result.to_json()) == result


def test_data_that_changed_has_another_fingerprint(whole: Result, tmp_path: Path) -> None:
    copy = paint(tmp_path / "pictures")
    unchanged = folder_of(job(copy, steps=1), tmp_path)
    perform(unchanged, quiet)
    assert unchanged.result().data.fingerprint == whole.data.fingerprint  # wherever the folder lies
    (copy / "day" / "cat" / "0.png").rename(copy / "day" / "dog" / "9.png")
    changed = folder_of(job(copy, steps=1, seed=1), tmp_path)
    perform(changed, quiet)
    assert changed.result().data.fingerprint != whole.data.fingerprint


PARENT = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.workers import run_all

def work(i, progress):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_all([Job("d", "erm", ("a",), seed, 1) for seed in range(3)], work, workers=2, console=Console(), tell=str)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They would wait for work for ever, with their memory."""
    script, diary = tmp_path / "parent.py", tmp_path / "diary"
    script.write_text(PARENT)
    diary.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(diary)], stdout=subprocess.DEVNULL)

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240  # two interpreters import torch, beside other tests
        while not condition():
            assert time.monotonic() < deadline
            assert process.poll() in (None, -signal.SIGKILL)
            time.sleep(0.1)

    wait_until(lambda: len(list(diary.iterdir())) == 2)
    process.kill()
    process.wait()
    wait_until(lambda: not any(psutil.pid_exists(int(file.name)) for file in diary.iterdir()))
