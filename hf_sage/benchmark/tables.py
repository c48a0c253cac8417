"""Tables of finished runs.

Means and standard errors are DomainBed's (Gulrajani & Lopez-Paz 2021, "In Search of Lost Domain Generalization"):
population standard deviation over seeds / √n; the average is taken over held-out domains within each seed first.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, pstdev

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
        for method, texts in self.texts().items():
            cells = (f"**{text}**" if best else text for text, best in texts)
            lines.append(f"| {method.upper()} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_rich(self) -> RichTable:
        """The table of `to_markdown`, for the terminal."""
        table = RichTable("method")
        for name in self.columns:
            table.add_column(Text(name), justify="right")
        for method, texts in self.texts().items():
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

    def texts(self) -> dict[str, list[tuple[str, bool]]]:
        """The text of each cell, and whether it is the best of its column as far as the one decimal shown tells.

        Of a column's cells only those with the most seeds are compared: the mean of few has the better chances.
        """
        best = [_best(column) for column in zip(*self.rows.values(), strict=True)]
        return {
            m: [(self._text(c), c is not None and _rank(c) == b) for c, b in zip(cells, best, strict=True)]
            for m, cells in self.rows.items()
        }

    def _text(self, cell: Cell | None) -> str:
        if cell is None:
            return "–"
        n = len(cell.values)
        spread = f" ± {100 * cell.stderr:.1f}" if n > 1 else ""
        return f"{100 * cell.mean:.1f}{spread}" + (f" (n={n})" if n < self.seeds else "")


def _rank(cell: Cell) -> tuple[int, float]:
    return len(cell.values), round(100 * cell.mean, 1)


def _best(column: Iterable[Cell | None]) -> tuple[int, float] | None:
    return max((_rank(cell) for cell in column if cell is not None), default=None)


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
