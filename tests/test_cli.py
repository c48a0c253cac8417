"""The commands as a user types them: what they make, and what they say when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_sage.benchmark.launch import check_processes, relaunch
from hf_sage.benchmark.train import parse
from hf_sage.cli import main

QUICK = ["--max_steps", "4", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, ``domain/class/*.png``: three domains, two classes, six images each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for domain, level in (("day", 200), ("dusk", 100), ("night", 20)):
        for label in ("cat", "dog"):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 56, (20, 24, 3)) + level
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_train_on_a_folder(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", str(pictures), "--held_out", "night", "--output_dir", str(out), "--rho", "1e-3"]
    assert main(["train", *arguments, *QUICK, "--per_device_train_batch_size", "4"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {"eval_day_accuracy", "eval_dusk_accuracy", "eval_worst_accuracy", "test_accuracy"} <= set(results)
    assert "held-out accuracy" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert AutoImageProcessor.from_pretrained(out, backend="pil").size["height"] == 16


def test_flags_win_over_the_file_and_strings_become_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    # YAML reads 1e-3 as text; it must arrive as a number all the same.
    file.write_text(yaml.safe_dump({"rho": "1e-3", "gamma": 0.5, "held_out": "sketch", "seed": 3}))
    run, config, rest = parse(["--config", str(file), "--seed", "7", "--output_dir", str(tmp_path)])
    assert (config.rho, config.gamma, config.seed, run.held_out, rest) == (1e-3, 0.5, 7, "sketch", [])


def test_flags_of_accelerate_are_set_apart(tmp_path: Path) -> None:
    flags = ["--num_processes", "2", "--main_process_port", "29511"]
    run, _, rest = parse(["--held-out", "sketch", *flags, "--output_dir", str(tmp_path)])
    assert (run.held_out, rest) == ("sketch", flags)


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail, and returns what it says."""
    assert main(argv) == 1
    return capsys.readouterr().err


def test_two_processes_train_as_one(pictures: Path, tmp_path: Path) -> None:
    weights = []
    for processes, rows in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        arguments = ["--dataset", str(pictures), "--held_out", "night", "--output_dir", str(out), "--rho", "1e-2"]
        arguments += ["--gamma", "1e-3", "--optim", "sgd", "--per_device_train_batch_size", str(rows), *QUICK]
        launch = ["--num_processes", "2", "--main_process_port", "29533"] if processes == 2 else []
        subprocess.run([sys.executable, "-m", "hf_sage.cli", "train", *arguments, *launch], check=True)
        weights.append(load_file(out / "model.safetensors"))
    one, two = weights
    # The same sums in another order: a few rounding errors of weights of order 0.1.
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6


def test_training_as_one_group(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", str(pictures), "--held_out", "night", "--output_dir", str(tmp_path)]
    assert main(["train", *arguments, "--domain_column", "none", *QUICK]) == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_file_entries_meet_the_same_types_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset: rotated_digits\nheld_out: 15\nuse_cpu: true\n")
    run, config, _ = parse(["--config", str(file)])
    assert (run.held_out, config.use_cpu) == ("15", True)
    file.write_text("on_bad_image: ignore\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert "on_bad_image" in capsys.readouterr().err


def test_errors_hand_over_the_cure(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--dataset", str(pictures), "--output_dir", str(tmp_path / "out"), *QUICK]
    for flags, said in (
        ([], ["--held_out", "'day'", "'dusk'", "'night'"]),
        (["--held_out", "noon"], ["noon", "day", "dusk", "night"]),
        (["--held_out", "night", "--method", "adam"], ["'adam'", "'sage'", "'sam'", "'erm'"]),
        (["--held_out", "night", "--rho", "-1"], ["rho", "-1"]),
        (["--held_out", "night", "--gamma", "nan"], ["gamma", "nan"]),
        (["--held_out", "night", "--domain_column", "place"], ["place", "domain"]),
        (["--held_out", "night", "--per_device_train_batch_size", "1"], ["per_device_train_batch_size", "2 domains"]),
        (["--held_out", "night", "--output_dir", str(pictures / "day/cat/0.png/out")], ["0.png", "--output-dir"]),
        (["--held_out", "night", "--frobnicate", "3"], ["--frobnicate", "accelerate"]),
    ):
        message = fails([*common, *flags], capsys)
        assert all(part in message for part in said), (flags, message)


def test_unreadable_image_is_named_or_skipped(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for domain in ("day", "dusk", "night"):
        (tmp_path / domain).symlink_to(pictures / domain)
    broken = tmp_path / "fog" / "cat"
    broken.mkdir(parents=True)
    (broken / "broken.png").write_bytes(b"no picture at all")
    for i in range(3):
        (broken / f"{i}.png").write_bytes((pictures / "day" / "cat" / f"{i}.png").read_bytes())
    out = ["--output_dir", str(tmp_path / "out")]
    arguments = ["train", "--dataset", str(tmp_path), "--held_out", "night", *out, *QUICK]
    arguments += ["--validation_fraction", "0.34", "--max_steps", "12"]
    assert "broken.png" in fails(arguments, capsys)
    assert main([*arguments, "--on-bad-image", "skip"]) == 0
    assert "broken.png" in caplog.text


def test_configuration_with_a_misspelt_name_suggests_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 0.1\n")
    message = fails(["train", "--config", str(file)], capsys)
    assert "'learning_rat'" in message
    assert "'learning_rate'" in message


def test_one_process_where_two_were_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_processes()
    # What accelerate's launcher for one CPU process leaves behind when it was asked for several.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="--num_processes"):
        check_processes()


@pytest.mark.parametrize("flags", [["--cpu"], []])
def test_relaunch_starts_the_form_that_starts_two(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    started = {}

    def execve(_: str, command: list[str], environment: dict[str, str]) -> None:
        started.update(command=command, environment=environment)
        raise SystemExit

    monkeypatch.setattr("os.execve", execve)
    argv = ["--held_out", "sketch", *flags, "--num_processes", "2"]
    with pytest.raises(SystemExit):
        relaunch(argv, argv[2:], on_cpu=True)
    assert "--cpu" not in started["command"]
    assert "--multi_gpu" in started["command"]
    assert started["environment"]["ACCELERATE_USE_CPU"] == "true"
    assert started["command"][-5:] == ["-m", "hf_sage.cli", "train", "--held_out", "sketch"]
