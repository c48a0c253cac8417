"""Tables of finished runs, and what they do and do not show about one method.

Means and standard errors are DomainBed's (Gulrajani & Lopez-Paz 2021, "In Search of Lost Domain Generalization"):
population standard deviation over seeds / √n; the average is taken over held-out domains within each seed first.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean, pstdev, stdev

from rich.table import Table as RichTable
from rich.text import Text

from hf_sage.benchmark.records import Record, by_run


@dataclass(frozen=True)
class Cell:
    """Accuracies in [0, 1] on one held-out domain or on their average: one value a seed, in order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def stderr(self) -> float:
        """Standard error over seeds: population standard deviation / √n, hence 0 for one seed."""
        return pstdev(self.values) / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Table:
    """Accuracies of methods (rows) on held-out domains and on their average (columns).

    Attributes:
        columns: Held-out domains in order of first appearance, then `average`.
        rows: For each method, in order of first appearance, a cell for each column; `None` where no run has finished.
        seeds: Number of different seeds of all runs.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell | None, ...]]
    seeds: int

    def to_markdown(self) -> str:
        """Percent as `82.6 ± 0.4`, the best of each column in bold, `–` where no run has finished.

        One seed has no spread, hence no `±`. A cell with fewer seeds than the benchmark says how many: `(n=2)`.
        """
        lines = ["| method | " + " | ".join(self.columns) + " |", "|:---|" + "---:|" * len(self.columns)]
        for method, texts in self._texts().items():
            cells = (f"**{text}**" if best else text for text, best in texts)
            lines.append(f"| {method.upper()} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_rich(self) -> RichTable:
        """The table of `to_markdown`, for the terminal."""
        table = RichTable("method")
        for name in self.columns:
            table.add_column(Text(name), justify="right")
        for method, texts in self._texts().items():
            table.add_row(Text(method.upper()), *(Text(text, style="bold" if best else "") for text, best in texts))
        return table

    def to_csv(self) -> str:
        """One line a cell, as fractions at full precision; mean and stderr are empty where no run has finished."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "column", "mean", "stderr", "seeds"])
        for method, cells in self.rows.items():
            for name, cell in zip(self.columns, cells, strict=True):
                writer.writerow([method, name, *((cell.mean, cell.stderr, len(cell.values)) if cell else ("", "", 0))])
        return file.getvalue()

    def to_json(self) -> str:
        """`{method: {column: {mean, stderr, values} or null}}`, as fractions at full precision, one value a seed."""
        rows = {
            method: {
                name: cell and {"mean": cell.mean, "stderr": cell.stderr, "values": cell.values}
                for name, cell in zip(self.columns, cells, strict=True)
            }
            for method, cells in self.rows.items()
        }
        return json.dumps(rows, indent=2) + "\n"

    def _texts(self) -> dict[str, list[tuple[str, bool]]]:
        """The text of each cell, and whether it is the best of its column as far as the one decimal shown tells."""
        shown = {m: [cell and round(100 * cell.mean, 1) for cell in cells] for m, cells in self.rows.items()}
        best = [max((v for v in column if v is not None), default=None) for column in zip(*shown.values(), strict=True)]
        return {
            m: [(self._text(c), c is not None and v == b) for c, v, b in zip(cells, shown[m], best, strict=True)]
            for m, cells in self.rows.items()
        }

    def _text(self, cell: Cell | None) -> str:
        if cell is None:
            return "–"
        n = len(cell.values)
        spread = f" ± {100 * cell.stderr:.1f}" if n > 1 else ""
        return f"{100 * cell.mean:.1f}{spread}" + (f" (n={n})" if n < self.seeds else "")


def aggregate(records: Iterable[Record]) -> Table:
    """Mean and standard error over seeds of each method on each held-out domain, and on the average over domains.

    The average of a method is over the seeds that have finished every held-out domain of the table, and only those.

    Raises:
        ValueError: On no runs, runs of several datasets, or two runs of one method, domain and seed (see `by_run`).
    """
    runs = by_run(records)
    if not runs:
        raise ValueError("no finished runs to make a table of: run the benchmark first.")
    domains = tuple(dict.fromkeys(domain for _, domain, _ in runs))
    seeds = sorted({seed for _, _, seed in runs})

    def row(method: str) -> tuple[Cell | None, ...]:
        found = {s: [runs.get((method, domain, s)) for domain in domains] for s in seeds}
        columns = [[run.accuracy for run in column if run] for column in zip(*found.values(), strict=True)]
        average = [fmean(run.accuracy for run in line if run) for line in found.values() if all(line)]
        return tuple(Cell(tuple(values)) if values else None for values in [*columns, average])

    methods = dict.fromkeys(method for method, _, _ in runs)
    return Table((*domains, "average"), {method: row(method) for method in methods}, len(seeds))


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method minus a baseline's, over the pairs of runs with one held-out domain and one seed in common.

    Attributes:
        method: The method compared with the baseline.
        mean: Mean difference, in [-1, 1]; NaN without a pair.
        stderr: Its standard error, sample standard deviation / √n; NaN (undefined) with fewer than two pairs.
        pairs: Number of pairs, n.
    """

    method: str
    mean: float
    stderr: float
    pairs: int

    def __str__(self) -> str:
        spread = f" ± {100 * self.stderr:.1f}" if self.pairs > 1 else ""
        return f"{100 * self.mean:+.1f}{spread} points ({self.pairs} pair{'s' * (self.pairs != 1)})"


def paired_differences(records: Iterable[Record], baseline: str) -> list[Difference]:
    """Difference of every other method to `baseline`, in order of first appearance, paired over (held_out, seed).

    Raises:
        ValueError: If the baseline has no run, or as in `by_run`.
    """
    runs = by_run(records)
    methods = list(dict.fromkeys(method for method, _, _ in runs))
    if baseline not in methods:
        raise ValueError(f"no finished run of {baseline!r} to compare with: there are runs of {methods}.")

    def difference(method: str) -> Difference:
        shared = [key[1:] for key in runs if key[0] == method and (baseline, *key[1:]) in runs]
        pairs = [runs[method, *key].accuracy - runs[baseline, *key].accuracy for key in shared]
        mean = fmean(pairs) if pairs else math.nan
        stderr = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        return Difference(method, mean, stderr, len(pairs))

    return [difference(method) for method in methods if method != baseline]


def verdict(records: Iterable[Record], method: str = "sage") -> str:
    """Whether a method is above every other on average, and by more than two standard errors, in plain sentences.

    Raises:
        ValueError: If the method has no run, or as in `by_run`.
    """
    records = list(records)
    leads = [replace(other, mean=-other.mean) for other in paired_differences(records, method) if other.pairs]
    behind = [lead for lead in leads if lead.mean <= 0]
    told = behind or leads
    names = " and ".join(lead.method.upper() for lead in told)
    points = str(told[0]) if len(told) == 1 else ", ".join(f"{lead.method.upper()} {lead}" for lead in told)
    within = [lead for lead in told if lead.pairs > 1 and abs(lead.mean) <= 2 * lead.stderr]

    if behind:
        sentences = [f"{method.upper()} does not beat {names} here: {points}."]
    elif leads:
        sentences = [f"{method.upper()} is ahead of {names} here on average: {points}."]
    else:
        sentences = [f"{method.upper()} has no run of another method to be compared with."]
    if any(lead.pairs == 1 for lead in told):
        sentences.append("With one pair the standard error is undefined.")
    elif within:
        within_names = " and ".join(lead.method.upper() for lead in within)
        sentences.append(f"The difference to {within_names} does not exceed two standard errors.")
    elif told:
        sentences.append("The difference exceeds two standard errors.")
    table = aggregate(records)
    grid = len(table.rows) * (len(table.columns) - 1) * table.seeds
    if len(records) < grid:
        sentences.append(f"{grid - len(records)} of {grid} runs have not finished.")
    return " ".join(sentences)
