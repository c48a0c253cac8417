"""The paper's Table 1, to stand beside a table of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import yaml


@dataclass(frozen=True)
class Misprint:
    """A cell that is not printed as it should be.

    Attributes:
        row: The method.
        column: The dataset, or ``average``.
        printed: What is printed; ``None`` for nothing.
        correct: What belongs there.
        reason: Why.
    """

    row: str
    column: str
    printed: float | None
    correct: float
    reason: str


@dataclass(frozen=True)
class PaperTable:
    """Accuracies in % as printed.

    Attributes:
        source: Where they are printed.
        columns: Names of the datasets as `hf_sage.data.DATASETS` has them, then ``average``.
        rows: By method, a number for each column, or nothing.
        misprints: Cells that are wrong in print.
    """

    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    misprints: tuple[Misprint, ...]

    def misprint(self, row: str, column: str) -> Misprint | None:
        """The misprint in a cell, if there is one."""
        return next((found for found in self.misprints if (found.row, found.column) == (row, column)), None)

    def corrected(self, row: str, column: str) -> float | None:
        """What belongs into a cell."""
        found = self.misprint(row, column)
        return found.correct if found else self.rows[row][self.columns.index(column)]


def paper_table() -> PaperTable:
    """Table 1 of the SAGE paper."""
    text = resources.files("hf_sage.benchmark").joinpath("paper_table1.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    return PaperTable(
        values["source"],
        tuple(values["columns"]),
        {row: tuple(cells) for row, cells in values["rows"].items()},
        tuple(Misprint(**entry) for entry in values["misprints"]),
    )
