"""The scripts run as their headers say, at toy size."""

from __future__ import annotations

import csv
import os
import re
import runpy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from benchmark_worker import job, paint

from hf_sage.benchmark import Evaluation, Options, Result, Store
from hf_sage.benchmark.results import DataFacts

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
TRAIN = ["--held_out", "night", "--max_steps", "2", "--per_device_train_batch_size", "6", "--report_to", "none"]
TRAIN += ["--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return paint(tmp_path / "pictures")


def run(script: str, *argv: str) -> object:
    """Runs a script in this process, as ``python scripts/<script> <argv>`` does; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPTS / script), *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return ended.value.code


def test_train_and_benchmark_are_the_commands(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train.py", "--dataset", str(pictures), "--output_dir", "out", "--use_cpu", *TRAIN) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    flags = ["--methods", "erm", "sam", "--held-out", "night", "--seeds", "1", "--steps", "2", "--rows-per-domain", "2"]
    benchmark = ["--dataset", str(pictures), *flags, "--workers", "1", "--output-dir", "benchmark"]
    assert run("benchmark.py", *benchmark) == 0
    assert run("benchmark.py", "resume", "benchmark") == 0
    assert "2 of 2 jobs are done" in capsys.readouterr().out
    assert run("train.py", "--dataset", str(pictures), "--output_dir", "out") == 1  # which domain?


def test_tune_demo_writes_the_table_of_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tune_demo

    few = partial(tune_demo.demo_jobs, steps=1, methods=["erm", "sage"], held_out=["sketch"])
    monkeypatch.setattr(tune_demo, "demo_jobs", few)
    monkeypatch.setattr(tune_demo, "available_cores", lambda: 1)
    output = tmp_path / "new" / "tuning.csv"
    monkeypatch.setattr(sys, "argv", ["tune_demo.py", "--trials", "1", "--output", str(output)])
    tune_demo.main()
    with output.open(encoding="utf-8", newline="") as file:
        erm, sage = csv.DictReader(file)
    assert (erm["method"], sage["method"]) == ("erm", "sage")
    assert erm["learning_rate"] == sage["learning_rate"]  # the same draws for each method
    assert (erm["rho"], sage["rho"]) == ("", str(tune_demo.draw("sage", 0)["rho"]))
    assert all(0 <= float(row["source_accuracy"]) <= 1 for row in (erm, sage))


@pytest.mark.slow
def test_schedule_accuracy_compares_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "2", "--seeds", "1", "--held-out", "sketch", "--workers", "1"]
    assert run("schedule_accuracy.py", "--intervals", "1", "2", *few, "--output", "schedule.csv") == 0
    assert "every 2: " in capsys.readouterr().out
    with (tmp_path / "schedule.csv").open(encoding="utf-8", newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"every 1", "every 2"}


@pytest.mark.slow
def test_noise_study_compares_with_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--rows", "4", "--steps", "3", "--seeds", "2", "--held-out", "photo", "--workers", "1"]
    assert run("noise_study.py", "--gammas", "1e-9", "0.1", *few, "--output", "noise.csv") == 0
    with (tmp_path / "noise.csv").open(encoding="utf-8", newline="") as file:
        faint, strong = list(csv.DictReader(file))
    assert float(faint["held_out"]) == 0.0  # nothing is felt of it
    assert float(strong["noise_to_gradient"]) > 1e7 * float(faint["noise_to_gradient"]) > 0
    assert int(strong["pairs"]) == 2
    assert "| 4 | 0.1 |" in capsys.readouterr().out


def test_noise_in_benchmark_pairs_trials_that_differ_by_the_noise_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ERM and GGA-L share the learning rate of trial 1 and not that of trial 2; a later seed does not count."""
    store, domains = Store(tmp_path), ("day", "night")
    for method, gains in (("erm", 0.0), ("gga_l", 0.1)):
        for trial, seed in ((1, 0), (2, 0), (1, 1)):
            for i, domain in enumerate(domains):
                rate = 1e-3 if trial == 1 or method == "erm" else 2e-3
                own = {"learning_rate": rate} | ({"gamma": 0.01} if method == "gga_l" else {})
                done = job("pictures", method=method, held_out=(domain,), seed=seed, trial=trial, hyperparameters=own)
                share = 0.5 + gains * (1 + 2 * i) * (1 - seed)
                accuracy = {d: {"in": share, "out": 0.5} for d in (*domains, "noon")}
                facts = DataFacts("0", dict.fromkeys((*domains, "noon"), 10), ["x"])
                (folder,) = store.add([done], Options())
                folder.finish(Result(done, facts, [Evaluation(8, accuracy)], [], 1.0, "cpu", 1, 1))
    assert run("noise_in_benchmark.py", str(tmp_path)) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert table == ["| gga_l minus erm | 0.01 | +20.0 ± 10.0 points (2 pairs) |"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("configuration", "machines"), [("ddp", 1), ("multi_node", 2)])
def test_accelerate_starts_what_its_configuration_says(configuration: str, machines: int, pictures: Path) -> None:
    """Two processes on the CPU, by one launcher or by the launchers of two machines that are both this one."""
    file = SCRIPTS / "accelerate" / f"{configuration}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    launch += ["--main_process_port", free_port()]
    train = [str(SCRIPTS / "train.py"), "--dataset", str(pictures), "--output_dir", "out", *TRAIN]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(
            [*launch, *(["--machine_rank", str(rank)] if machines > 1 else []), *train, "--logging_steps", "1"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(machines)
    ]
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * machines, "\n".join(said)
    assert len(re.findall("held-out accuracy", "".join(said))) == 1  # told by the first process alone
    assert (pictures.parent / "out" / "model.safetensors").exists()
