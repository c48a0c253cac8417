"""``hf-sage report``: the table beside the paper's, differences with confidence intervals, and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_sage.benchmark.differences import paired_differences
from hf_sage.benchmark.forest import plot_differences
from hf_sage.benchmark.grids import FORMATS, Grid, write
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import Record, make_folder, write_atomic
from hf_sage.benchmark.remembered import repeats_to_come, tuning_notes
from hf_sage.benchmark.selection import SELECTION, select
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.summaries import BASELINES, by_dataset, report_grids


def main(argv: Sequence[str]) -> int:
    """Writes ``report.<ending>`` in each format and pictures of each dataset, and prints the report in Markdown.

    Raises:
        ValueError, OSError, ImportError: If there is nothing to report, or nowhere to write it.
    """
    parser = argparse.ArgumentParser(prog="hf-sage report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="folder of a benchmark")
    add_selection(parser)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="what to write [all]")
    parser.add_argument("-o", "--output-dir", type=Path, help="where to write it [DIR/report]")
    options = parser.parse_args(argv)
    store = Store.open(options.folder)
    folder = options.output_dir or store.folder / "report"
    grids = _grids(store, options.selection)
    _write(grids, options.format, folder)
    for dataset, records in by_dataset(select(store.results(), options.selection)).items():
        name = Path(dataset).name
        plot_comparison(records, folder / f"{name}.png")
        for baseline in baselines_of(records):
            plot_differences(records, baseline, folder / f"{name}-minus-{baseline}.png")
    sys.stdout.write(write(grids, "markdown"))
    sys.stdout.write(f"Written to {folder}/: {', '.join(sorted(file.name for file in folder.iterdir()))}\n")
    return 0


def write_report(store: Store) -> str:
    """Writes the tables of a benchmark whose jobs are all done, in every format.

    Returns:
        Where they are, or why there are none.
    """
    folder = store.folder / "report"
    try:
        _write(_grids(store, "training_domain"), FORMATS, folder)
    except ValueError as error:  # the runs are done all the same
        return f"No tables: {error}\n"
    return f"Tables: {folder}/report.md. `hf-sage report {store.folder}` prints them and draws pictures.\n"


def _grids(store: Store, selection: str) -> list[Grid]:
    jobs = [folder.job for folder in store.jobs()]
    results = store.results()
    unfinished = len(jobs) - len(results) + repeats_to_come(store.folder, jobs)
    return report_grids(results, selection, unfinished, tuning_notes(store.folder))


def _write(grids: Sequence[Grid], formats: Iterable[str], folder: Path) -> None:
    make_folder(folder)
    for kind in formats:
        write_atomic(folder / f"report.{FORMATS[kind][0]}", write(grids, kind))


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The option that chooses the rule."""
    described = "; ".join(f"{name}: {rule.description}" for name, rule in SELECTION.items())
    parser.add_argument(
        "--selection", choices=SELECTION, default="training_domain", help=f"{described} [training_domain]"
    )


def baselines_of(records: Sequence[Record]) -> list[str]:
    """The baselines that another method has at least two pairs of runs with."""
    there = [baseline for baseline in BASELINES if any(record.method == baseline for record in records)]
    return [own for own in there if any(other.pairs > 1 for other in paired_differences(records, own))]
