"""``hf-sage benchmark`` as a user types it, at toy size; and the templates in scripts/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from benchmark_worker import DOMAINS, job, paint

from hf_sage.benchmark.collator import CollatorByUse
from hf_sage.benchmark.command import main
from hf_sage.benchmark.flags import CONFIGS
from hf_sage.benchmark.inputs import load_inputs
from hf_sage.benchmark.jobs import Options
from hf_sage.benchmark.parsing import parse_config, read_config
from hf_sage.benchmark.plan import jobs_of
from hf_sage.benchmark.report import main as report
from hf_sage.benchmark.runs import _processed, _undecoded
from hf_sage.benchmark.store import Store
from hf_sage.models import tiny_clip

ROOT = Path(__file__).parent.parent
QUICK = ["--methods", "erm", "sage", "--seeds", "1", "--trials", "1", "--steps", "3", "--evaluate-every", "3"]
QUICK += ["--workers", "1"]


def test_style_digits_from_flags_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    flags = ["--dataset", "style_digits", "--held-out", "sketch", *QUICK]
    assert main([*flags, "--output-dir", out]) == 0
    assert "2 of 2 jobs are done" in capsys.readouterr().out
    results = Store.open(out).results()
    assert {result.job.method for result in results} == {"erm", "sage"}
    assert len({result.data.fingerprint for result in results}) == 1
    rows = {"plain": 1797, "photo": 1797, "sketch": 1797, "color": 1797}
    assert all(result.data.rows == rows for result in results)
    written = json.loads(next(Path(out).glob("jobs/*/result.json")).read_text())
    assert set(written) >= {"format", "arguments", "versions", "data", "evaluations", "log", "seconds", "device",
                            "processes", "parameters"}  # fmt: skip
    assert set(written["versions"]) == {"python", "torch", "transformers", "datasets", "accelerate", "hf_sage"}
    for verb, said in (("ls", "2 done"), ("table", "| ERM |"), ("resume", "2 jobs")):
        assert main([verb, out]) == 0
        assert said in capsys.readouterr().out
    assert main(["plot", out]) == 0
    assert (Path(out) / "style_digits.png").exists()
    assert report([out, "--format", "markdown"]) == 0
    assert "the test rows that the dataset comes with" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--held-out-pairs"):
        main(["table", out, "--selection", "leave_one_domain_out"])


def test_the_same_images_in_memory_and_from_files_are_the_same_rows() -> None:
    """An embedded set without augmentation is processed once; with the collator the tensors are the same to the bit."""
    own = job("style_digits", held_out=("sketch",), transform="none")
    inputs = load_inputs(own, Options())
    _, processor = tiny_clip(inputs.facts.classes)
    collate = CollatorByUse(processor, "none")
    for in_memory, stored in zip(_processed(inputs, processor), _undecoded(inputs, own), strict=True):
        assert len(in_memory) == len(stored)
        chosen = [0, 700, len(stored) - 1]
        batch = collate([stored[i] for i in chosen])
        assert torch.equal(batch["pixel_values"], torch.stack([in_memory[i]["pixel_values"] for i in chosen]))
        assert batch["labels"].tolist() == [int(in_memory[i]["labels"]) for i in chosen]


def test_pairs_trials_and_workers_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = paint(tmp_path / "pictures")
    entries = {
        "datasets": [str(pictures)],
        "methods": {"erm": None},
        "held_out": ["night"],
        "held_out_pairs": True,
        "seeds": [3],
        "trials": 2,
        "search": {"learning_rate": ["1e-3", "1e-2"]},
        "rows_per_domain": 2,
        "steps": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(entries))
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "config.yaml"), "-o", str(out), "--workers", "2"]) == 0
    assert len(Store.open(out).results()) == 2 * (1 + len(DOMAINS) - 1)
    capsys.readouterr()
    assert main(["table", str(out), "--selection", "leave_one_domain_out", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # header, night, average
    assert "leave_one_domain_out,in_split" in lines[1]
    assert parse_config(read_config(out / "config.yaml")) == parse_config(entries)


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("hf_sage.benchmark.command.drive", lambda _, folders, **__: seen.extend(folders) or 0)
    methods = {"sam": {"rho": 0.5}, "erm": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"datasets": ["PACS"], "methods": methods, "held_out": ["photo"], "steps": 9}))
    assert main([str(file), "--seeds", "1", "--steps", "7", "--methods", "sam", "-o", str(tmp_path / "out")]) == 0
    (folder,) = seen
    assert (folder.job.steps, folder.job.method, folder.job.hyperparameters["rho"]) == (7, "sam", 0.5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["resume", "."], "no folder of a benchmark"),
        (["--methods", "erm"], "--dataset"),
        (["--dataset", "PACS", "--methods", "erm", "--workers", "0"], "--workers"),
        (["--dataset", "PACS", "--methods", "erm", "--launch", "--frobnicate 3"], "--frobnicate"),
        (["--dataset", "PACS", "--methods", "erm", "--launch", "--num_processes 2", "--workers", "2"], "--workers"),
    ],
)
def test_errors_hand_over_the_cure(argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        main(argv)
    assert said in str(caught.value)


@pytest.mark.slow
def test_accelerate_launches_each_job_and_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    pictures = paint(tmp_path / "pictures")
    found = []
    for name, how in (
        ("one", ["--workers", "1"]),
        ("two", ["--launch", "--num_processes 2 --main_process_port 29571"]),
    ):
        folders = Store(tmp_path / name).add([job(pictures, steps=2, training={"optim": "sgd"})], Options())
        assert main(["resume", str(tmp_path / name), *how]) == 0
        found.append(folders[0].result())
    one, two = found
    assert (one.processes, two.processes) == (1, 2)
    assert [e.step for e in one.evaluations] == [e.step for e in two.evaluations]
    assert one.evaluations[0] == two.evaluations[0]  # same weights, same rows in the same cells
    assert one.data == two.data


def test_a_launched_job_that_fails_tells_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "try: 1 / 0\nexcept ZeroDivisionError as e: raise ValueError('the cure') from e"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    monkeypatch.setattr(
        "hf_sage.benchmark.perform.launch_command",
        lambda *_, **__: ([sys.executable, "-c", launcher], dict(os.environ)),
    )
    folder = Store(tmp_path).add([job("pictures")], Options())[0]
    assert main(["resume", str(tmp_path), "--launch", "--num_processes 2"]) == 1
    assert "ZeroDivisionError" in folder.error.read_text()
    assert "status 1: ValueError: the cure" in " ".join(capsys.readouterr().out.split())


# ---- Templates ----


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    config = load_config_from_file(parsed.config_file)
    assert config.mixed_precision == "no"
    assert str(file.relative_to(ROOT)) in file.read_text()  # its header shows how to run it


def test_configurations_are_what_they_say(tmp_path: Path) -> None:
    entries = read_config(ROOT / "scripts/configs/table1.yaml") | {"data_root": str(tmp_path), "methods": ["erm"]}
    jobs = jobs_of(parse_config(entries))
    assert len(jobs) == 3 * (4 + 4 + 4 + 4 + 6)
    assert {own.steps for own in jobs if own.dataset == "DomainNet"} == {15000}
    digits = jobs_of(parse_config(read_config(CONFIGS / "style_digits.yaml")))
    assert len(digits) == 4 * 4 * 33  # trials × held-out domains × methods, with one seed


def test_slurm_template_runs_as_its_header_says(tmp_path: Path) -> None:
    """Two tasks at once on a shared folder; hf-sage is stood in for by what it is called with."""
    stub = tmp_path / "hf-sage"
    stub.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    script = ROOT / "scripts" / "slurm_array.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), "a b.yaml", "out", "--steps", "3"], env=environment, check=True)
    assert (tmp_path / "calls").read_text() == "benchmark run a b.yaml --output-dir out --workers 1 --steps 3\n"
    assert subprocess.run(["bash", str(script)], env=environment, capture_output=True).returncode != 0
