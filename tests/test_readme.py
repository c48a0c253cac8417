"""The README's code runs as written, and its tables name what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import entries, image_rows, train, vit

from hf_sage import SAGEArguments
from hf_sage.methods import METHODS
from hf_sage.polar import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The README's one code block of a language that contains some text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [b for b in blocks if containing in b]
    return found


def test_the_loop_on_plain_torch_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 4, generator=generator)

    def rows(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, 3, (16,), generator=generator)
        return centres[y] + shift + 0.1 * torch.randn(16, 4, generator=generator), y

    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    world = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2),
        "batches": [{"photo": rows(0.0), "sketch": rows(0.5)} for _ in range(60)],
    }
    exec(block("python", "two_pass_step"), world)
    x, y = rows(0.25)
    assert (model(x).argmax(-1) == y).float().mean() > 0.8  # three separate clusters
    assert float(world["report"].loss) < 0.7


def test_every_field_is_in_the_table() -> None:
    table = README.split("| field | values | default |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert named == {f.name for f in dataclasses.fields(SAGEArguments)}
    assert set(re.findall(r'`"(\w+)"`', next(line for line in table.splitlines() if "`polar`" in line))) == set(PRESETS)
    assert set(re.findall(r'`"(\w+)"`', next(line for line in table.splitlines() if "`method`" in line))) == set(
        METHODS
    )


def test_the_demos_table_is_the_one_on_file() -> None:
    table = (Path(__file__).parent.parent / "model_cards" / "style_digits" / "table.md").read_text(encoding="utf-8")
    assert table.split("\n\n")[0] in README


def test_a_method_of_ones_own_trains_as_written() -> None:
    world: dict[str, Any] = {}
    exec(block("python", "SignAscent(Ascent)"), world)
    assert len(block("python", "SignAscent(Ascent)").splitlines()) <= 30
    trainer = train(vit(), image_rows(), method=world["method"], save_strategy="no")
    moved = [entry["perturbation_norm"] for entry in entries(trainer)]
    entries_of_theta = sum(p.numel() for p in trainer.model.parameters())
    # Every entry of a gradient moves by ρ, but for the few that are zero.
    assert all(0.9 < norm / (1e-3 * entries_of_theta**0.5) <= 1.0 + 1e-6 for norm in moved)
