"""The picture beside the table: accuracy by held-out domain, and how agreement and noise went over training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_sage.benchmark.drawing import COLOURS, FAINT, INK, drawing
from hf_sage.benchmark.records import Record
from hf_sage.benchmark.tables import aggregate


def plot_comparison(records: Iterable[Record], path: str | Path) -> None:
    """Draw finished runs to a PNG of 2400 pixels width that reads well at half of it.

    Left: accuracy of each method on each held-out domain and on average (bars from zero), with the standard error over
    seeds (whiskers) and every seed (dots); `–` where no run has finished. Right: agreement S and noise scale β over
    training of the methods that logged them, mean over runs in a band from the lowest to the highest run. If none has
    logged an agreement, there is the left panel only. For more than a handful of methods see
    `hf_sage.benchmark.forest`.

    Args:
        records: Runs of one dataset.
        path: File to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: On no runs, runs of several datasets, or two runs of one method, domain and seed.
    """
    records = list(records)
    methods = list(aggregate(records).rows)
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    logged = any(_curve(records, method, "agreement") for method in methods)
    with drawing(path, 12 if logged else 7.5, 5.2) as figure:
        panels = figure.subplots(1, 2 if logged else 1, squeeze=False, width_ratios=[3, 2] if logged else None)[0]
        _draw_accuracy(panels[0], records, colours)
        if logged:
            _draw_agreement(panels[1], records, colours)


def _draw_accuracy(axes: Any, records: list[Record], colours: dict[str, str]) -> None:
    table = aggregate(records)
    width = 0.8 / len(table.rows)
    places = [*range(len(table.columns) - 1), len(table.columns) - 0.6]  # the average stands a little apart
    for i, (method, cells) in enumerate(table.rows.items()):
        for place, cell in zip(places, cells, strict=True):
            x = place + (i - (len(table.rows) - 1) / 2) * width
            if cell is None:
                axes.annotate("–", (x, 0), (0, 3), textcoords="offset points", ha="center", color=colours[method])
                continue
            axes.bar(x, 100 * cell.mean, 0.9 * width, color=colours[method])
            if len(cell.values) > 1:
                axes.errorbar(x, 100 * cell.mean, 100 * cell.stderr, color=INK, linewidth=1.2)
                spots = [x + width * (0.5 * j / (len(cell.values) - 1) - 0.25) for j in range(len(cell.values))]
                axes.scatter(
                    spots, [100 * v for v in cell.values], 7, "white", edgecolors=INK, linewidths=0.6, zorder=3
                )
            axes.annotate(
                f"{100 * cell.mean:.1f}",
                (x, 0),
                (0, 5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                color="white",
                fontsize=9,
            )
    axes.set_title("Accuracy on the held-out domain (%)")
    axes.set_xticks(places, table.columns)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [axes.bar(0, 0, color=colour, label=method.upper()) for method, colour in colours.items()]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 7), frameon=False)


def _draw_agreement(axes: Any, records: list[Record], colours: dict[str, str]) -> None:
    right = axes.twinx()
    for method, colour in colours.items():
        for panel, key, dashes in ((axes, "agreement", "-"), (right, "noise_scale", "--")):
            curve = _curve(records, method, key)
            if curve:
                steps, means, lows, highs = zip(*curve, strict=True)
                panel.plot(steps, means, dashes, color=colour)
                panel.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.set_title("Gradient agreement and noise")
    axes.set_xlabel("step")
    axes.set_ylabel("agreement S (solid)")
    right.set_ylabel("noise scale β (dashed)")


def _curve(records: list[Record], method: str, key: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of what the runs of a method logged under a key."""
    values: dict[float, list[float]] = defaultdict(list)
    for entry in (entry for record in records if record.method == method for entry in record.history):
        if key in entry and math.isfinite(entry[key]):
            values[entry["step"]].append(entry[key])
    return [(step, fmean(found), min(found), max(found)) for step, found in sorted(values.items())]
