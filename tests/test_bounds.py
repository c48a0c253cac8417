"""What the project says of its dependencies is said once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_lower_bounds_are_what_the_minimal_environment_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["demo"]
    bounds = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", entry).groups() for entry in declared)  # and nothing but a bound
    lines = (ROOT / ".ci" / "constraints-min.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: _numbers(v) for name, v in bounds.items()} == {name: _numbers(v) for name, v in pins.items()}


def test_every_bound_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if re.match(r'\s+"[\w.-]+>=', line):
            assert "# " in line, line


def _numbers(version: str) -> list[int]:
    """The version without trailing zeros: 2.6 and 2.6.0 are the same."""
    return [int(n) for n in re.sub(r"(\.0)+$", "", version).split(".")]
