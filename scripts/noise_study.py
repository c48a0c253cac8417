"""When the noise helps: accuracy with it minus accuracy without it, by γ and by the number of rows a domain.

    python scripts/noise_study.py --rows 16 64 --gammas 3e-4 1e-3 3e-3 --seeds 3 --output noise.csv

GGA-L, which is ERM with the noise of SAGE, against ERM on style_digits: every domain held out once, the same model,
learning rate, seeds and batches, the last checkpoint. Beside the differences stand the agreement S, its standard
deviation over updates, and how strong the noise is: its expected length over that of the clipped gradient.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from rich.console import Console

from hf_sage.benchmark import Difference, Record, paired_differences
from hf_sage.benchmark.demo import positive, run_demo_jobs
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.workers import available_cores
from hf_sage.data import domain_names, load_embedded
from hf_sage.models import TINY_CONVNEXT, image_classifier
from hf_sage.trainer import SAGEConfig

DATASET = "style_digits"


@dataclass(frozen=True)
class Row:
    """The runs with one γ and number of rows a domain, against those without noise.

    Attributes:
        rows: Rows of each source domain in a batch.
        gamma: γ.
        agreement: Mean of S over updates and runs.
        agreement_deviation: Its standard deviation over the updates of a run, averaged over runs.
        noise_to_gradient: Mean of β√d / ‖g‖ over updates and runs, d being the number of parameters and g the gradient
            that the noise is added to: clipped.
        held_out: Difference of accuracy on the held-out domain.
        held_out_stderr: Its standard error over pairs of runs.
        source: Difference of accuracy on validation rows of the source domains.
        source_stderr: Its standard error.
        pairs: Number of pairs.
    """

    rows: int
    gamma: float
    agreement: float
    agreement_deviation: float
    noise_to_gradient: float
    held_out: float
    held_out_stderr: float
    source: float
    source_stderr: float
    pairs: int


def job(rows: int, gamma: float, held_out: str, seed: int, options: argparse.Namespace) -> Job:
    """One training; without noise it is ERM's."""
    own: dict[str, Any] = {"learning_rate": options.learning_rate} | ({"gamma": gamma} if gamma else {})
    return Job(
        dataset=DATASET,
        method="gga_l" if gamma else "erm",
        held_out=(held_out,),
        seed=seed,
        steps=options.steps,
        model=TINY_CONVNEXT,
        rows_per_domain=rows,
        evaluate_every=options.steps,
        hyperparameters=own,
        training={"lr_scheduler_type": "cosine", "warmup_steps": 0.1} | _optimizer(options.optim),
    )


def summary(rows: int, gamma: float, without: Sequence[Record], noisy: Sequence[Record], parameters: int) -> Row:
    """What the noise did."""
    logged = [[entry for entry in record.history if "agreement" in entry] for record in noisy]
    clip = SAGEConfig("unused").max_grad_norm
    strength = [
        entry["noise_scale"] * math.sqrt(parameters) / min(entry["grad_norm"], clip) for own in logged for entry in own
    ]
    held_out = _difference(without, noisy)
    source = _difference(_by_source(without), _by_source(noisy))
    return Row(
        rows=rows,
        gamma=gamma,
        agreement=fmean(entry["agreement"] for own in logged for entry in own),
        agreement_deviation=fmean(pstdev(entry["agreement"] for entry in own) for own in logged),
        noise_to_gradient=fmean(strength),
        held_out=held_out.mean,
        held_out_stderr=held_out.stderr,
        source=source.mean,
        source_stderr=source.stderr,
        pairs=held_out.pairs,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", default=[16, 64], help="rows a domain [16 64]")
    parser.add_argument("--gammas", type=above_zero, nargs="+", default=[3e-4, 1e-3, 3e-3], help="[3e-4 1e-3 3e-3]")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds [3]")
    parser.add_argument("--steps", type=positive, default=239, help="updates a run [239, a prime: each is logged]")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="[6e-3]")
    parser.add_argument(
        "--optim", default="adamw_torch", help="adamw_torch, or sgd with a momentum of 0.9 [adamw_torch]"
    )
    parser.add_argument("--held-out", nargs="+", help="which domains to hold out in turn [all]")
    parser.add_argument("--workers", type=positive, default=available_cores(), help="processes [one a core]")
    parser.add_argument("--output", type=Path, default=Path("noise.csv"), help="[noise.csv]")
    options = parser.parse_args(argv)
    data = load_embedded(DATASET)["train"]
    parameters = _parameters(data.features["label"].names)
    table = []
    for rows in options.rows:
        records = {}
        for gamma in (0.0, *options.gammas):
            jobs = [
                job(rows, gamma, domain, seed, options)
                for seed in range(options.seeds)
                for domain in options.held_out or domain_names(data)
            ]
            records[gamma] = run_demo_jobs(jobs, workers=options.workers, console=Console(stderr=True))
            if gamma:
                table.append(summary(rows, gamma, records[0.0], records[gamma], parameters))
    print(_markdown(table))
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__))
        writer.writeheader()
        writer.writerows(map(asdict, table))
    return 0


def above_zero(text: str) -> float:
    """A γ, for argparse: without noise there is ERM."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"needs a number above 0; got {text}")
    return float(text)


def _optimizer(name: str) -> dict[str, str]:
    return {"optim": name} | ({"optim_args": "momentum=0.9"} if name == "sgd" else {})


def _parameters(labels: Sequence[str]) -> int:
    with torch.random.fork_rng():
        model, _ = image_classifier(TINY_CONVNEXT, labels)
    return sum(p.numel() for p in model.parameters())


def _by_source(records: Sequence[Record]) -> list[Record]:
    return [replace(record, accuracy=record.source_accuracy) for record in records]


def _difference(without: Sequence[Record], noisy: Sequence[Record]) -> Difference:
    (found,) = paired_differences([*without, *noisy], without[0].method)
    return found


def _markdown(table: Sequence[Row]) -> str:
    lines = [
        "| rows a domain | γ | S ± deviation over updates | noise ÷ gradient | held-out | source |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        held_out, source = (
            f"{100 * mean:+.1f} ± {100 * error:.1f}"
            for mean, error in ((row.held_out, row.held_out_stderr), (row.source, row.source_stderr))
        )
        spread = f"{row.agreement:.2f} ± {row.agreement_deviation:.2f}"
        lines.append(f"| {row.rows} | {row.gamma:g} | {spread} | {row.noise_to_gradient:.2f} | {held_out} | {source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
