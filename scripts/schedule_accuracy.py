"""What the demo's SAGE loses, or gains, when it perturbs in every so-manieth update only.

    python scripts/schedule_accuracy.py --intervals 1 5 --output schedule.csv

The demo's own jobs (every domain of style_digits held out once, its seeds and hyperparameters) with `ascent_interval`
set; the table has each interval's accuracy and its difference to the first one, paired over domains and seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hf_sage.benchmark import aggregate, paired_differences
from hf_sage.benchmark.demo import demo_jobs, positive, run_demo_jobs
from hf_sage.benchmark.workers import available_cores


def main(argv: Sequence[str]) -> int:
    """Runs the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=positive, nargs="+", default=[1, 5], help="the first is compared to [1 5]")
    parser.add_argument("--steps", type=positive, help="updates a run [the demo's]")
    parser.add_argument("--seeds", type=positive, help="number of seeds [the demo's]")
    parser.add_argument("--held-out", nargs="+", help="which domains to hold out in turn [all]")
    parser.add_argument("--workers", type=positive, default=available_cores(), help="processes [one a core]")
    parser.add_argument("--output", type=Path, default=Path("schedule.csv"), help="[schedule.csv]")
    options = parser.parse_args(argv)
    records = []
    for interval in options.intervals:
        jobs = demo_jobs(methods=["sage"], steps=options.steps, seeds=options.seeds, held_out=options.held_out)
        jobs = [replace(job, hyperparameters=job.hyperparameters | {"ascent_interval": interval}) for job in jobs]
        found = run_demo_jobs(jobs, workers=options.workers, console=Console(stderr=True), save_to={})
        records += [replace(record, method=f"every {interval}") for record in found]
    table = aggregate(records)
    print(table.to_markdown())
    for difference in paired_differences(records, f"every {options.intervals[0]}"):
        print(f"{difference.method}: {difference}")
    options.output.write_text(table.to_csv(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
