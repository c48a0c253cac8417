"""What the noise did in a benchmark, read off its trials: those of two methods that differ by the noise alone.

    hf-sage benchmark --dataset style_digits --methods all --output-dir bench
    python scripts/noise_in_benchmark.py bench

SAGE is paired with SAGE without noise and GGA-L with ERM: trials of one number share the learning rate and the radius,
so γ is all that is between them. Each run counts by the checkpoint that validation on the source domains prefers; pairs
are those of the first seed, with which every trial is run, one a held-out domain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_sage.benchmark import Record, Result, Store, paired_differences
from hf_sage.benchmark.results import best_evaluation

PAIRS = {"sage": "sage_no_noise", "gga_l": "erm"}


def rows(results: Sequence[Result]) -> list[str]:
    """A line of a Markdown table for each method and trial, by γ."""
    first = min(result.job.seed for result in results)
    found = []
    for noisy, quiet in PAIRS.items():
        for trial in sorted({result.job.trial for result in results}):
            own = [r for r in results if (r.job.method, r.job.trial, r.job.seed) == (noisy, trial, first)]
            without = [r for r in results if (r.job.method, r.job.trial, r.job.seed) == (quiet, trial, first)]
            shared = [_but_noise(result) for result in [*own, *without]]
            if own and without and shared.count(shared[0]) == len(shared):
                (difference,) = paired_differences([*map(_record, own), *map(_record, without)], quiet)
                found.append((noisy, own[0].job.hyperparameters["gamma"], difference))
    found.sort(key=lambda row: (list(PAIRS).index(row[0]), row[1]))
    return [f"| {noisy} minus {PAIRS[noisy]} | {gamma:g} | {difference} |" for noisy, gamma, difference in found]


def _but_noise(result: Result) -> dict[str, float]:
    return {name: value for name, value in result.job.hyperparameters.items() if name != "gamma"}


def _record(result: Result) -> Record:
    return result.record(best_evaluation(result.evaluations, result.sources))


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="folder of a benchmark with trials of these methods")
    options = parser.parse_args(argv)
    table = rows(Store.open(options.folder).results())
    if not table:
        print(
            "No two trials differ by the noise alone: run the benchmark with sage and sage_no_noise, or gga_l and erm."
        )
        return 1
    print("\n".join(["| methods | γ | held-out accuracy |", "|:--|--:|--:|", *table]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
