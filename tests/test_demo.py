"""The demo at reduced size: from data to table, picture and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_sage.benchmark.demo import demo_jobs, settings
from hf_sage.cli import main


@pytest.mark.slow
def test_demo_from_data_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "--steps", "30", "--held-out", "plain", "sketch", "--workers", "2"]
    assert main(["demo", *arguments, "--output-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    records = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {(r["method"], r["held_out"]) for r in records} == {
        (method, domain) for method in ("erm", "sam", "sage") for domain in ("plain", "sketch")
    }
    for method in ("erm", "sam", "sage"):
        assert method.upper() in shown
        assert method.upper() in table
    for r in records:
        # 30 steps teach something: the source domains are above the tenth that guessing reaches.
        assert r["source_accuracy"] > 0.15
        assert 0 <= r["accuracy"] <= 1
        losses = [entry["loss"] for entry in r["history"]]
        assert losses[-1] < losses[0]
    sage = next(r for r in records if r["method"] == "sage")
    assert all("agreement" in entry and "noise_scale" in entry for entry in sage["history"])
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.csv").read_text().count("\n") >= 4
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    pixels = processor(images=torch.zeros(3, 16, 16, dtype=torch.uint8).numpy(), return_tensors="pt")
    assert model(**pixels).logits.shape == (1, 10)


def test_every_method_is_tried_on_every_domain_with_every_seed() -> None:
    jobs = demo_jobs()
    given = settings()
    assert len(jobs) == len({job.name for job in jobs}) == len(given["methods"]) * 4 * given["seeds"]


def test_unknown_names_list_the_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--methods", "adam", "--output-dir", str(tmp_path)]) == 1
    assert "'sage'" in capsys.readouterr().err
    assert main(["demo", "--held-out", "watercolor", "--output-dir", str(tmp_path)]) == 1
    assert "'sketch'" in capsys.readouterr().err


def test_a_folder_that_takes_nothing_is_refused_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--output-dir", str(tmp_path / "file" / "demo")]) == 1
    assert "--output-dir" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--seeds", "--steps", "--workers"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_that_cannot_be_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", flag, value])
    assert "1 or more" in capsys.readouterr().err
