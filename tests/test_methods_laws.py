"""Every method by name through SAGETrainer: accumulation (law 2), ρ = 0 (law 1), resuming in the middle (law 4)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from methods_by_name import OPTIONS, options
from torch import Tensor, nn
from training import (
    CLASSES,
    Rows,
    build,
    entries,
    hub_dataset,
    image_rows,
    language_model,
    max_difference,
    relative_differences,
    text_rows,
    train,
    vit,
    weights,
    without,
)

from hf_sage import SAGETrainer
from hf_sage.ascents import L2Ascent
from hf_sage.hooks import Fish
from hf_sage.methods import METHODS, Method
from hf_sage.trainer.auxiliary import AuxiliaryBatches
from hf_sage.trainer.logs import StepLog

ROUND_OFF = 1e-4
"""Of fp32 sums taken in another order, relative to the way of the weights; GAM's differences and power iterations
enlarge it."""

REMEMBERING = [name for name in METHODS if "memory" in METHODS[name]().needs]
OF_FEATURES = [name for name in METHODS if "features" in METHODS[name]().needs]
WITH_RADIUS = [name for name in METHODS if METHODS[name]().ascent is not None]


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_are_the_batch(name):
    whole = train(vit(), image_rows(), **options(name))
    pieces = train(vit(), image_rows(), per_device_train_batch_size=4, gradient_accumulation_steps=3, **options(name))
    assert max(relative_differences(pieces.model, whole.model, vit())) < ROUND_OFF


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    run = options(name) | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}
    whole = train(vit(dropout=0.1), image_rows(), **run)
    resumed = train(vit(dropout=0.1), image_rows(), resume=str(tmp_path / "checkpoint-3"), **run)
    assert_same_bits(weights(resumed.model), weights(whole.model), name)


@pytest.mark.parametrize("name", REMEMBERING)
def test_the_memory_is_what_was_resumed(name, tmp_path):
    """Without it the training goes elsewhere: the test above can fail."""
    run = options(name) | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}
    whole = train(vit(), image_rows(), **run)
    Path(tmp_path, "checkpoint-3", "method.pt").unlink()
    resumed = train(vit(), image_rows(), resume=str(tmp_path / "checkpoint-3"), **run)
    assert max_difference(resumed.model, whole.model) > 0


@pytest.mark.parametrize("name", WITH_RADIUS)
def test_without_a_radius_nothing_is_perturbed(name):
    """Noise and X-SAM's α have switches of their own."""
    off = {"gamma": 0.0} if name in ("sage", "sage_no_polar", "sage_no_scale") else {}
    off |= {"alpha": 0.0} if name in ("x_sam", "look_sam") else {}
    found = train(vit(), image_rows(), **options(name, rho=0.0, **off))
    assert found.sage_method.is_plain
    assert_same_bits(weights(found.model), weights(train(vit(), image_rows(), method="erm").model), name)
    assert "perturbed_loss" not in entries(found)[0]


def test_x_sam_without_a_radius_still_corrects():
    found = train(vit(), image_rows(), **options("x_sam", rho=0.0))
    assert max_difference(found.model, train(vit(), image_rows(), method="erm").model) > 1e-6


def test_cosines_of_align_sam_are_logged():
    log = entries(train(vit(), image_rows(), **options("align_sam")))
    assert [{name for name in entry if name.startswith("cosine")} for entry in log] == [
        {"cosine_before", "cosine_after", "cosine_change"},
        {"cosine_before"},
        {"cosine_before", "cosine_after", "cosine_change"},
    ]
    for entry in log:
        assert -1 <= entry["cosine_before"] <= 1
    change = (log[0]["cosine_after"] - log[0]["cosine_before"]) / log[0]["cosine_after"]
    assert log[0]["cosine_change"] == pytest.approx(change, rel=1e-4)  # fp32


@pytest.mark.parametrize(("name", "has_one"), [("vrex", True), ("gga", True), ("irm", False), ("fish", False)])
def test_an_agreement_is_logged_where_one_was_measured(name, has_one):
    log = entries(train(vit(), image_rows(), **options(name)))
    assert ["agreement" in entry for entry in log] == [has_one] * 3
    assert all("loss/art" in entry for entry in log)


def test_the_search_of_gga_is_logged():
    log = entries(train(vit(), image_rows(), **options("gga")))
    assert ["proposals_accepted" in entry for entry in log] == [False, True, True]
    assert all(0 <= entry["proposals_accepted"] <= 3 and -1 <= entry["smallest_cosine"] <= 1 for entry in log[1:])


def test_an_update_of_fish_is_logged_once(monkeypatch):
    added: list[Any] = []
    log = StepLog.add
    monkeypatch.setattr(StepLog, "add", lambda *given: added.append(given) or log(*given))
    train(vit(), image_rows(), **options("fish", meta_rate=0.5))
    assert len(added) == 3


def test_the_largest_eigenvalue_is_logged():
    log = entries(train(vit(), image_rows(), **options("x_sam")))
    assert ["hessian_eigenvalue" in entry for entry in log] == [True, False, True]


@pytest.mark.parametrize("name", ["x_sam", "eigen_sam"])
def test_attention_without_a_second_derivative_is_refused_before_training(name):
    model = vit()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="eager"):
        build(model, image_rows(), **options(name)).train()


def test_an_auxiliary_batch_larger_than_the_data_is_refused_before_training():
    with pytest.raises(ValueError, match="auxiliary"):
        train(vit(), image_rows(4), per_device_train_batch_size=4, gradient_accumulation_steps=8, method="align_sam")


@pytest.mark.parametrize("scope", ["global", "local"])
def test_auxiliary_batches_are_drawn_once_an_update_that_perturbs(scope, monkeypatch):
    """Drawing one takes all ranks together, so how often must not depend on how many micro-batches a rank has."""
    drawn: list[int] = []
    inputs = AuxiliaryBatches.inputs
    monkeypatch.setattr(AuxiliaryBatches, "inputs", lambda *given: drawn.append(given[1]) or inputs(*given))
    sizes = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    train(vit(), image_rows(), **options("align_sam"), **sizes, perturbation_scope=scope, ascent_interval=2)
    assert drawn == [0, 2]


def test_rules_beside_a_hook_that_is_the_whole_update_are_refused():
    with pytest.raises(ValueError, match="never act"):
        Method("own", L2Ascent(0.05), hook=Fish())


def test_disam_without_domains_is_refused_before_training():
    with pytest.raises(ValueError, match="domain_column"):
        build(vit(), image_rows(), method="disam", domain_column=None).train()


# ---- Labels, before training ----


def silent(model: nn.Module) -> nn.Module:
    """A network that must not be run."""

    def refuse(*_: Any) -> None:
        raise AssertionError("training has started")

    model.register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("name", OF_FEATURES)
def test_data_without_labels_is_refused_before_training(name):
    data = without("labels", image_rows())
    with pytest.raises(ValueError, match=r"no 'labels', only 'pixel_values'.*column .* 'labels'.*data_collator"):
        build(silent(vit()), Rows(data), **options(name)).train()


def test_labels_that_are_no_classes_are_refused_before_training():
    with pytest.raises(ValueError, match=r"'labels' of shape \(1, 10\) and type int64"):
        build(silent(language_model()), Rows(text_rows()), **options("irm")).train()
    values = [row | {"labels": float(row["labels"])} for row in image_rows()]
    with pytest.raises(ValueError, match=r"'labels' of shape \(1,\) and type float32"):
        build(silent(vit()), hub_dataset(values), **options("irm")).train()


class Labels(SAGETrainer):
    """Gives the rows labels on their way to the step."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        rows = torch.arange(len(inputs["pixel_values"]))
        return super().training_step(model, inputs | {"labels": rows % CLASSES}, *args, **kwargs)


def in_pairs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes one example of two rows, and nothing of one."""
    first, second = rows[::2], rows[1::2]
    images = [(a["pixel_values"] + b["pixel_values"]) / 2 for a, b in zip(first, second, strict=True)]
    images = [image for image in images for _ in range(2)]  # the domains are counted by rows
    return {"pixel_values": torch.stack(images), "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize(
    ("data", "more"),
    [
        (Rows(without("labels", image_rows())), {"trainer": Labels}),
        (Rows(image_rows()), {"data_collator": in_pairs, "remove_unused_columns": False}),
        (hub_dataset(image_rows()).to_iterable_dataset(), {}),
    ],
    ids=["own step", "own batches", "stream"],
)
def test_labels_that_only_training_can_tell_are_waited_for(data, more):
    assert train(vit(), data, **more, **options("coral")).state.global_step == 3


def test_a_stream_without_labels_is_an_error_in_the_first_step():
    stream = hub_dataset(without("labels", image_rows())).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"loss|labels"):
        train(vit(), stream, **options("coral"))


class Augmented(Rows):
    """Every row draws a random number whenever it is read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return row | {"pixel_values": row["pixel_values"] * torch.rand(())}


class NotLookedAt(SAGETrainer):
    """Makes batches of its own, as far as can be known beforehand."""

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()


def test_looking_for_labels_takes_no_random_numbers():
    found, other = (
        train(vit(), Augmented(image_rows()), trainer=t, **options("irm")) for t in (SAGETrainer, NotLookedAt)
    )
    assert_same_bits(weights(found.model), weights(other.model))


# ---- Rules that set in late ----


def warned(caplog: pytest.LogCaptureFixture, name: str, **more: Any) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="hf_sage"):
        train(vit(), image_rows(), method=name, **more)
    return [record.getMessage() for record in caplog.records if "sets in after" in record.getMessage()]


@pytest.mark.parametrize(
    ("name", "delay"), [("irm", "warmup"), ("vrex", "warmup"), ("fishr", "warmup"), ("gga", "begin")]
)
@pytest.mark.parametrize("updates", [3, 2])
def test_a_rule_that_would_set_in_after_the_training_is_warned_of_once(name, delay, updates, caplog):
    """It sets in with the third update, which is the last or one too many."""
    set_late = OPTIONS[name] | {delay: 2}
    found = warned(caplog, name, method_options=set_late, max_steps=updates)
    assert len(found) == (updates == 2)
    for message in found:
        assert f"method {name!r}" in message
        assert f"{delay}=2 updates, and this training has 2. Set {delay} to less than 2" in message


def test_defaults_that_are_meant_for_longer_trainings_are_warned_of(caplog):
    (message,) = warned(caplog, "fishr")
    assert "warmup=1500" in message


@pytest.mark.parametrize("name", METHODS)
def test_only_those_rules_set_in_late(name):
    late = {rule.delayed_by: rule.sets_in for rule in METHODS[name]().rules.values() if rule.sets_in}
    assert late == {
        "irm": {"warmup": 500},
        "vrex": {"warmup": 500},
        "fishr": {"warmup": 1500},
        "gga": {"begin": 100},
    }.get(name, {})
