"""``hf-sage report``: the table beside the paper's, differences with confidence intervals, and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_sage.benchmark.differences import Difference, paired_differences, pooled_differences
from hf_sage.benchmark.grids import FORMATS, Entry, Grid, write
from hf_sage.benchmark.paper import PaperTable, paper_table
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import Record, make_folder, write_atomic
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.rules import Rules, rules_of
from hf_sage.benchmark.selection import SELECTION, select
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.tables import Cell, Table, aggregate

BASELINES = ("erm", "sam")
LEVEL = 0.95
SPREAD = "mean ± standard error over seeds (population standard deviation / √n)"


def main(argv: Sequence[str]) -> int:
    """Writes ``report.<ending>`` in each format and ``<dataset>.png``, and prints the report in Markdown.

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
    results = store.results()
    grids = report(results, options.selection, unfinished=len(store.jobs()) - len(results))
    folder = options.output_dir or Path(options.folder) / "report"
    make_folder(folder)
    for kind in options.format:
        write_atomic(folder / f"report.{FORMATS[kind][0]}", write(grids, kind))
    for dataset, records in by_dataset(select(results, options.selection)).items():
        plot_comparison(records, folder / f"{Path(dataset).name}.png")
    sys.stdout.write(write(grids, "markdown"))
    sys.stdout.write(f"Written to {folder}/: {', '.join(sorted(file.name for file in folder.iterdir()))}\n")
    return 0


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The option that chooses the rule."""
    described = "; ".join(f"{name}: {rule.description}" for name, rule in SELECTION.items())
    parser.add_argument(
        "--selection", choices=SELECTION, default="training_domain", help=f"{described} [training_domain]"
    )


def report(results: Sequence[Result], selection: str, unfinished: int = 0) -> list[Grid]:
    """The tables of a report: the averages beside the paper's, every dataset by domain, and the differences.

    Args:
        results: All results of a benchmark.
        selection: Name of the selection rule.
        unfinished: Number of jobs without a result.

    Raises:
        ValueError: If the results are of several benchmarks, or the rule needs runs that are not there.
    """
    records = by_dataset(select(results, selection))
    rules = {dataset: rules_of(dataset, results, selection) for dataset in records}
    tables = {dataset: aggregate(own) for dataset, own in records.items()}
    missing = [f"{unfinished} jobs have not finished and are not in this table."] if unfinished else []
    grids = [_summary(tables, rules, missing)]
    grids += [dataset_grid(dataset, table, rules[dataset], missing) for dataset, table in tables.items()]
    return grids + [grid for baseline in BASELINES for grid in _differences(records, baseline, rules, missing)]


def by_dataset(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each dataset, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.dataset, []).append(record)
    return found


def dataset_grid(dataset: str, table: Table, rules: Rules, notes: Sequence[str] = ()) -> Grid:
    """One dataset by held-out domain."""
    rows = [(method.upper(), [Entry(*entry) for entry in entries]) for method, entries in table.texts().items()]
    what = (
        "Accuracy in % on the held-out domain, mean ± standard error over seeds (population standard deviation / √n); "
    )
    what += "the average is over domains within each seed first."
    return Grid(dataset, ["method", *table.columns], [rows], [what, *rules.sentences(), *notes], rules.facts())


def _summary(tables: dict[str, Table], rules: dict[str, Rules], notes: Sequence[str]) -> Grid:
    """Averages over domains, by dataset; beside Table 1 where a dataset is in it."""
    paper = paper_table()
    beside = any(dataset in paper.columns for dataset in tables)
    own = [dataset for dataset in tables if dataset not in paper.columns]
    printed = [column for column in paper.columns if column != "average"] if beside else []
    columns = [*printed, *own]
    complete = set(tables) >= set(columns)
    methods = dict.fromkeys(method for table in tables.values() for method in table.rows)
    cells = {method: [_average(tables.get(dataset), method) for dataset in columns] for method in methods}
    ours = []
    for method, row in cells.items():
        means = [cell.mean for cell in row if cell is not None]
        average = f"{100 * sum(means) / len(means):.1f}" if complete and len(means) == len(columns) else "–"
        ours.append((method.upper(), [*(Entry(_text(cell)) for cell in row), Entry(average)]))
    sentences = [
        f"Accuracy in % on held-out domains, averaged over the domains within each seed first; {SPREAD}. "
        "The last column is the mean of the datasets' means"
        + (", given where all have runs." if not complete or beside else "."),
    ]
    for dataset, own_rules in rules.items():
        sentences += [f"{dataset}: {sentence}" for sentence in own_rules.sentences()]
    sections = [ours]
    if beside:
        sections.append([(f"{row} (paper)", _paper_row(paper, row, columns)) for row in paper.rows])
        sentences += _paper_notes(paper)
    title = "Average over held-out domains" + (f", beside {paper.source}" if beside else "")
    return Grid(title, ["method", *columns, "average"], sections, [*sentences, *notes], _joined(rules))


def _paper_row(paper: PaperTable, row: str, columns: Sequence[str]) -> list[Entry]:
    entries = []
    for column in [*columns, "average"]:
        value = paper.corrected(row, column) if column in paper.columns else None
        mark = " †" if paper.misprint(row, column) else ""
        entries.append(Entry("–" if value is None else f"{value:.1f}{mark}"))
    return entries


def _paper_notes(paper: PaperTable) -> list[str]:
    misprints = "; ".join(
        f"{m.row}, {m.column}: {'nothing' if m.printed is None else m.printed} is printed, {m.reason}"
        for m in paper.misprints
    )
    return [
        f"Rows marked (paper) are {paper.source}: CLIP ViT-B/16, three trials, no standard errors; its text says "
        "training-domain validation, but its baselines are quoted from another paper, by whose reviews they were "
        "prompt-tuned and selected on the test domain. They need not be comparable with each other or with these runs.",
        f"† Misprints, corrected here: {misprints}.",
    ]


def _differences(
    records: dict[str, list[Record]], baseline: str, rules: dict[str, Rules], notes: Sequence[str]
) -> list[Grid]:
    having = {dataset: own for dataset, own in records.items() if any(r.method == baseline for r in own)}
    found = {dataset: {d.method: d for d in paired_differences(own, baseline)} for dataset, own in having.items()}
    if len(having) > 1:
        found["all datasets"] = {d.method: d for d in pooled_differences(having.values(), baseline)}
    methods = dict.fromkeys(method for own in found.values() for method in own)
    if not methods:
        return []
    rows = [(method.upper(), [_difference(own.get(method)) for own in found.values()]) for method in methods]
    note = (
        f"Accuracy minus {baseline.upper()}'s in percentage points, over n pairs of runs with the same held-out "
        f"domain and seed; in brackets Student's t interval at {LEVEL:.0%}, mean ± t(n − 1) · s/√n with the sample "
        "standard deviation s (ddof 1). It takes the pairs for independent, which those of one domain over seeds are "
        "only in part. Bold: the interval is above 0. Intervals are not corrected for the number of comparisons."
    )
    sentences = [f"{dataset}: {sentence}" for dataset in having for sentence in rules[dataset].sentences()]
    title = f"Difference to {baseline.upper()}"
    return [Grid(title, ["method", *found], [rows], [note, *sentences, *notes], _joined(rules))]


def _difference(difference: Difference | None) -> Entry:
    if difference is None or not difference.pairs:
        return Entry("–")
    low, high = difference.interval(LEVEL)
    pairs = f" (n={difference.pairs})"
    if difference.pairs == 1:
        return Entry(f"{_signed(difference.mean)} [undefined]{pairs}")
    return Entry(f"{_signed(difference.mean)} [{_signed(low)}, {_signed(high)}]{pairs}", low > 0)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _average(table: Table | None, method: str) -> Cell | None:
    return table.rows[method][-1] if table is not None and method in table.rows else None


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"{100 * cell.mean:.1f}" + (f" ± {100 * cell.stderr:.1f}" if len(cell.values) > 1 else "")


def _joined(rules: dict[str, Rules]) -> dict[str, str]:
    """The facts of all datasets, those they share once."""
    facts = [own.facts() for own in rules.values()]
    return {name: "; ".join(dict.fromkeys(own[name] for own in facts)) for name in facts[0]}
