"""The tutorial runs from top to bottom as it stands, at toy size: every block of commands, in one shell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hub_server import point_client_at, serve
from PIL import Image
from shell import run_script

from hf_sage.benchmark.store import Store

TUTORIAL = (Path(__file__).parent.parent / "scripts" / "your_own_domains.md").read_text(encoding="utf-8")
TOY = {"IMAGES": "3", "STEPS": "3", "SEEDS": "1"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall(TUTORIAL)
    assert {language for language, _ in blocks} == {"bash", "text", "python"}  # no other is left untested
    commands = "\n".join(block for language, block in blocks if language == "bash")
    work = tmp_path / "work"
    work.mkdir()
    with serve() as hub:
        point_client_at(hub, monkeypatch, tmp_path / "cache", token="hf_" + 34 * "t")
        printed = run_script(commands, work, tmp_path / "pipes", **TOY)
        assert "120 images, 4 domains, 10 classes\nno problems" in printed
        with Image.open(work / "preview.png") as preview:
            assert preview.format == "PNG"
        assert "held-out accuracy" in printed
        assert "12 of 12 jobs are done" in printed
        assert all(folder.is_done for folder in Store.open(work / "benchmark").jobs())
        assert {file.suffix for file in (work / "benchmark" / "report").iterdir()} == {
            *(".md", ".tex", ".csv", ".html", ".png")
        }
        assert "photo was held out and never trained on" in printed
        assert {"README.md", "config.json", "model.safetensors"} <= set(hub.repositories["me/digits-sage"].files)
        monkeypatch.chdir(work)
        for language, block in blocks:
            if language == "python":
                exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        str(file.relative_to(work)) for file in sorted((work / "pictures" / "photo").glob("*/*"))[:3]
    ]
    assert all("'label':" in line and "'score':" in line for line in lines)


def test_the_numbers_of_the_tutorial_are_few_and_shown() -> None:
    """What the test makes smaller are variables that the tutorial shows, and nothing else."""
    (variables,) = re.findall(r"^export (.*)$", TUTORIAL, re.MULTILINE)
    assert set(TOY) < set(re.findall(r"(\w+)=\$\{\1:-\w+\}", variables))
