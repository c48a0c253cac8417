"""What the first line of a builder's docstring says: what the method does, and where it was published."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

_FORM = re.compile(r"\s*\((?P<paper>[^()]*?(?:\d{4}|under review))(?:, arXiv (?P<arxiv>\d{4}\.\d{5}))?\)$")
"""How it ends: (authors year, arXiv number)."""


@dataclass(frozen=True)
class Citation:
    """A method in one line, and its paper.

    Attributes:
        summary: What it does.
        paper: Authors and year, or the title of a paper under review; ``None`` where there is none.
        arxiv: The paper's number on arXiv, where it has one.
    """

    summary: str
    paper: str | None
    arxiv: str | None

    @classmethod
    def of(cls, build: Callable[..., object]) -> Citation:
        """Reads the docstring of a method's builder."""
        first = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
        cited = _FORM.search(first)
        return cls(_FORM.sub("", first) + ".", cited and cited["paper"], cited and cited["arxiv"])
