"""The whole way, as a user types it: a folder of images, checked, benchmarked, reported, published and loaded back."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hub_server import point_client_at, serve
from transformers import AutoModelForImageClassification, CLIPImageProcessorPil

from hf_sage.benchmark.inputs import load_inputs
from hf_sage.benchmark.jobs import Options
from hf_sage.benchmark.results import best_evaluation
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.cli import main
from hf_sage.data import ImageCollator

DOMAINS = ["color", "photo", "plain", "sketch"]
JOBS = 2 * len(DOMAINS) * 2
TOKEN = "hf_" + ("cHaIn0" * 6)[:34]
BENCHMARK = ["benchmark", "--dataset", "pictures", "--methods", "erm", "sage", "--seeds", "2", "--workers", "1"]
BENCHMARK += ["--steps", "6", "--evaluate-every", "2", "--rows-per-domain", "4", "--save-models", "-o", "bench"]


def test_from_a_folder_of_images_to_a_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        assert main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "240 images" in run("data", "export", "style_digits", "pictures", "--images", "6")
    assert "240 images, 4 domains, 10 classes\nno problems" in run("data", "check", "pictures")

    before = killed_after(3, [sys.executable, "-m", "hf_sage.cli", *BENCHMARK])
    assert 3 <= len(before) < JOBS
    assert f"{JOBS} of {JOBS} jobs are done" in run("benchmark", "resume", "bench", "--workers", "1")
    after = finished()
    assert len(after) == JOBS
    assert before == {job: after[job] for job in before}  # nothing is done twice

    run("report", "bench")
    report = Path("bench/report")
    assert {file.suffix for file in report.iterdir()} == {".md", ".tex", ".csv", ".html", ".png"}
    results = Store.open("bench").results()
    chosen = {
        (result.job.method, *result.job.held_out, result.job.seed): best_evaluation(result.evaluations, result.sources)
        for result in results
    }
    assert len(chosen) == JOBS
    with (report / "report.csv").open(encoding="utf-8") as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file) if row["column"] in DOMAINS}
    assert len(cells) == 2 * len(DOMAINS)
    for (method, domain), cell in cells.items():
        found = [chosen[method.lower(), domain, seed].accuracy[domain]["in"] for seed in (0, 1)]
        assert float(cell["value"]) == pytest.approx(fmean(found))
    for kind, table in (("md", "| SAGE |"), ("tex", "SAGE &"), ("html", "<table")):
        assert table in (report / f"report.{kind}").read_text(encoding="utf-8")

    own = next(folder for folder in Store.open("bench").jobs() if folder.job.held_out == ("sketch",))
    accuracy = best_evaluation(own.result().evaluations, own.result().sources).accuracy["sketch"]["in"]
    assert f"| sketch | held out | test | accuracy | {accuracy:.4f} |" in run("card", str(own.path))
    with serve() as hub:
        point_client_at(hub, monkeypatch, tmp_path / "cache", token=TOKEN)
        run("push", str(own.path), "--repo-id", "me/digits")
        assert f"value: {accuracy}" in hub.repositories["me/digits"].files["README.md"].decode()
        assert not any(secret.encode() in sent for sent in hub.uploads() for secret in (TOKEN, str(tmp_path)))
        loaded = AutoModelForImageClassification.from_pretrained("me/digits").eval()
        processor = CLIPImageProcessorPil.from_pretrained("me/digits")
    local = AutoModelForImageClassification.from_pretrained(own.model).eval()
    batch = held_out_rows(own, processor)
    with torch.no_grad():
        logits = loaded(batch["pixel_values"]).logits
        assert torch.equal(logits, local(batch["pixel_values"]).logits)
    # The model that others load has the accuracy that its card says.
    assert (logits.argmax(-1) == batch["labels"]).float().mean().item() == pytest.approx(accuracy)


def killed_after(jobs: int, command: list[str]) -> dict[str, int]:
    """Starts a benchmark, kills it in the middle of a job once so many are done, and returns what it had finished."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        running = [path for path in Path("bench").glob("jobs/*/checkpoint-2") if not (path.parent / "done").exists()]
        if running and len(finished()) >= jobs:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return finished()


def finished() -> dict[str, int]:
    """When each job that is done was."""
    return {file.parent.name: file.stat().st_mtime_ns for file in Path("bench").glob("jobs/*/done")}


def held_out_rows(own: JobFolder, processor: CLIPImageProcessorPil) -> dict[str, torch.Tensor]:
    """The rows of the held-out domain that the benchmark tests on."""
    inputs = load_inputs(own.job, Options())
    start = 0
    for cell in inputs.cells:
        if (cell.domain, cell.split) == (*own.job.held_out, "in"):
            rows = inputs.evaluated.select(range(start, start + cell.rows))
            return ImageCollator(processor)(list(rows))
        start += cell.rows
    raise AssertionError("no such rows")
