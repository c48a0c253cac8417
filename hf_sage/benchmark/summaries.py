"""The tables of a report: averages beside the paper's, every dataset by domain, differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hf_sage.benchmark.differences import LEVEL, Difference, paired_differences, pooled_differences
from hf_sage.benchmark.grids import Entry, Grid
from hf_sage.benchmark.paper import PaperTable, paper_table
from hf_sage.benchmark.records import Record
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.rules import Rules, rules_of
from hf_sage.benchmark.selection import select
from hf_sage.benchmark.tables import Cell, Table, aggregate

BASELINES = ("erm", "sam")
SPREAD = "mean ± standard error over seeds (population standard deviation / √n)"


def report_grids(
    results: Sequence[Result], selection: str, unfinished: int = 0, notes: Sequence[str] = ()
) -> list[Grid]:
    """The tables of a report: the averages beside the paper's, every dataset by domain, and the differences.

    Args:
        results: All results of a benchmark.
        selection: Name of the selection rule.
        unfinished: Number of jobs without a result.
        notes: What else is to be said of all tables.

    Raises:
        ValueError: If the results are of several benchmarks, or the rule needs runs that are not there.
    """
    records = by_dataset(select(results, selection))
    rules = {dataset: rules_of(dataset, results, selection) for dataset in records}
    tables = {dataset: aggregate(own) for dataset, own in records.items()}
    missing = [f"{unfinished} jobs have not finished and are not in this table."] if unfinished else []
    said = [*notes, *missing]
    grids = [_summary(tables, rules, said)]
    grids += [dataset_grid(dataset, table, rules[dataset], said) for dataset, table in tables.items()]
    return grids + [grid for baseline in BASELINES for grid in _differences(records, baseline, rules, said)]


def by_dataset(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each dataset, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.dataset, []).append(record)
    return found


def dataset_grid(dataset: str, table: Table, rules: Rules, notes: Sequence[str] = ()) -> Grid:
    """One dataset by held-out domain."""
    rows = [
        (method.upper(), [Entry(*text, _numbers(cell)) for text, cell in zip(texts, table.rows[method], strict=True)])
        for method, texts in table.texts().items()
    ]
    what = f"Accuracy in % on the held-out domain, {SPREAD}; the average is over domains within each seed first."
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
        average = Entry("–")
        if complete and len(means) == len(columns):
            average = Entry(f"{100 * fmean(means):.1f}", values={"value": fmean(means)})
        shown = [
            Entry(_text(tables.get(name), method), values=_numbers(cell))
            for name, cell in zip(columns, row, strict=True)
        ]
        ours.append((method.upper(), [*shown, average]))
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
        entries.append(Entry("–") if value is None else Entry(f"{value:.1f}{mark}", values={"value": value / 100}))
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
        "domain and seed: mean ± standard error s/√n with the sample standard deviation s (ddof 1), and in brackets "
        f"Student's t interval at {LEVEL:.0%}, mean ± t(n − 1) · s/√n. It takes the pairs for independent, which those "
        "of one domain over seeds are only in part. Bold: the interval is above 0. Intervals are not corrected for the "
        "number of comparisons."
    )
    sentences = [f"{dataset}: {sentence}" for dataset in having for sentence in rules[dataset].sentences()]
    title = f"Difference to {baseline.upper()}"
    return [Grid(title, ["method", *found], [rows], [note, *sentences, *notes], _joined(rules))]


def _difference(difference: Difference | None) -> Entry:
    if difference is None or not difference.pairs:
        return Entry("–")
    low, high = difference.interval(LEVEL)
    values = {"value": difference.mean, "stderr": difference.stderr, "n": difference.pairs, "low": low, "high": high}
    spread = "[undefined]"
    if difference.pairs > 1:
        spread = f"± {100 * difference.stderr:.1f} [{_signed(low)}, {_signed(high)}]"
    return Entry(f"{_signed(difference.mean)} {spread} (n={difference.pairs})", low > 0, values)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _average(table: Table | None, method: str) -> Cell | None:
    return table.rows[method][-1] if table is not None and method in table.rows else None


def _text(table: Table | None, method: str) -> str:
    """The average as the dataset's own table shows it: with the number of seeds where others have more."""
    return table.texts()[method][-1][0] if table is not None and method in table.rows else "–"


def _numbers(cell: Cell | None) -> dict[str, float]:
    return {} if cell is None else {"value": cell.mean, "stderr": cell.stderr, "n": len(cell.values)}


def _joined(rules: dict[str, Rules]) -> dict[str, str]:
    """The facts of all datasets, those they share once."""
    facts = [own.facts() for own in rules.values()]
    return {name: "; ".join(dict.fromkeys(own[name] for own in facts)) for name in facts[0]}
