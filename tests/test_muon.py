"""Muon and AdamW as one optimizer: each parameter takes the step of torch's own, under all that Trainer does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from benchmark_worker import job, paint
from test_features_model import NOTHING
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from training import (
    Rows,
    build,
    clip,
    entries,
    image_rows,
    language_model,
    relative_differences,
    resnet,
    vit,
    weights,
    without,
)
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_sage import SAGETrainer
from hf_sage.benchmark.entrants import ENTRANTS, has_muon, is_averaged, is_entrant, method_of
from hf_sage.benchmark.flags import CONFIGS
from hf_sage.benchmark.hyperparameters import takes
from hf_sage.benchmark.parsing import parse_config, read_config
from hf_sage.benchmark.plan import jobs_of
from hf_sage.benchmark.runs import run
from hf_sage.models.tiny import tiny_clip, tiny_convnext
from hf_sage.trainer.muon import MuonAndAdamW, MuonFactory, muon

RATE = 1e-3
DECAY = 0.1
OPTIONS: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": RATE, "weight_decay": DECAY, "max_steps": 6}
METHODS: list[dict[str, Any]] = [{"method": "erm"}, {"method": "sage", "rho": 0.02, "gamma": 1e-3}]


def trainer_of(
    model: nn.Module, *, trainer: type[Trainer] = SAGETrainer, rows: Any = None, callbacks: Any = None, **options: Any
) -> Any:
    data = Rows(image_rows() if rows is None else rows)
    args = build(model, data, trainer=trainer, **OPTIONS | options).args
    return trainer(model, args, train_dataset=data, callbacks=callbacks, optimizer_cls_and_kwargs=muon(args))


def optimizer_of(model: nn.Module, **options: Any) -> MuonAndAdamW:
    optimizer: MuonAndAdamW = trainer_of(model, **options).create_optimizer()
    return optimizer


def fed(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    """Steps on gradients that are functions of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()


# ---- Which parameter goes where ----


def frozen_below() -> nn.Module:
    model = vit()
    for name, p in model.named_parameters():
        p.requires_grad_("classifier" in name or "mlp" in name)
    return model


def tied() -> nn.Module:
    model = language_model()
    assert isinstance(model, PreTrainedModel)
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "clip": clip,
    "tiny-clip": lambda: tiny_clip(["a", "b"])[0],
    "tiny-convnext": lambda: tiny_convnext(["a", "b"])[0],
    "language model": language_model,
    "tied": tied,
    "partly frozen": frozen_below,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_and_linear_layers_below_the_head_are_muons(name):
    model = MODELS[name]()
    names = {id(p): n for n, p in model.named_parameters()}
    first, *others = ([names[id(p)] for p in group["params"]] for group in optimizer_of(model).param_groups)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted([*first, *chain(*others)]) == sorted(trainable)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(first) == {n for n in linear & set(trainable) if not n.startswith(("classifier", "lm_head"))}


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_is_trainers(name):
    model = MODELS[name]()
    stock = build(model, Rows(image_rows()), **OPTIONS).create_optimizer()
    assert decays(optimizer_of(model)) == decays(stock)


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


class Named(nn.Module):
    """Its classifier has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.verdict = nn.Linear(768, 4), nn.Linear(4, 3)


def test_a_classifier_of_another_name_is_named_by_the_arguments(caplog):
    model = Named()
    with caplog.at_level(logging.WARNING, logger="hf_sage"):
        assert len(optimizer_of(model, classifier="verdict").param_groups[0]["params"]) == 1
        assert not caplog.records
        assert len(optimizer_of(model).param_groups[0]["params"]) == 2
        assert "SAGEConfig(classifier=...)" in caplog.text


ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no matrices": (resnet, {}, r"ResNet.* no trainable hidden weight matrix .* leave optimizer_cls_and_kwargs out"),
    "another optimizer": (vit, {"optim": "sgd"}, r"'sgd' is another optimizer: set optim='adamw_torch_fused'"),
    "another classifier": (vit, {"classifier": "clasifier"}, r"no module 'clasifier'.* its modules are: vit, classif"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_hand_over_the_cure(case):
    model, options, said = ERRORS[case]
    with pytest.raises(ValueError, match=said):
        optimizer_of(model(), **options)


# ---- The step ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_each_part_takes_the_step_of_torchs_own(optim):
    ours, theirs = vit(), vit()
    fed(optimizer_of(ours, optim=optim, adam_beta2=0.99), ours, range(3))
    matrices = [m.weight for n, m in theirs.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    rest = [(n, p) for n, p in theirs.named_parameters() if all(p is not q for q in matrices)]
    by_decay = [[p for n, p in rest if ("bias" in n or "norm" in n) == bare] for bare in (False, True)]
    pair = (
        Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        AdamW(
            [{"params": by_decay[0], "weight_decay": DECAY}, {"params": by_decay[1], "weight_decay": 0.0}],
            lr=RATE, betas=(0.9, 0.99), eps=1e-8, fused=optim == "adamw_torch_fused",
        ),
    )  # fmt: skip
    for step in range(3):
        for optimizer in pair:
            fed(optimizer, theirs, range(step, step + 1))
    assert_same_bits(weights(ours), weights(theirs))


@pytest.mark.parametrize("shape", [(16, 16), (16, 128), (128, 16)])
def test_one_learning_rate_fits_both(shape):
    """Whatever its shape, entries of a matrix move by 0.2 of the learning rate; AdamW's by up to the whole."""
    model = Named()
    model.body = nn.Linear(*shape)
    before = model.body.weight.detach().clone()
    fed(optimizer_of(model, weight_decay=0.0, classifier="verdict"), model, range(1))
    size = (model.body.weight - before).square().mean().sqrt().item()
    # Muon's five steps leave singular values between 0.68 and 1.14 of the polar factor's.
    assert 0.68 * 0.2 * RATE <= size <= 1.14 * 0.2 * RATE


def test_momentum_is_muons():
    model = vit()
    optimizer = MuonFactory()(model, **muon(build(model, Rows(image_rows()), **OPTIONS).args, momentum=0.5)[1])
    assert [group.get("momentum") for group in optimizer.param_groups] == [0.5, None, None]


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model = Named()
    optimizer = optimizer_of(model, classifier="verdict")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.verdict(model.body(torch.ones(2, 768))).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step():
    ours, scaled = vit(), vit()
    fed(optimizer_of(ours), ours, range(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = optimizer_of(scaled)
    for factor in (2.0**10, torch.inf):  # the second overflows
        scaler.scale(torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        for p in scaled.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * factor
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(weights(scaled), weights(ours))


# ---- Under Trainer ----


def test_its_state_goes_through_a_file_to_the_bit(tmp_path):
    whole, cut = vit(), vit()
    fed(optimizer_of(whole), whole, range(4))
    before = optimizer_of(cut)
    fed(before, cut, range(2))
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    after = optimizer_of(cut, learning_rate=1.0)  # the state's learning rate counts
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    fed(after, cut, range(2, 4))
    assert_same_bits(weights(cut), weights(whole))


@pytest.mark.parametrize("options", METHODS, ids=["erm", "sage"])
def test_resumed_is_as_if_never_stopped(options, tmp_path):
    options = options | {"lr_scheduler_type": "cosine", "output_dir": str(tmp_path)}
    whole = trainer_of(vit(dropout=0.2), save_strategy="steps", save_steps=3, **options)
    whole.train()
    resumed = trainer_of(vit(dropout=0.2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("options", METHODS, ids=["erm", "sage"])
def test_one_batch_and_its_halves_differ_by_the_rounding_of_bf16(options):
    """Where a rounding turns, by 2⁻⁸ of an entry: thousandths of the way were measured."""

    def trained(rows, accumulated):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated, "max_steps": 3}
        trainer = trainer_of(vit(), **options | cut)
        trainer.train()
        return trainer.model

    largest, mean = relative_differences(trained(12, 1), trained(6, 2), vit())
    assert largest < 5e-2
    assert mean < 2e-2


def test_muon_under_sage_of_nothing_is_stock():
    ours = trainer_of(vit(), **NOTHING)
    stock = trainer_of(vit(), trainer=Trainer, rows=without("domain", image_rows()))
    for trainer in (ours, stock):
        trainer.train()
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


@pytest.mark.parametrize("options", METHODS, ids=["erm", "sage"])
def test_the_schedule_reaches_every_group(options):
    rates: list[list[float]] = []

    class Noted(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    model = vit()
    trainer = trainer_of(model, lr_scheduler_type="linear", callbacks=[Noted()], **options)
    trainer.train()
    assert rates == [[RATE * (6 - step) / 6] * 3 for step in range(6)]


def test_the_learning_rate_is_that_of_the_arguments_when_training_begins():
    """A hyperparameter search changes it after the trainer was made."""
    trainer = trainer_of(vit())
    trainer.args.learning_rate = 0.5
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.5}


# ---- In a benchmark ----


NAMES = {
    "erm": ("erm", False, False),
    "swad": ("erm", False, True),
    "muon": ("erm", True, False),
    "sam+swad": ("sam", False, True),
    "sage+muon": ("sage", True, False),
    "sage+muon+swad": ("sage", True, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_method_optimizer_and_average(name):
    assert (method_of(name), has_muon(name), is_averaged(name)) == NAMES[name]
    assert is_entrant(name)


@pytest.mark.parametrize("name", ["sam+swad+muon", "sam+muon+muon", "muon+swad", "sam+", "+muon", "sam+moun", "adam"])
def test_other_names_are_refused_with_those_there_are(name):
    assert not is_entrant(name)
    with pytest.raises(ValueError, match=rf"Unknown method '{name.replace('+', '.')}'.*'muon'.*'\+muon\+swad' behind"):
        parse_config({"datasets": ["style_digits"], "methods": [name]})


def test_muon_is_tuned_as_erm_is_with_as_many_seeds_as_sage():
    assert "muon" in ENTRANTS
    assert takes("muon") == takes("erm")
    config = parse_config(read_config(CONFIGS / "style_digits.yaml"))
    assert config.seeds_of("muon") == config.seeds_of("sage")
    drawn = {name: [own.hyperparameters for own in jobs_of(config) if own.method == name] for name in ("erm", "muon")}
    assert drawn["muon"] == drawn["erm"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(("name", "agrees"), [("muon", False), ("sage+muon", True)])
def test_a_run_trains_with_the_method_and_with_muon(name, agrees, pictures, tmp_path):
    rates = {"learning_rate": 1e-2} | ({"rho": 1e-2, "gamma": 1e-3} if agrees else {})
    result = run(job(pictures, method=name, hyperparameters=rates, steps=4), tmp_path, checkpoints=True)
    assert any("agreement" in entry for entry in result.log) == agrees
    held = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    first, *others = held["param_groups"]
    assert first["adjust_lr_fn"] == "match_rms_adamw"
    assert ["betas" in group for group in others] == [True, True]
    assert all(set(held["state"][i]) == {"momentum_buffer"} for i in first["params"])
