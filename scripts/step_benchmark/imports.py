"""Section ``imports``: what importing the library costs, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from step_benchmark.table import Row
from step_benchmark.timing import ChildClock, interleaved
from step_benchmark.workload import Setting

PAIRS = (
    ("import hf_sage", "import transformers", 1.1),
    ("from hf_sage import SAGETrainer", "from transformers import Trainer", 1.1),
    ("import hf_sage.polar", "import torch", None),
)
"""Our statement, theirs, and the ratio to stay below."""


def imports(setting: Setting) -> list[Row]:
    """Compares the CPU time of a fresh interpreter that runs our import to one that runs the import it builds on."""
    statements = list(dict.fromkeys(statement for ours, theirs, _ in PAIRS for statement in (ours, theirs)))
    contestants = {statement: [partial(_run, statement)] for statement in statements}
    times = interleaved(contestants, ChildClock(), setting.repetitions, setting.seed)
    return [
        Row.of_ratio(
            "imports",
            f"`{ours}` ÷ `{theirs}`",
            "fresh process",
            times.ratio(ours, theirs),
            at_most=bound,
            details={"seconds": {name: times.total(name) for name in (ours, theirs)}},
        )
        for ours, theirs, bound in PAIRS
    ]


def _run(statement: str) -> None:
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    if done.returncode != 0:
        raise ImportError(f"`{statement}` failed in a fresh process:\n{done.stderr}")
