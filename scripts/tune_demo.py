"""Chooses the hyperparameters of `hf-sage demo` by random search on source-domain validation, equal trials a method.

    python scripts/tune_demo.py --trials 8 --output model_cards/style_digits/tuning.csv

Every trial trains with each domain held out in turn and is scored by its mean accuracy on validation rows of the source
domains; the held-out domain has no say. The seed is none of the demo's. The best of each method go into
hf_sage/benchmark/demo.yaml by hand.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hf_sage.benchmark.demo import demo_jobs, run_demo_jobs
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.workers import available_cores

SEED = 1000
RANGES = {
    "erm": {"learning_rate": (-3.3, -2.0)},
    "sam": {"learning_rate": (-3.3, -2.0), "rho": (-2.3, -0.7)},
    "sage": {"learning_rate": (-3.3, -2.0), "rho": (-3.5, -2.0), "gamma": (-6.0, -3.0)},
}
"""Exponents of ten between which each hyperparameter is drawn uniformly."""


def draw(method: str, trial: int) -> dict[str, float]:
    """The hyperparameters of a trial; the learning rate is the same for all methods."""
    values = {}
    for i, (name, (low, high)) in enumerate(RANGES[method].items()):
        exponent = np.random.default_rng([SEED, trial, i]).uniform(low, high)
        values[name] = float(f"{10**exponent:.1e}")
    return values


def tuning_jobs(trials: int) -> list[Job]:
    """Every trial of every method on every held-out domain."""
    jobs = []
    for trial in range(trials):
        for job in demo_jobs(seeds=1):
            jobs.append(replace(job, seed=SEED, trial=trial, hyperparameters=draw(job.method, trial)))
    return jobs


def main() -> None:
    """Runs the search and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials a method [8]")
    parser.add_argument("--output", type=Path, default=Path("tuning.csv"), help="table of all trials [tuning.csv]")
    options = parser.parse_args()
    planned = tuning_jobs(options.trials)
    records = run_demo_jobs(planned, workers=available_cores(), console=Console())
    scores: dict[tuple[str, int], list[float]] = {}
    for job, record in zip(planned, records, strict=True):
        scores.setdefault((job.method, job.trial), []).append(record.source_accuracy)
    rows: list[dict[str, Any]] = [
        {"method": method, "trial": trial, "source_accuracy": round(float(np.mean(found)), 4)} | draw(method, trial)
        for (method, trial), found in scores.items()
    ]
    rows.sort(key=lambda row: (list(RANGES).index(row["method"]), -row["source_accuracy"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", "trial", "source_accuracy", "learning_rate", "rho", "gamma"])
        writer.writeheader()
        writer.writerows(rows)
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
