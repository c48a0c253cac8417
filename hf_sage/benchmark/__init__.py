"""Benchmarks of methods on held-out domains: runs and their records, tables, comparisons, and a figure."""

from __future__ import annotations

from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import Record, by_run, read_records, write_atomic
from hf_sage.benchmark.tables import Cell, Difference, Table, aggregate, paired_differences, verdict

__all__ = [
    "Cell",
    "Difference",
    "Record",
    "Table",
    "aggregate",
    "by_run",
    "paired_differences",
    "plot_comparison",
    "read_records",
    "verdict",
    "write_atomic",
]
