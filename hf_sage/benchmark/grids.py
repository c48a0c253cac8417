"""A table of texts, ready to be written as Markdown, LaTeX, CSV or HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

NUMBERS = ("value", "stderr", "n", "low", "high")
"""What a CSV tells of a cell, as fractions at full precision."""


class Entry(NamedTuple):
    """A cell.

    Attributes:
        text: What is shown.
        best: Whether it is shown in bold.
        values: Its `NUMBERS`, as far as it has any.
    """

    text: str
    best: bool = False
    values: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: Its title.
        header: Names of the columns; the first is that of the row names.
        rows: Row names and entries, by section: sections are set apart by a line.
        notes: Sentences that belong under it: what is shown, and under which rules.
        facts: Names and values that every line of a CSV repeats, so that a line that is cut out still tells.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, Sequence[Entry]]]]
    notes: Sequence[str] = ()
    facts: dict[str, str] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """A pipe table under a heading, the best in bold, the notes below."""
        lines = [_pipes(self.header), "|:---|" + "---:|" * (len(self.header) - 1)]
        for i, section in enumerate(self.rows):
            if i:
                lines.append(_pipes([""] * len(self.header)))
            lines += [
                _pipes([_escaped(name), *(f"**{e.text}**" if e.best else e.text for e in own)]) for name, own in section
            ]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n\n" + "".join(f"{note}\n\n" for note in self.notes)

    def to_latex(self) -> str:
        """A ``table`` with a ``tabular`` by booktabs, the notes as its caption."""
        lines = [
            "\\begin{table}",
            "\\centering",
            "\\begin{tabular}{l" + "c" * (len(self.header) - 1) + "}",
            "\\toprule",
            " & ".join(map(_tex, self.header)) + r" \\",
        ]
        for section in self.rows:
            lines.append("\\midrule")
            for name, own in section:
                cells = [f"\\textbf{{{_tex(e.text)}}}" if e.best else _tex(e.text) for e in own]
                lines.append(" & ".join([_tex(name), *cells]) + r" \\")
        caption = " ".join([f"{self.title}.", *self.notes])
        lines += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{_tex(caption)}}}", "\\end{table}"]
        return "\n".join(lines) + "\n\n"

    def to_html(self) -> str:
        """A ``table`` with a caption, the notes as paragraphs."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        bodies = ""
        for section in self.rows:
            lines = "".join(
                f"<tr><th>{html.escape(name)}</th>"
                + "".join(f"<td>{_strong(html.escape(e.text), e.best)}</td>" for e in own)
                + "</tr>\n"
                for name, own in section
            )
            bodies += f"<tbody>\n{lines}</tbody>\n"
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n{bodies}</table>\n{notes}"

    def to_csv(self) -> str:
        """A line a cell: title, facts, names of row and column, and numbers at full precision."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", *self.facts, "row", "column", *NUMBERS])
        for section in self.rows:
            for name, own in section:
                for column, entry in zip(self.header[1:], own, strict=True):
                    numbers = (entry.values.get(number, "") for number in NUMBERS)
                    writer.writerow([self.title, *self.facts.values(), name, column, *numbers])
        return file.getvalue()


FORMATS: dict[str, tuple[str, Callable[[Grid], str]]] = {
    "markdown": ("md", Grid.to_markdown),
    "latex": ("tex", Grid.to_latex),
    "csv": ("csv", Grid.to_csv),
    "html": ("html", Grid.to_html),
}
"""By name, the ending of the file and how a table is written."""

HTML_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Benchmark</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }
table { border-collapse: collapse; margin-top: 2rem } caption { font-weight: 600; text-align: left; padding: .5rem 0 }
th, td { padding: .2rem .8rem; text-align: right } tr > :first-child { text-align: left }
tbody { border-top: 1px solid #999 }
</style>
"""


def write(grids: Sequence[Grid], kind: str) -> str:
    """Tables one after the other, as a file of a format."""
    texts = [FORMATS[kind][1](grid) for grid in grids]
    if kind == "csv":  # one header for all
        return texts[0] + "".join(text.partition("\n")[2] for text in texts[1:])
    return (HTML_HEAD if kind == "html" else "") + "".join(texts)


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _strong(text: str, best: bool) -> str:
    return f"<strong>{text}</strong>" if best else text


_TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_TEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": "--", "−": "$-$", "†": r"$^\dagger$"}
_TEX |= {"±": r"$\pm$", "·": r"$\cdot$", "√": r"$\surd$", "×": r"$\times$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)
