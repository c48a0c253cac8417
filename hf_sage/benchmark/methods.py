"""``hf-sage methods``: every method by name, with its paper, what it does, costs and needs, and its hyperparameters.

There is no second list: the rows are read off the builders in `hf_sage.methods`, their docstrings and signatures.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_sage.methods import METHODS, Method
from hf_sage.methods.citations import Citation


@dataclass(frozen=True)
class Listing:
    """What there is to know about a method before choosing it.

    Attributes:
        name: What ``SAGEConfig(method=...)`` calls it.
        summary: What it does.
        paper: Authors and year, or the title of a paper under review; ``None`` for ERM.
        arxiv: The paper's number on arXiv, where it has one.
        forwards: Forward passes over the batch a step, on average; ERM's is 1.
        backwards: Backward passes over the batch a step, on average.
        auxiliary_passes: Forward and backward passes over the auxiliary batch a step, on average.
        needs: What it cannot do without.
        hyperparameters: Its hyperparameters and their defaults.
    """

    name: str
    summary: str
    paper: str | None
    arxiv: str | None
    forwards: float
    backwards: float
    auxiliary_passes: float
    needs: tuple[str, ...]
    hyperparameters: dict[str, Any]

    @classmethod
    def of(cls, name: str, build: Callable[..., Method]) -> Listing:
        """Reads a method off its builder."""
        cited = Citation.of(build)
        method = build()
        return cls(
            name,
            cited.summary,
            cited.paper,
            cited.arxiv,
            method.forwards,
            method.backwards,
            method.auxiliary_passes,
            tuple(sorted(method.needs)),
            {p.name: p.default for p in inspect.signature(build).parameters.values()},
        )

    @property
    def cost(self) -> str:
        """As in ``2 F + 2 B``, F and B being a forward and a backward pass over the batch, (F + B)ₐ over the other."""
        own = f"{self.forwards:.3g} F + {self.backwards:.3g} B"
        return own + (f" + {self.auxiliary_passes:.3g} (F + B)ₐ" if self.auxiliary_passes else "")


def listings() -> list[Listing]:
    """All methods, in the order of `METHODS`."""
    return [Listing.of(name, build) for name, build in METHODS.items()]


def to_rich(rows: Sequence[Listing]) -> Table:
    """The methods as a table for the terminal, readable in 80 columns."""
    table = Table(
        caption="F, B: a forward, a backward pass over the batch; ₐ: over the auxiliary batch",
        show_lines=True,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("what it does, its paper, its hyperparameters")
    table.add_column("cost a step", max_width=16)
    table.add_column("needs")
    for row in rows:
        paper = ", arXiv ".join(filter(None, (row.paper, row.arxiv)))
        defaults = ", ".join(f"{name}={value!r}" for name, value in row.hyperparameters.items())
        about = "\n".join(filter(None, (row.summary, paper, defaults)))
        table.add_row(*map(Text, (row.name, about, row.cost, "\n".join(row.needs))))
    return table


def main(argv: Sequence[str]) -> int:
    """Lists the methods.

    Args:
        argv: The words after ``hf-sage methods``.

    Returns:
        The exit status.

    Raises:
        ValueError: If a name is unknown.
    """
    parser = argparse.ArgumentParser(prog="hf-sage methods", description="List the methods and what they cost.")
    parser.add_argument("names", nargs="*", metavar="METHOD", help="which methods [all]")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}: use any of {', '.join(METHODS)}.")
    rows = [row for row in listings() if not options.names or row.name in options.names]
    console = Console()
    if options.json:
        console.out(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False), highlight=False)
    else:
        console.print(to_rich(rows))
    return 0
