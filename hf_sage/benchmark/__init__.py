"""Benchmarks of methods on held-out domains: jobs, raw results, selection, tables, comparisons, figures, reports."""

from __future__ import annotations

import logging

# Where it is installed, it warns at import, once a process, of kernels for 4-bit models, which no benchmark has.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from hf_sage.benchmark.differences import Difference, paired_differences, pooled_differences, verdict
from hf_sage.benchmark.domainbed import Environment, domainbed_split, environments, seed_hash
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import Record, by_run, write_atomic
from hf_sage.benchmark.results import Evaluation, Result
from hf_sage.benchmark.selection import SELECTION, select
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.tables import Cell, Table, aggregate

__all__ = [
    "SELECTION",
    "Cell",
    "Difference",
    "Environment",
    "Evaluation",
    "Job",
    "Options",
    "Record",
    "Result",
    "Store",
    "Table",
    "aggregate",
    "by_run",
    "domainbed_split",
    "environments",
    "paired_differences",
    "plot_comparison",
    "pooled_differences",
    "seed_hash",
    "select",
    "verdict",
    "write_atomic",
]
