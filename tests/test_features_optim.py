"""Optimizers and schedulers: none of them is wrapped, so each is what it is in stock Trainer and in a loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from test_features_model import NOTHING, Plain, assert_is_stock
from torch import Tensor, nn
from training import (
    SAGE,
    TRAINING,
    Rows,
    build,
    clip,
    entries,
    flat,
    image_rows,
    relative_differences,
    train,
    vit,
    weights,
    without,
)
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from hf_sage import SAGEConfig, SAGEMixin, SAGETrainer
from hf_sage.engine import Part, Step, descend, step_seed, two_pass_step
from hf_sage.methods import sage

RATE = 0.01
DECAY = 0.1
ORDER = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}

ROUND_OFF = 1e-5
"""Of fp32 sums taken in another order, relative to the way of the weights."""


# ---- By name ----


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Trainer's parameter groups: no weight decay on biases."""
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if "bias" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0.0},
    ]


BY_NAME: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw_torch": lambda model: torch.optim.AdamW(decayed(model), RATE),
    "adamw_torch_fused": lambda model: torch.optim.AdamW(decayed(model), RATE, fused=True),
    "sgd": lambda model: torch.optim.SGD(decayed(model), RATE),
    "adafactor": lambda model: Adafactor(decayed(model), RATE, scale_parameter=False, relative_step=False),
    "adagrad": lambda model: torch.optim.Adagrad(decayed(model), RATE),
    "rmsprop": lambda model: torch.optim.RMSprop(decayed(model), RATE),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_optimizers_are_stock(name):
    assert_is_stock(lambda: vit(dropout=0.2), image_rows(), optim=name, weight_decay=DECAY, learning_rate=1e-3)


def by_hand(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    steps: int = 3,
    model: Callable[[], nn.Module] = lambda: Plain("dict"),
) -> nn.Module:
    """SAGE without any trainer: the engine's two passes, torch's clipping, torch's optimizer."""
    model_, rows = model(), image_rows()
    method, optimizer = sage(SAGE["rho"], SAGE["gamma"]), make(model_)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(steps):
        batch = [rows[(12 * step + i) % 24] for i in range(12)]
        parts = []
        for name in sorted({row["domain"] for row in batch}):
            own = [row for row in batch if row["domain"] == name]
            x, y = torch.stack([r["pixel_values"] for r in own]), torch.tensor([r["labels"] for r in own])
            share = len(own) / len(batch)
            parts.append(Part(name, share, lambda x=x, y=y, share=share: share * model_(x, y)["loss"]))
        report = two_pass_step(model_, parts, method)
        nn.utils.clip_grad_norm_(model_.parameters(), 1.0)
        descend(model_, method, report, Step(seed=step_seed(42, step)))
        optimizer.step()
        if scheduler:
            scheduler.step()
        model_.zero_grad()
    return model_


@pytest.mark.parametrize("name", BY_NAME)
def test_optimizers_step_on_the_perturbed_gradient_with_its_noise(name):
    options = {"optim": name, "weight_decay": DECAY, "learning_rate": RATE} | ORDER | SAGE
    ours = train(Plain("dict"), Rows(image_rows()), **options)
    expected = by_hand(BY_NAME[name])
    assert max(relative_differences(ours.model, expected, start=Plain("dict"))) <= ROUND_OFF


def test_weight_decay_belongs_to_the_base_step():
    """ε and S do not know of it, and the step is larger by lr · decay · θ, for what Trainer decays."""
    options = {"max_steps": 1, "learning_rate": 1.0} | SAGE
    with_it, without_it = (train(vit(), Rows(image_rows()), weight_decay=d, **options) for d in (DECAY, 0.0))
    (a,), (b,) = entries(with_it), entries(without_it)
    assert a == b
    decayed_ = with_it.get_decay_parameter_names(with_it.model)
    before = dict(vit().named_parameters())
    for (name, p), q in zip(with_it.model.named_parameters(), without_it.model.parameters(), strict=True):
        due = DECAY * before[name] if name in decayed_ else torch.zeros_like(p)
        # Both are θ minus a step, rounded to fp32 at the size of either.
        assert torch.allclose(q - p, due, rtol=0, atol=4e-7 * max(1.0, q.abs().max().item())), name


# ---- The user's own ----


def fit(model: nn.Module, *, trainer: type[Trainer] = SAGETrainer, rows: Any = None, **options: Any) -> Any:
    """Trained with an optimizer of the user's."""
    given = {name: options.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in options}
    config = SAGEConfig if issubclass(trainer, SAGEMixin) else TrainingArguments
    output = build(vit(), Rows(image_rows())).args.output_dir
    rows = image_rows() if rows is None else rows
    own = trainer(model, config(**TRAINING | {"output_dir": output} | options), train_dataset=Rows(rows), **given)
    own.train()
    return own


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def test_own_optimizer_and_scheduler():
    model = Plain("dict")
    optimizer = momentum(model)
    scheduler = halving(optimizer)
    trainer = fit(model, optimizers=(optimizer, scheduler), **ORDER, **SAGE)
    assert trainer.optimizer.optimizer is optimizer
    assert trainer.lr_scheduler is scheduler
    assert [entry["learning_rate"] for entry in entries(trainer)] == [RATE, RATE / 2, RATE / 4]
    expected = by_hand(momentum, halving)
    assert max(relative_differences(model, expected, start=Plain("dict"))) <= ROUND_OFF


def test_own_optimizer_and_scheduler_are_stock():
    def trained(trainer: type[Trainer], rows: Any, **options: Any) -> Any:
        model = vit()
        optimizer = momentum(model)
        return fit(model, trainer=trainer, rows=rows, optimizers=(optimizer, halving(optimizer)), **options)

    ours, stock = trained(SAGETrainer, image_rows(), **NOTHING), trained(Trainer, without("domain", image_rows()))
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


class Matrices(nn.Module):
    """Matrices only, for Muon; mixed models are the user's to split."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(768, 16, bias=False), nn.Tanh(), nn.Linear(16, 5, bias=False))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_muon_by_class_and_arguments():
    options = {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": RATE}), "weight_decay": 0.1}
    ours = fit(Matrices(), **options, **ORDER, **SAGE)
    expected = by_hand(lambda m: torch.optim.Muon(m.parameters(), lr=RATE, weight_decay=0.1), model=Matrices)
    # Muon orthogonalises in bf16, where the last bit of fp32 can turn a rounding: 2⁻⁸ of an entry now and then.
    assert max(relative_differences(ours.model, expected, start=Matrices())) <= 2**-8


def test_muon_is_stock():
    options = {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": RATE})}
    ours = fit(Matrices(), **options, **NOTHING)
    stock = fit(Matrices(), trainer=Trainer, rows=without("domain", image_rows()), **options)
    assert_same_bits(weights(ours.model), weights(stock.model))


class LossWithWeights(SAGETrainer):
    """A loss with parameters of its own, as sentence-transformers' SoftmaxLoss: in the optimizer, not in the model."""

    head: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        features = model(pixel_values=inputs["pixel_values"])
        loss = nn.functional.cross_entropy(self.head(features), inputs["labels"])
        return (loss, features) if return_outputs else loss


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(768, 8)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layer(pixel_values.flatten(1)).tanh()


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}], ids=["sage", "sam"])
def test_parameters_of_the_loss_get_one_gradient(options):
    """A radius that moves nothing visibly leaves them plain gradient descent: one gradient, not one a pass."""

    def moved(**options: Any) -> Tensor:
        model = Features()
        trainer = build(model, Rows(image_rows()), trainer=LossWithWeights, max_steps=1, max_grad_norm=0.0, **options)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            trainer.head = nn.Linear(8, 5)
        start = flat(trainer.head)
        trainer.optimizer = torch.optim.SGD([*model.parameters(), *trainer.head.parameters()], RATE)
        trainer.train()
        return flat(trainer.head) - start

    order = {"train_sampling_strategy": "sequential", "domain_sampling": "natural"}
    tiny = options | {"rho": 1e-7} | ({"gamma": 0.0} if "gamma" in options else {})
    plain = moved(method="erm", **order)
    assert (moved(**tiny, **order) - plain).norm() <= 1e-3 * plain.norm()


# ---- Schedulers ----

PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "mode": "min", "threshold": 0.5},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "max_steps": 4,
}


def test_reduce_on_plateau_is_stock():
    options = PLATEAU | {"eval_dataset": Rows(without("domain", image_rows(6, seed=2)))}
    ours = assert_is_stock(vit, image_rows(), **options)
    rates = [entry["learning_rate"] for entry in entries(ours)]
    assert rates[-1] < rates[0]  # a threshold of 50 % is a plateau soon


def test_reduce_on_plateau_of_the_worst_domain():
    """The metric that hf_sage adds drives the scheduler, as that of any logged number would."""

    def score(prediction: Any) -> dict[str, float]:
        return {"score": float(prediction.predictions[:, 0].mean())}

    options = PLATEAU | {"metric_for_best_model": "worst_score", "eval_dataset": Rows(image_rows(12, seed=2))}
    trainer = train(vit(), Rows(image_rows()), compute_metrics=score, **options, **SAGE)
    optimizer = torch.optim.SGD([torch.zeros(1)], TRAINING["learning_rate"])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **PLATEAU["lr_scheduler_kwargs"])
    expected = []
    for entry in entries(trainer, "eval_worst_score"):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(entry["eval_worst_score"])
    rates = [entry["learning_rate"] for entry in entries(trainer)]
    assert rates == expected
    assert rates[-1] < rates[0]


def test_greedy_schedule_is_stock():
    options = PLATEAU | {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"patience": 0, "min_lr": 1e-4}}
    assert_is_stock(vit, image_rows(), **options, eval_dataset=Rows(without("domain", image_rows(6, seed=2))))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_of_a_length_are_stock(name):
    """The second pass is no step of the schedule's."""
    ours = assert_is_stock(vit, image_rows(), lr_scheduler_type=name, warmup_steps=1)
    perturbed = train(vit(), Rows(image_rows()), lr_scheduler_type=name, warmup_steps=1, **SAGE)
    assert [e["learning_rate"] for e in entries(perturbed)] == [e["learning_rate"] for e in entries(ours)]


# ---- Schedule-free ----


class Modes(SAGETrainer):
    """Notes at every loss whether a schedule-free optimizer holds its training weights."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", [])
        if self.optimizer is not None:
            self.seen.append((model.training, torch.is_grad_enabled(), self.optimizer.param_groups[0]["train_mode"]))
        return super().compute_loss(model, *args, **kwargs)


FREE = {"lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.01}


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free_is_stock(name):
    pytest.importorskip("schedulefree")
    held_out = Rows(without("domain", image_rows(6, seed=2)))
    ours = assert_is_stock(vit, image_rows(), optim=name, **FREE, eval_dataset=held_out)
    assert len(entries(ours, "eval_loss")) == 3


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}], ids=["sage", "sam"])
@pytest.mark.parametrize("n", [1, 3])
def test_schedule_free_holds_the_right_weights_in_every_pass(n, options):
    pytest.importorskip("schedulefree")
    cut = {"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n}
    held_out = {"eval_dataset": Rows(image_rows(6, seed=2))}
    trainer = train(
        vit(), Rows(image_rows()), trainer=Modes, optim="schedule_free_sgd", **FREE, **held_out, **cut, **options
    )
    assert {mode for training, _, mode in trainer.seen if training} == {True}
    assert {mode for training, _, mode in trainer.seen if not training} == {False}
    assert {training for training, _, _ in trainer.seen} == {True, False}


def test_schedule_free_is_the_loop_by_hand():
    schedulefree = pytest.importorskip("schedulefree")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = schedulefree.SGDScheduleFree(decayed(model), RATE)
        optimizer.train()
        return optimizer

    options = {"optim": "schedule_free_sgd", "weight_decay": DECAY, "learning_rate": RATE} | ORDER | SAGE
    ours = train(Plain("dict"), Rows(image_rows()), **options)
    assert max(relative_differences(ours.model, by_hand(make), start=Plain("dict"))) <= ROUND_OFF


# ---- 8 bits ----


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_8_bits_are_stock(name):
    """bitsandbytes keeps small tensors in 32 bits; the classifier of 5×32 is small, the towers' 48×32 are not."""
    pytest.importorskip("bitsandbytes")
    assert_is_stock(clip, image_rows(), optim=name, learning_rate=1e-3)
    trained = train(clip(), Rows(image_rows()), optim=name, learning_rate=1e-3, **SAGE)
    assert flat(trained.model).isfinite().all()


# ---- Optimizers that step inside the backward pass ----

INSIDE = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adafactor_layerwise",
    "galore_adamw_8bit_layerwise",
    "apollo_adamw_layerwise",
)


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}], ids=["sage", "sam"])
@pytest.mark.parametrize("name", INSIDE)
def test_optimizers_that_step_inside_backward_are_refused(name, options):
    with pytest.raises(ValueError, match=r"steps inside the backward pass.*optim='adamw_torch'"):
        build(vit(), Rows(image_rows()), optim=name, **options)
    build(vit(), Rows(image_rows()), optim=name, method="erm")  # erm is the base's own step


def test_refused_optimizers_are_called_by_the_name_the_user_gave():
    with pytest.raises(ValueError, match=r"optimizer '?lomo'?"):
        build(vit(), Rows(image_rows()), optim="lomo", **SAGE)
