"""``hf-sage demo``: ERM, SAM and SAGE on style_digits, every domain held out once, and what came out."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from hf_sage.benchmark.differences import verdict
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import Record, make_folder, write_atomic
from hf_sage.benchmark.runs import Progress, run
from hf_sage.benchmark.tables import aggregate
from hf_sage.benchmark.workers import available_cores, run_all
from hf_sage.data import domain_names, load_embedded


def main(argv: Sequence[str]) -> int:
    """Runs ``hf-sage demo``.

    Args:
        argv: The words after ``demo``.

    Raises:
        ValueError, OSError, ImportError: For options, folders and packages that will not do.
    """
    parser = argparse.ArgumentParser(prog="hf-sage demo", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="where table, plot and model go [demo]")
    parser.add_argument("--seeds", type=positive, help="number of seeds [2]")
    parser.add_argument("--steps", type=positive, help="updates a run")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="which methods [all]")
    parser.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="which domains to hold out in turn [all]")
    parser.add_argument("--workers", type=positive, help="processes [one a core]")
    options = parser.parse_args(argv)
    jobs = demo_jobs(seeds=options.seeds, steps=options.steps, methods=options.methods, held_out=options.held_out)
    demo(jobs, options.output_dir, workers=options.workers)
    return 0


def positive(text: str) -> int:
    """A whole number, 1 or more, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number, 1 or more; got {text}")
    return int(text)


def settings() -> dict[str, Any]:
    """The demo's settings from ``demo.yaml``: methods with their tuned hyperparameters, steps, seeds."""
    text = resources.files("hf_sage.benchmark").joinpath("demo.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def demo_jobs(
    *,
    seeds: int | None = None,
    steps: int | None = None,
    methods: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
) -> list[Job]:
    """The demo's jobs: every method on every held-out domain with every seed, seeds outermost.

    Args:
        seeds: Number of seeds; ``None`` takes the demo's own, as do the others.
        steps: Number of updates.
        methods: Which methods.
        held_out: Which domains to hold out in turn.

    Raises:
        ValueError: If a method or domain is not the demo's.
    """
    given = settings()
    domains = domain_names(load_embedded(given["dataset"])["train"])
    methods = _subset("method", methods, list(given["methods"]))
    held_out = _subset("held-out domain", held_out, domains)
    return [
        Job(
            dataset=given["dataset"],
            method=method,
            held_out=(domain,),
            seed=seed,
            steps=steps or given["steps"],
            rows_per_domain=given["rows_per_domain"],
            evaluate_every=steps or given["steps"],
            hyperparameters=given["methods"][method],
            training=training(steps or given["steps"]),
        )
        for seed in range(seeds or given["seeds"])
        for domain in held_out
        for method in methods
    ]


def training(steps: int) -> dict[str, Any]:
    """How the tiny model is trained: AdamW, the rate warmed up over the first tenth and annealed along a cosine."""
    return {"lr_scheduler_type": "cosine", "warmup_steps": steps // 10, "use_cpu": True}


def demo(
    jobs: Sequence[Job], folder: Path, *, workers: int | None = None, console: Console | None = None
) -> list[Record]:
    """Runs the jobs and writes ``table.md``, ``results.json``, ``results.csv``, ``comparison.png`` and ``model/``.

    The model is that of the last method for the first held-out domain and seed.

    Args:
        jobs: What to run, see `demo_jobs`.
        folder: Where everything goes; must be writable.
        workers: Number of processes; by default one a core.
        console: Where progress and table go.

    Returns:
        The records, in the order of the jobs.
    """
    console = console or Console()
    make_folder(folder)
    workers = min(workers or available_cores(), len(jobs))
    shown = next(job for job in reversed(jobs) if (job.seed, job.held_out) == (jobs[0].seed, jobs[0].held_out))
    console.print(
        f"{len(jobs)} runs of {jobs[0].steps} steps on {jobs[0].dataset} in {workers} process(es): "
        "each method trains on all domains but one and is tested on that one."
    )
    records = run_demo_jobs(jobs, workers=workers, console=console, save_to={jobs.index(shown): folder / "model"})
    table = aggregate(records)
    summary = verdict(records, method=jobs[-1].method)
    note = "Accuracy in % on the held-out domain, mean ± standard error over seeds. Made by `hf-sage demo`."
    write_atomic(folder / "table.md", f"{table.to_markdown()}\n{summary}\n\n{note}\n")
    results = {"table": json.loads(table.to_json()), "runs": [asdict(record) for record in records]}
    write_atomic(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(folder / "results.csv", table.to_csv())
    plot_comparison(records, folder / "comparison.png")
    console.print(table.to_rich())
    console.print(summary)
    console.print(
        f"Written to {folder}/: table.md, results.json, results.csv, comparison.png, and model/ "
        f"({shown.method}, {shown.held_out[0]} held out; load it with AutoModelForImageClassification.from_pretrained)."
    )
    return records


def run_demo_jobs(
    jobs: Sequence[Job], *, workers: int, console: Console, save_to: Mapping[int, Path] | None = None
) -> list[Record]:
    """Runs jobs, each judged at its last evaluation.

    Args:
        jobs: What to run.
        workers: Number of processes.
        console: Where the progress bar goes.
        save_to: Where to save the model of the jobs of these numbers.

    Returns:
        The records, in the order of the jobs.
    """
    work = partial(_work, jobs, save_to or {})
    found = run_all(jobs, work, workers=workers, console=console, tell=lambda record: f"{record.seconds:.0f} s")
    return [found[i] for i in range(len(jobs))]


def _work(jobs: Sequence[Job], save_to: Mapping[int, Path], i: int, progress: Progress) -> Record:
    with tempfile.TemporaryDirectory() as scratch:
        result = run(jobs[i], Path(scratch), save_to=save_to.get(i), progress=progress)
    return result.record(result.evaluations[-1])


def _subset(what: str, given: Sequence[str] | None, known: list[str]) -> list[str]:
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise ValueError(f"Unknown {what} {', '.join(map(repr, unknown))}: use some of {', '.join(map(repr, known))}.")
    return list(given) if given else known
