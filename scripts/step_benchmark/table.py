"""Rows of the table: what was to be reached, what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from step_benchmark.timing import Ratio
from step_benchmark.workload import Setting

PACKAGES = ("torch", "transformers", "hf-sage", "torchjd", "pytorch_optimizer")
"""Whose versions stand beside the figures."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        section: The section that measured it.
        what: What is compared, e.g. ``"SAGE step ÷ SAM step"``.
        config: On what.
        measured: The figure; ``None`` where it could not be measured, see the note.
        low: Its lowest value in one repetition, where it was repeated.
        high: Its highest.
        at_most: The value to stay below or at, if there is one.
        at_least: The value to be at or above, if there is one.
        note: What else there is to say.
        details: More figures, for the JSON alone.
    """

    section: str
    what: str
    config: str
    measured: float | None
    low: float | None = None
    high: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_ratio(cls, section: str, what: str, config: str, ratio: Ratio, **rest: Any) -> Row:
        """The row of a ratio of times."""
        return cls(section, what, config, ratio.value, ratio.low, ratio.high, **rest)

    @property
    def reached(self) -> bool | None:
        """Whether the figure is where it was to be; ``None`` without a target or a figure."""
        if self.measured is None or (self.at_most is None and self.at_least is None):
            return None
        below = self.at_most is None or self.measured <= self.at_most
        above = self.at_least is None or self.measured >= self.at_least
        return below and above

    @property
    def target(self) -> str:
        """The target in words."""
        bounds = [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return ", ".join(bounds + ([f"≥ {self.at_least:g}"] if self.at_least is not None else []))

    def to_json(self) -> dict[str, Any]:
        """The row as the JSON holds it."""
        return asdict(self) | {"reached": self.reached}


def to_markdown(rows: Sequence[Row]) -> str:
    """The table: measured with its range over the repetitions, target, reached yes or no."""
    lines = ["| what | config | target | measured | reached | note |", "|:--|:--|:--|--:|:--|:--|"]
    for row in rows:
        measured = "–" if row.measured is None else _number(row.measured)
        if row.low is not None and row.high is not None:
            measured += f" ({_number(row.low)} to {_number(row.high)})"
        reached = {None: "", True: "yes", False: "no"}[row.reached]
        lines.append(f"| {row.what} | {row.config} | {row.target} | {measured} | {reached} | {row.note} |")
    return "\n".join(lines) + "\n"


def facts(setting: Setting) -> dict[str, Any]:
    """What the figures depend on: versions, machine by name, settings."""
    on_gpu = setting.device.type == "cuda"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(setting.device) if on_gpu else None,
        "device": setting.device.type,
        "timed_by": "device events" if on_gpu else "process CPU time, one thread",
        "threads": torch.get_num_threads(),
        "dtype": setting.dtype,
        "compile": setting.compile,
        "model": setting.model,
        "repetitions": setting.repetitions,
        "seed": setting.seed,
        "quick": setting.quick,
    }


def _number(x: float) -> str:
    return f"{x:.2e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}" if 0.99 < x < 1 else f"{x:.3f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name; Python's own answer is empty or the architecture on Linux."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
