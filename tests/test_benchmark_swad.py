"""SWAD as an entrant: what is judged and saved is its average, found without a look at the held-out domain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_worker import job, paint
from transformers import AutoModelForImageClassification, EvalPrediction

from hf_sage.benchmark import store as storing
from hf_sage.benchmark.cards import card_of, facts_of, read_run
from hf_sage.benchmark.command import main
from hf_sage.benchmark.inputs import Cell
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.perform import Outcome, perform
from hf_sage.benchmark.push import main as push
from hf_sage.benchmark.report import main as report
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.runs import run
from hf_sage.benchmark.scores import SOURCE_LOSS, Scores
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.publishing.papers import SAGE, SWAD

OWN = {"swad_patience": 2, "swad_overfit_patience": 2}
RATE = {"learning_rate": 1e-2}
SAGES = RATE | {"rho": 1e-2, "gamma": 1e-3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("pictures"))


def folder_of(own: Job, root: Path) -> JobFolder:
    return Store(root).add([own], Options(save_model=True))[0]


def quiet(_: int) -> None:
    """No progress bar."""


def weights(folder: JobFolder | Path) -> dict[str, torch.Tensor]:
    path = folder.model if isinstance(folder, JobFolder) else folder
    return dict(AutoModelForImageClassification.from_pretrained(path).state_dict())


# ---- Interruptions ----


class Killed(BaseException):
    """Ends a life of a job where a test wants it to; nothing catches it."""


def killed_at(moment: str, folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A life that ends after an ``update``, or before the ``averages``, the ``result`` or ``done`` are written."""
    what, _, number = moment.partition(" ")
    write, move = storing.write_atomic, os.replace

    def write_until(path: Path, text: str) -> None:
        if path.name.startswith(what):
            raise Killed
        write(path, text)

    def move_until(source: Any, target: Any) -> None:
        if what == "averages" and Path(target).name == "swad.pt" and Path(target).parent.name.endswith(f"-{number}"):
            raise Killed
        move(source, target)

    def progress(step: int) -> None:
        if what == "update" and step == int(number):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storing, "write_atomic", write_until)
        patch.setattr(os, "replace", move_until)
        with pytest.raises(Killed):
            perform(folder, progress)


@pytest.mark.parametrize(("method", "model"), [("swad", "tiny-convnext"), ("sage+swad", "tiny-clip")])
def test_killed_anywhere_and_resumed_equals_never_killed(
    method: str, model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation images that are augmented at random, as DomainBed's are."""
    values = (RATE if method == "swad" else SAGES) | OWN
    own = job(pictures, method=method, model=model, hyperparameters=values, evaluate_every=2)
    whole = folder_of(own, tmp_path / "whole")
    assert perform(whole, quiet) == Outcome("done")
    folder = folder_of(own, tmp_path / "killed")
    for moment in ("update 3", "averages 4", "update 5", "averages 8", "result", "done"):
        killed_at(moment, folder, monkeypatch)
    steps: list[int] = []
    assert perform(folder, steps.append) == Outcome("done")
    assert steps == []  # nothing was left to train
    one, other = (replace(own.result(), seconds=0.0) for own in (whole, folder))
    assert one == other
    assert (whole.model / "model.safetensors").read_bytes() == (folder.model / "model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.path.iterdir()) == ["done", "job.json", "model", "result.json"]


def test_a_checkpoint_without_its_averages_is_passed_over(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(job(pictures, method="swad", hyperparameters=RATE | OWN, evaluate_every=2), tmp_path)
    killed_at("averages 6", folder, monkeypatch)
    steps: list[int] = []
    assert perform(folder, steps.append) == Outcome("done")
    assert steps == [5, 6, 7, 8]


# ---- What is judged and saved ----


def trained(method: str, pictures: Path, root: Path, steps: int, every: int, **own: Any) -> tuple[Result, Path]:
    arguments: dict[str, Any] = {"training": {"lr_scheduler_type": "constant"}, "transform": "none"}
    what = job(pictures, method=method, steps=steps, evaluate_every=every, hyperparameters=RATE | own, **arguments)
    folder = root / f"{method}-{steps}"
    return run(what, folder, save_to=folder / "model"), folder / "model"


def test_the_average_alone_counts_and_is_what_is_saved(pictures: Path, tmp_path: Path) -> None:
    """Where nothing ends the valley it is the mean of the weights after every update."""
    everything = {"swad_patience": 1, "swad_overfit_patience": 1, "swad_tolerance": 1e9}
    result, model = trained("swad", pictures, tmp_path, 3, 1, **everything)
    path = [weights(trained("erm", pictures, tmp_path, steps, steps)[1]) for steps in (1, 2, 3)]
    for name, average in weights(model).items():
        expected = torch.stack([own[name] for own in path]).mean(0)
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)  # of weights near 0.1, in float32
    assert any(not torch.equal(average, path[-1][name]) for name, average in weights(model).items())
    assert [evaluation.step for evaluation in result.evaluations] == [3]
    assert result.model_step == 3
    steps = [entry["step"] for entry in result.log if f"eval_{SOURCE_LOSS}" in entry]
    assert steps == [0, 1, 2, 3, 3]  # the last of them with the average
    accuracy = {k.removeprefix("eval_"): v for k, v in result.log[-1].items() if k.endswith(("/in", "/out"))}
    (judged,) = result.evaluations
    assert accuracy == {f"{d}/{split}": v for d, own in judged.accuracy.items() for split, v in own.items()}


def test_where_no_valley_is_found_it_is_the_last_segment(pictures: Path, tmp_path: Path) -> None:
    _, model = trained("swad", pictures, tmp_path, 3, 1, swad_patience=9)
    _, last = trained("erm", pictures, tmp_path, 3, 3)
    assert all(torch.equal(average, weights(last)[name]) for name, average in weights(model).items())


# ---- What nothing is chosen by ----


def test_the_source_loss_is_over_the_sources_validation_rows_alone() -> None:
    cells = [Cell(domain, split, 2) for domain in ("a", "b", "t") for split in ("in", "out")]
    losses = np.arange(12.0)
    classes = np.zeros(12, dtype=int)

    def scored(losses: Any) -> float:
        prediction = EvalPrediction(predictions=(classes, losses), label_ids=classes)
        return Scores(cells, ["a", "b"])(prediction)[SOURCE_LOSS]

    counted = [2, 3, 6, 7]
    assert scored(losses) == np.mean(losses[counted])
    for row in range(12):
        changed = losses.copy()
        changed[row] += 5
        assert (scored(changed) != scored(losses)) == (row in counted)


def test_domains_count_alike_whatever_their_rows() -> None:
    cells = [Cell("a", "in", 1), Cell("a", "out", 1), Cell("b", "in", 1), Cell("b", "out", 3)]
    prediction = EvalPrediction(predictions=(np.zeros(6), np.array([9, 1, 9, 3, 3, 3.0])), label_ids=np.zeros(6))
    assert Scores(cells, ["a", "b"])(prediction)[SOURCE_LOSS] == 2.0


def test_labels_of_the_held_out_domain_change_no_average(pictures: Path, tmp_path: Path) -> None:
    other = paint(tmp_path / "pictures")
    cat, dog, aside = (other / "night" / name for name in ("cat", "dog", "aside"))
    for old, new in ((cat, aside), (dog, cat), (aside, dog)):
        old.rename(new)
    own = OWN | {"swad_tolerance": 1.01}
    result, model = trained("swad", pictures, tmp_path / "one", 6, 1, **own)
    changed, swapped = trained("swad", other, tmp_path / "other", 6, 1, **own)
    for log in (result.log, changed.log):
        assert {"eval_loss", f"eval_{SOURCE_LOSS}"} <= log[-1].keys()
    assert result.log[-1]["eval_loss"] != changed.log[-1]["eval_loss"]
    assert all(torch.equal(average, weights(swapped)[name]) for name, average in weights(model).items())


# ---- Tables and cards ----


@pytest.fixture(scope="module")
def benchmark(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ERM, SWAD and SAGE with SWAD, done, their models saved."""
    root = tmp_path_factory.mktemp("benchmark")
    given = {"erm": RATE, "swad": RATE | OWN, "sage+swad": SAGES | {"swad_tolerance": 1.5}}
    jobs = [
        job(pictures, method=name, steps=2, evaluate_every=1, model="tiny-convnext", transform="none",
            hyperparameters=values)
        for name, values in given.items()
    ]  # fmt: skip
    for folder in Store(root).add(jobs, Options(save_model=True)):
        assert perform(folder, quiet) == Outcome("done")
    return root


def test_tables_lists_and_pictures_name_them(benchmark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (("ls", "sage+swad"), ("table", "| SAGE+SWAD |"), ("plot", ".png")):
        assert main([command, str(benchmark)]) == 0
        assert said in capsys.readouterr().out
    assert report([str(benchmark), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in ("ERM", "SWAD", "SAGE+SWAD"))


def run_of(benchmark: Path, method: str) -> Path:
    return next(folder.path for folder in Store(benchmark).jobs() if folder.job.method == method)


@pytest.mark.parametrize(
    ("method", "trained_with"), [("swad", "**ERM** and **SWAD**"), ("sage+swad", "**SAGE** and **SWAD**")]
)
def test_a_card_names_and_cites_the_method_and_swad(method: str, trained_with: str, benchmark: Path) -> None:
    path = run_of(benchmark, method)
    text = card_of(path)
    assert f"Trained with {trained_with}" in text
    assert "The weights are averaged by SWAD: Junbum Cha" in text
    assert SWAD.bibtex in text
    assert (SAGE.bibtex in text) == (method == "sage+swad")
    assert "A tiny ConvNeXt with a linear head, trained from random weights." in text
    assert "SWAD's average over updates of a training of 2 steps" in text
    facts = facts_of(read_run(path))
    patience = 2 if method == "swad" else 3  # as set, else the default
    assert facts.method_settings["swad_patience"] == patience
    assert facts.method_settings["swad_tolerance"] == (1.3 if method == "swad" else 1.5)
    assert ("rho" in facts.method_settings) == (method == "sage+swad")
    assert set(facts.training_settings) & {"swad_patience", "rho"} == set()


def test_a_card_of_a_run_without_swad_says_nothing_of_it(benchmark: Path) -> None:
    assert "swad" not in card_of(run_of(benchmark, "erm"), name="m").lower()


def test_it_can_be_pushed(benchmark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_of(benchmark, "sage+swad")
    assert push([str(path), "--repo-id", "me/digits", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
