"""bf16, fp16 with a GradScaler, passes in fp32, the guard's log and warning, and updates whose gradient is no number.

All of it runs on a CPU: torch has its autocast and its GradScaler there. Trainer has not, so `scaled` hands them over.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import AutocastKwargs
from assertions import assert_same_bits
from torch import Tensor, nn
from training import (
    DOMAINS,
    SAGE,
    Rows,
    build,
    clip,
    entries,
    flat,
    hub_dataset,
    image_rows,
    train,
    vit,
    weights,
    without,
)
from transformers import Trainer, TrainerCallback

from hf_sage import SAGETrainer
from hf_sage.ascents import Ascent
from hf_sage.methods import sage

SAM = {"method": "sam"}
SURVIVAL = {"perturbation_survival", "perturbation_fidelity"}
PLAIN = Rows(without("domain", image_rows()))
SMALL_RHO = SAGE | {"rho": 1e-6}
"""SAGE's own default, of which bf16 leaves nothing."""


def scaled(model: nn.Module, data: Any, scale: float = 2.0**16, *, autocast: bool = True, **options: Any) -> Any:
    """A trainer in fp16 with a GradScaler, as accelerate sets it up on a GPU; without autocast the scaling alone."""
    trainer = build(model, data, fp16=True, **options)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    return trainer


def trained(trainer: Any) -> Any:
    trainer.train()
    return trainer


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The warnings of hf_sage so far."""

    class Messages(list[str]):
        def __iter__(self) -> Iterator[str]:
            return (record.getMessage() for record in caplog.records if record.name.startswith("hf_sage"))

    with caplog.at_level(logging.WARNING, logger="hf_sage"):
        yield Messages()


# ---- Law 7: loss scaling changes nothing ----


@pytest.mark.parametrize("limit", [1.0, 0.0])
@pytest.mark.parametrize("options", [SAGE | {"gamma": 0.1}, SAM], ids=["sage", "sam"])
def test_loss_scaling_changes_nothing(options, limit):
    """Not a bit, the scale being a power of two: neither ε nor S nor the size of the noise, whether clipped or not."""
    options = options | {"max_grad_norm": limit, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    plain = train(vit(), Rows(image_rows()), max_steps=2, **options)
    for scale in (2.0**16, 2.0**-8):
        ours = trained(scaled(vit(), Rows(image_rows()), scale, autocast=False, max_steps=2, **options))
        assert ours.accelerator.scaler.get_scale() == scale
        assert_same_bits(weights(ours.model), weights(plain.model))
        assert entries(ours) == entries(plain)


# ---- Overflow ----


class Overflow(SAGETrainer):
    """The loss of the second update is infinite, in the pass that is asked for."""

    at_theta = True

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.start = flat(self.model)
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        bad = self.state.global_step == 1 and torch.equal(flat(self.model), self.start) == self.at_theta
        return loss * math.inf if bad else loss


class OverflowAhead(Overflow):
    at_theta = False


class StockOverflow(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.inf if self.state.global_step == 1 else loss


class Recorder(TrainerCallback):
    """The weights and the optimizer's state after each update."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.states: list[list[Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append([w.clone() for w in weights(kwargs["model"])])
        found = kwargs["optimizer"].state_dict()["state"].values()
        self.states.append([v.clone() for own in found for v in own.values() if isinstance(v, Tensor)])


ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-3}


@pytest.mark.parametrize("trainer", [Overflow, OverflowAhead])
def test_an_overflow_in_either_pass_is_left_to_the_scaler(trainer, warnings):
    """The weights keep their bits, the scale is halved, and the learning rate waits, as in stock."""
    options = ADAM | {"lr_scheduler_type": "linear"}
    recorder = Recorder()
    ours = trained(scaled(vit(), Rows(image_rows()), trainer=trainer, callbacks=[recorder], **options, **SAGE))
    stock = trained(scaled(vit(), PLAIN, trainer=StockOverflow, **options))
    assert_same_bits(recorder.weights[1], recorder.weights[0])
    assert_same_bits(recorder.states[1], recorder.states[0])
    assert any(not torch.equal(a, b) for a, b in zip(recorder.weights[2], recorder.weights[1], strict=True))
    assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale() == 2.0**15
    assert [e["learning_rate"] for e in entries(ours)] == [e["learning_rate"] for e in entries(stock)]
    before, broken, after = entries(ours)
    assert broken["skipped_steps"] == 1
    assert ("skipped_perturbations" in broken) == (trainer is Overflow)
    assert "perturbed_loss" not in broken
    assert all("skipped_steps" not in entry and "perturbed_loss" in entry for entry in (before, after))
    assert not any("left out" in message for message in warnings)  # a scaler does so as a matter of course


def test_a_scale_that_is_too_large_is_found_as_in_stock():
    """fp16 itself overflows in the backward pass, until the scale has come down."""
    options = {"max_steps": 8, "train_sampling_strategy": "sequential"}
    ours = trained(scaled(vit(), Rows(image_rows()), 2.0**20, domain_sampling="natural", **options, **SAGE))
    stock = trained(scaled(vit(), PLAIN, 2.0**20, trainer=Trainer, **options))
    skipped = sum(entry.get("skipped_steps", 0) for entry in entries(ours))
    assert 0 < skipped < 8
    assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale() == 2.0 ** (20 - skipped)
    assert flat(ours.model).isfinite().all()


# ---- bf16 and fp16: θ, ε and S ----


class Witness(Ascent):
    """SAGE's ascent, which keeps copies of what it is given and of what it returns."""

    def __init__(self) -> None:
        self.ascent = sage(SAGE["rho"]).ascent
        self.rho = SAGE["rho"]
        self.theta: list[Tensor] = []
        self.epsilon: list[Tensor] = []

    def __call__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Any = None) -> list[Tensor]:
        self.theta = [p.clone() for p in parameters]
        epsilon = self.ascent(parameters, gradients)
        self.epsilon = [e.clone() for e in epsilon]
        return epsilon


def one_step(model: nn.Module, **options: Any) -> tuple[Witness, Any]:
    """One update with a learning rate of zero, and what its ascent saw."""
    witness = Witness()
    method = replace(sage(gamma=0.0), ascent=witness)
    return witness, train(model, Rows(image_rows()), method=method, max_steps=1, learning_rate=0.0, **options)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
@pytest.mark.parametrize("model", [vit, clip])
def test_bf16(model, stored):
    witness, trainer = one_step(model().to(stored), bf16=True)
    _, exact = one_step(model().to(stored).float())  # the same numbers, in fp32
    assert_same_bits(trainer.model.parameters(), model().to(stored).parameters(), "parameter")
    assert {e.dtype for e in witness.epsilon} == {torch.float32}
    (entry,), (expected,) = entries(trainer), entries(exact)
    # Products of numbers with 8 bits have errors of 2^-9, of which a few add up in each gradient, and two in a cosine.
    assert entry["agreement"] == pytest.approx(expected["agreement"], abs=2**-6)
    for name in ("loss", "perturbed_loss", "grad_norm"):
        assert entry[name] == pytest.approx(expected[name], rel=2**-6), name
    # The polar factor gives each direction of the gradient the same length, also one that is nothing but these errors.
    assert entry["perturbation_norm"] == pytest.approx(expected["perturbation_norm"], rel=0.1)
    assert entry["perturbation_fidelity"] > 0.9  # at this radius


def test_fp16():
    trainer = trained(scaled(vit(), Rows(image_rows()), **SAGE))
    plain = train(vit(), Rows(image_rows()), **SAGE)
    for half, full in zip(entries(trainer), entries(plain), strict=True):
        # Errors of 2^-12 in a product, of which a few add up; grad_norm is of the unscaled gradient.
        assert half["agreement"] == pytest.approx(full["agreement"], abs=2**-9)
        for name in ("loss", "perturbed_loss", "grad_norm", "perturbation_norm"):
            assert half[name] == pytest.approx(full[name], rel=2**-8), name
        assert set(half) >= SURVIVAL
        assert not SURVIVAL & set(full)


# ---- Both passes in fp32 ----

HALF = {"bf16": lambda *args, **options: build(*args, bf16=True, **options), "fp16": scaled}


@pytest.mark.parametrize("precision", HALF)
def test_full_precision_passes_train_as_fp32_does(precision):
    ours = trained(HALF[precision](clip(), Rows(image_rows()), full_precision_passes=True, max_steps=2, **SAGE))
    plain = train(clip(), Rows(image_rows()), max_steps=2, **SAGE)
    assert_same_bits(weights(ours.model), weights(plain.model))
    assert entries(ours) == entries(plain)
    half = trained(HALF[precision](clip(), Rows(image_rows()), max_steps=2, **SAGE))
    assert (flat(half.model) - flat(plain.model)).abs().max() > 0


@pytest.mark.parametrize("precision", HALF)
def test_full_precision_passes_leave_evaluation_in_half(precision, tmp_path):
    """Also after checkpoints, which unwrap the model. All have the same weights: the learning rate is zero."""
    options = SAGE | {"learning_rate": 0.0, "gamma": 0.0, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    options |= {"eval_dataset": Rows(image_rows(6, seed=2)), "save_strategy": "steps", "save_steps": 1}

    def losses(trainer: Any) -> list[float]:
        return [entry["eval_loss"] for entry in entries(trained(trainer), "eval_loss")]

    half, ours = (
        losses(HALF[precision](vit(), Rows(image_rows()), output_dir=str(tmp_path / str(on)), **options, **on))
        for on in ({}, {"full_precision_passes": True})
    )
    full = losses(build(vit(), Rows(image_rows()), output_dir=str(tmp_path / "full"), **options))
    assert len(full) == 2
    assert ours == half
    assert ours != full


def test_full_precision_passes_refuse_weights_in_half():
    with pytest.raises(ValueError, match=r"(?s)bfloat16.*Load the model in fp32.*full_precision_passes"):
        train(vit().bfloat16(), Rows(image_rows()), bf16=True, full_precision_passes=True, **SAGE)


# ---- The guard ----


def test_a_radius_that_bf16_rounds_away_is_warned_of_once_a_training(warnings):
    trainer = build(vit(), Rows(image_rows()), bf16=True, **SMALL_RHO)
    for training in (1, 2):
        trainer.train()
        assert len(list(warnings)) == training
    for entry in entries(trainer):
        assert entry["perturbation_survival"] < 0.1
        assert entry["perturbation_fidelity"] < 0.5
    message = next(iter(warnings))
    assert "bfloat16" in message
    assert "full_precision_passes=True" in message
    # The radius that it names is one that needs no warning.
    (factor,) = (int(word.removeprefix("(")) for word in message.split() if word.startswith("(10"))
    train(vit(), Rows(image_rows()), bf16=True, **SAGE | {"rho": 1e-6 * factor})
    assert len(list(warnings)) == 2


@pytest.mark.parametrize("options", [{}, {"bf16": True, "full_precision_passes": True}])
def test_in_fp32_the_default_radius_is_not_warned_of(options, warnings):
    trainer = train(vit(), Rows(image_rows()), **SMALL_RHO, **options)
    assert not list(warnings)
    assert not SURVIVAL & set(entries(trainer)[0])


def test_fp32_has_an_end_too(warnings):
    train(vit(), Rows(image_rows()), **SAGE | {"rho": 1e-10})
    (message,) = warnings
    assert "float32" in message
    assert "full_precision_passes" not in message


def test_weights_in_half_have_a_cure_of_their_own(warnings):
    train(vit().bfloat16(), Rows(image_rows()), bf16=True, **SMALL_RHO)
    (message,) = warnings
    assert "dtype=torch.float32" in message
    assert "full_precision_passes" not in message


@pytest.mark.parametrize("every", [1, 2])
def test_survival_is_measured_once_a_log_entry(every, monkeypatch):
    measured = []
    inspect = SAGETrainer._inspect
    monkeypatch.setattr(SAGETrainer, "_inspect", lambda self, *args: (measured.append(1), inspect(self, *args)))
    options = SAM | {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    for scope in ("global", "local"):
        trainer = train(
            vit(), Rows(image_rows()), bf16=True, perturbation_scope=scope, logging_steps=every, max_steps=4, **options
        )
        assert len(measured) == len(entries(trainer)) == 4 // every
        assert all(set(entry) >= SURVIVAL for entry in entries(trainer))
        measured.clear()


def test_looking_changes_nothing():
    class Blind(SAGETrainer):
        _inspect = None

    looked, blind = (
        train(vit(dropout=0.2), Rows(image_rows()), bf16=True, trainer=kind, **SMALL_RHO)
        for kind in (SAGETrainer, Blind)
    )
    assert_same_bits(weights(looked.model), weights(blind.model))


# ---- Gradients that are no numbers, without a scaler ----


class BrokenGroup(SAGETrainer):
    """The loss of the group ``art``, told by its images, is NaN in the second and third update; or its gradient."""

    gradient_alone = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        images = inputs["pixel_values"]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 0 or not (images[:, None] == ART).flatten(2).all(-1).any():
            return loss
        return loss + (0 * loss).sqrt() if self.gradient_alone else loss * math.nan


class BrokenGradient(BrokenGroup):
    gradient_alone = True


class BrokenOnRankOne(Overflow):
    """The loss of the second update is infinite in one pass on the second of two ranks; the first must go along."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        kind = super() if self.args.process_index == 1 else super(Overflow, self)
        return kind.compute_loss(*args, **kwargs)


class BrokenAheadOnRankOne(BrokenOnRankOne):
    at_theta = False


ART = torch.stack([row["pixel_values"] for row in image_rows() if row["domain"] == "art"])


@pytest.mark.parametrize("options", [SAGE, SAGE | {"perturbation_scope": "local"}, SAM], ids=["sage", "local", "sam"])
@pytest.mark.parametrize("trainer", [BrokenGroup, BrokenGradient])
def test_an_update_whose_gradient_is_no_number_is_left_out(trainer, options, warnings):
    """Nothing of it reaches the weights or the optimizer, its weight decay included; it is counted and told once."""
    recorder = Recorder()
    ours = train(vit(), Rows(image_rows()), trainer=trainer, callbacks=[recorder], max_steps=3, **options, **ADAM)
    for kept in (recorder.weights, recorder.states):
        assert_same_bits(kept[1], kept[0])
        assert_same_bits(kept[2], kept[0])
    assert ours.state.global_step == 3
    first, *others = entries(ours)
    assert "skipped_steps" not in first
    for entry in others:
        assert (entry["skipped_steps"], entry["skipped_perturbations"]) == (1, 1)
        assert math.isnan(entry["grad_norm"])  # as stock logs it
    (message,) = warnings
    assert "Update 2 " in message
    assert ("'art'" in message) == (options is not SAM)  # which trains as one group
    assert not any(other in message for other in ("'photo'", "'sketch'"))


def test_updates_after_one_that_was_left_out_are_those_of_the_others():
    """A gradient that was not finite changes the moments of Adam no more than the weights: only time has passed."""

    class Once(BrokenGroup):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) if self.state.global_step == 1 else self.sound(*args, **kwargs)

        def sound(self, *args: Any, **kwargs: Any) -> Any:
            return SAGETrainer.compute_loss(self, *args, **kwargs)

    options = ADAM | {"method": "sam", "train_sampling_strategy": "sequential", "domain_sampling": "natural"}
    rows = image_rows(36)
    broken = train(vit(), Rows(rows), trainer=Once, **options)
    whole = train(vit(), Rows(rows[:12] + rows[24:]), max_steps=2, **options)
    assert "skipped_steps" in entries(broken)[1]
    assert_same_bits(weights(broken.model), weights(whole.model))


@pytest.mark.parametrize("options", [SAGE, SAM], ids=["sage", "sam"])
def test_a_perturbed_gradient_that_is_no_number_is_left_out_too(options, warnings):
    recorder = Recorder()
    ours = train(vit(), Rows(image_rows()), trainer=OverflowAhead, callbacks=[recorder], **options, **ADAM)
    assert_same_bits(recorder.weights[1], recorder.weights[0])
    assert_same_bits(recorder.states[1], recorder.states[0])
    before, broken, after = entries(ours)
    assert broken["skipped_steps"] == 1
    assert "skipped_perturbations" not in broken
    assert all("skipped_steps" not in entry for entry in (before, after))
    (message,) = warnings
    assert "lower rho" in message


def test_the_group_is_named_as_the_data_name_it(warnings):
    """A domain column of class labels holds numbers."""
    data = hub_dataset(image_rows()).cast_column("domain", datasets.ClassLabel(names=sorted(set(DOMAINS))))
    train(vit(), data.with_format("torch"), trainer=BrokenGroup, max_steps=2, **SAGE)
    (message,) = warnings
    assert "'art'" in message


def test_finding_the_group_leaves_no_trace():
    """Dropout masks of the updates after it are those that would have been drawn."""

    class Named(BrokenGroup):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return (super() if self.state.global_step < 2 else super(BrokenGroup, self)).compute_loss(*args, **kwargs)

    class Unnamed(Named):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self._step_log.skipped.wants_groups = False
            return super().training_step(*args, **kwargs)

    named, unnamed = (train(vit(dropout=0.5), Rows(image_rows()), trainer=kind, **SAGE) for kind in (Named, Unnamed))
    assert_same_bits(weights(named.model), weights(unnamed.model))


@pytest.mark.slow
def test_ranks_leave_an_update_out_together():
    """Two processes run `leave_out_on_two_ranks`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("together") == 4


def leave_out_on_two_ranks() -> None:
    for kind in (BrokenOnRankOne, BrokenAheadOnRankOne):
        for scope in ("global", "local"):
            recorder = Recorder()
            options = {"per_device_train_batch_size": 6, "perturbation_scope": scope} | SAGE | ADAM
            trainer = train(vit(), Rows(image_rows()), trainer=kind, callbacks=[recorder], **options)
            assert_same_bits(recorder.weights[1], recorder.weights[0])
            assert_same_bits(recorder.states[1], recorder.states[0])
            gathered = [torch.zeros_like(flat(trainer.model)) for _ in range(2)]
            dist.all_gather(gathered, flat(trainer.model))
            assert torch.equal(*gathered)
            if trainer.args.process_index == 0:
                _, broken, after = entries(trainer)
                assert broken["skipped_steps"] == 1
                assert ("skipped_perturbations" in broken) == kind.at_theta
                assert "perturbed_loss" in after
                sys.stdout.write("together\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    leave_out_on_two_ranks()
