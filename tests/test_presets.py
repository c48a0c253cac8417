"""Published settings: the values of the paper and of DomainBed, and that they are what the trainer takes."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_sage import SAGEConfig
from hf_sage.benchmark.presets import PRESETS, preset
from hf_sage.models import Head

PHOTOGRAPHS = ["PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"]
OF_THE_RUN = {"model", "head", "prompt", "rows_per_domain", "steps", "evaluate_every"}
OF_THE_RUN |= {"transform", "test_convention", "selection", "seeds"}


def for_trainer(name: str, dataset: str = "PACS") -> dict[str, object]:
    return {key: value for key, value in preset(name, dataset).items() if key not in OF_THE_RUN}


def test_the_paper():
    found = preset("paper", "PACS")
    assert found["model"] == "openai/clip-vit-base-patch16"
    assert (found["learning_rate"], found["rho"], found["gamma"]) == (1e-6, 1e-6, 1e-6)
    assert (found["rows_per_domain"], found["weight_decay"], found["max_grad_norm"]) == (12, 0, 0)
    assert (found["head"], found["transform"], found["test_convention"]) == ("zero_shot", "swad", "in_split")
    assert [preset("paper", d)["steps"] for d in PHOTOGRAPHS] == [5000, 5000, 5000, 5000, 15000]
    assert [preset("paper", d)["evaluate_every"] for d in PHOTOGRAPHS] == [200, 200, 200, 200, 1000]


def test_domainbed():
    found = preset("domainbed", "PACS")
    assert (found["learning_rate"], found["rows_per_domain"], found["weight_decay"]) == (5e-5, 32, 0)
    assert (found["head"], found["transform"]) == ("linear", "domainbed")
    assert [preset("domainbed", d)["steps"] for d in PHOTOGRAPHS] == [5001] * 5
    assert [preset("domainbed", d)["evaluate_every"] for d in PHOTOGRAPHS] == [300, 300, 300, 300, 1000]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dataset", [*PHOTOGRAPHS, "my/own"])
def test_every_key_has_its_place(name, dataset, tmp_path):
    found = preset(name, dataset)
    assert found.keys() >= OF_THE_RUN
    assert found["head"] in get_args(Head)
    assert "{}" in found["prompt"]
    given = for_trainer(name, dataset)
    assert given.keys() <= {f.name for f in fields(SAGEConfig) if f.init}
    config = SAGEConfig(str(tmp_path), report_to=[], **given)
    # YAML reads 1e-6 as text: what the trainer gets are the numbers.
    assert {key: getattr(config, key) for key in given} == given
    assert all(not isinstance(value, str) for key, value in given.items() if key not in ("optim", "lr_scheduler_type"))


def test_a_preset_is_the_callers_own():
    preset("paper", "PACS")["steps"] = 1
    assert preset("paper", "PACS")["steps"] == 5000


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="'paper', 'domainbed'"):
        preset("papers", "PACS")


@pytest.mark.parametrize("name", PRESETS)
def test_its_optimizer_is_adam(name, tmp_path):
    """transformers has no "adam": its AdamW without weight decay makes the same step, to the bit."""
    arguments = SAGEConfig(str(tmp_path), report_to=[], use_cpu=True, **for_trainer(name))
    ours, adams = nn.Linear(3, 2), nn.Linear(3, 2)
    adams.load_state_dict(ours.state_dict())
    optimizer = Trainer(ours, arguments).create_optimizer()
    adam = torch.optim.Adam(adams.parameters(), lr=arguments.learning_rate)
    for step in range(3):
        for model, stepper in ((ours, optimizer), (adams, adam)):
            model(torch.full((1, 3), float(step))).square().sum().backward()
            stepper.step()
            stepper.zero_grad()
    torch.testing.assert_close(ours.weight, adams.weight, rtol=0, atol=0)
    assert not torch.equal(ours.weight, ours.weight.new_zeros(2, 3))
