"""How the pictures of benchmarks look, and where they are drawn: in memory, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe & Ito (2008), told apart with every kind of colour blindness; from dark to light, for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT = "#222222", "#DDDDDD"
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titlepad": 14,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of matplotlib that is written as a PNG of 200 pixels an inch when it is done.

    Args:
        path: File to write.
        width: In inches.
        height: In inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "hf-sage[demo]"') from error

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # draws without a display and without pyplot's global backend
        yield figure
        figure.savefig(path, format="png", dpi=200)
