"""The picture of many methods: how far each is from a baseline, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from hf_sage.benchmark.differences import Difference, paired_differences
from hf_sage.benchmark.drawing import COLOURS, FAINT, INK, drawing
from hf_sage.benchmark.records import Record


def plot_differences(records: Iterable[Record], baseline: str, path: str | Path) -> None:
    """Draws the paired differences to a baseline to a PNG, the best method on top.

    A row a method: the mean difference in percentage points with its standard error (thick) and Student's t interval at
    95 % (thin), over the pairs of runs with the same held-out domain and seed. Methods whose interval is above 0 are
    blue, those below it orange, all others grey. A method with fewer than two pairs is left out; one that is far off
    the others is a number at the edge.

    Args:
        records: Runs of one dataset.
        baseline: The method that the others are compared with.
        path: File to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the baseline has no run, or no other method has two pairs with it.
    """
    found = sorted((d for d in paired_differences(records, baseline) if d.pairs > 1), key=lambda d: d.mean)
    if not found:
        raise ValueError(f"No method has two pairs of runs with {baseline!r}: there are no differences to draw.")
    reach = _reach(found)
    with drawing(path, 7.5, 1.2 + 0.26 * len(found)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, difference in enumerate(found):
            low, high = difference.interval()
            colour = COLOURS[0] if low > 0 else COLOURS[1] if high < 0 else "#777777"
            if abs(difference.mean) > reach:
                edge = math.copysign(reach, difference.mean)
                side = "left" if edge < 0 else "right"
                axes.text(100 * edge, y, f" {100 * difference.mean:+.1f} ", ha=side, va="center", color=colour)
                continue
            axes.hlines(y, 100 * low, 100 * high, color=colour, linewidth=1)
            near, far = difference.mean - difference.stderr, difference.mean + difference.stderr
            axes.hlines(y, 100 * near, 100 * far, color=colour, linewidth=3.5)
            axes.plot(100 * difference.mean, y, "o", color="white", markeredgecolor=colour, markersize=5)
        axes.set_yticks(range(len(found)), [f"{d.method.upper()} ({d.pairs})" for d in found])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(-100 * reach, 100 * reach)
        axes.set_ylim(-0.7, len(found) - 0.3)
        axes.set_title(f"Accuracy on held-out domains minus {baseline.upper()}'s, in points (pairs of runs)")
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["left", "right"]].set_visible(False)


def _reach(differences: Sequence[Difference]) -> float:
    """How far the axis goes to each side: over the intervals of all but the few that would dwarf the others."""
    ends = [max(map(abs, difference.interval())) for difference in differences]
    return 1.1 * max(0.001, *(end for end in ends if end <= 4 * median(ends)))
