"""Laws 1, 2, 4 and 5 of the trainer on one process, clipping, BatchNorm, and the options of the second pass."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from assertions import assert_same_bits
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import (
    SAGE,
    Rows,
    build,
    clip,
    entries,
    flat,
    hub_dataset,
    image_rows,
    language_model,
    relative_differences,
    resnet,
    text_rows,
    train,
    vit,
    weights,
    without,
)
from transformers import Trainer

from hf_sage import SAGETrainer

NOTHING = {
    "erm": {"method": "erm"},
    "sage": {"method": "sage", "rho": 0.0, "gamma": 0.0},
    "sam": {"method": "sam", "rho": 0.0},
}
METHODS = {"erm": {"method": "erm"}, "sam": {"method": "sam"}, "sage": SAGE}

ROUND_OFF = 1e-5
"""Of fp32 sums taken in another order, relative to the way of the weights. With SGD, because Adam divides by the
gradient's own size: it would make a full step of an entry that is nothing but round-off."""


# ---- Law 1: nothing from nothing ----


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize(("model", "n"), [(clip, 1), (vit, 1), (resnet, 1), (vit, 3)])
def test_without_perturbation_and_noise_it_is_stock(model, n, nothing):
    """Over n micro-batches too, for ViT, whose loss is one that stock accumulates rightly."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 5}
    options |= {"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n}
    data = hub_dataset(image_rows())
    ours = train(model(dropout=0.2), data, domain_sampling="natural", **NOTHING[nothing], **options)
    stock = train(model(dropout=0.2), data.remove_columns("domain"), trainer=Trainer, **options)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


class Augmented(Rows):
    """Draws from torch's global generator with each row that is read, as augmentations do."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return row | {"pixel_values": row["pixel_values"] + torch.randn(3, 16, 16)}


def test_it_is_stock_for_rows_that_draw_random_numbers():
    """Looking up the domains must not draw the augmentations' random numbers."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Augmented(image_rows(6, seed=2))}
    ours = train(vit(), Augmented(image_rows()), domain_sampling="natural", method="erm", **options)
    stock = train(vit(), Augmented(without("domain", image_rows())), trainer=Trainer, **options)
    assert_same_bits(weights(ours.model), weights(stock.model))


# ---- Law 2: accumulation ----


def mean_loss(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """A ``compute_loss_func`` that is not divided by the number of items it is told."""
    return cross_entropy(outputs.logits, labels)


def mean_of_tokens(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """Another, whose micro-batches have unequal numbers of items."""
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def divided_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """One that is."""
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


PROBLEMS = {
    "clip": (clip, image_rows, {}),
    "vit": (vit, image_rows, {}),
    "language model": (language_model, text_rows, {}),
    "language model, first rows without labels": (language_model, lambda: text_rows(unlabelled=3), {}),
    "clip, smoothed labels": (clip, image_rows, {"label_smoothing_factor": 0.2}),
    "vit, smoothed labels": (vit, image_rows, {"label_smoothing_factor": 0.2}),
    "language model, smoothed labels": (language_model, text_rows, {"label_smoothing_factor": 0.2}),
    "mean loss": (vit, image_rows, {"compute_loss_func": mean_loss}),
    "mean of tokens": (language_model, text_rows, {"compute_loss_func": mean_of_tokens}),
    "divided loss": (clip, image_rows, {"compute_loss_func": divided_loss}),
}


# Trainer takes the mean over micro-batches of such a loss, and erm is Trainer to the bit: law 1 before law 2.
BY_TRAINER = ("mean of tokens", "erm")


@pytest.mark.parametrize(("problem", "method"), [p for p in product(PROBLEMS, METHODS) if p != BY_TRAINER])
def test_micro_batches_make_the_batch(problem, method):
    model, rows, options = PROBLEMS[problem]
    # One order for both: the rows of a batch as they come, domains in unequal numbers.
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}
    whole, cut = (
        train(
            model(),
            Rows(rows()),
            per_device_train_batch_size=12 // n,
            gradient_accumulation_steps=n,
            **order,
            **options,
            **METHODS[method],
        )
        for n in (1, 4)
    )
    largest, mean = relative_differences(cut.model, whole.model, start=model())
    assert max(largest, mean) <= ROUND_OFF, f"largest |Δ| {largest:.2g}, mean |Δ| {mean:.2g} of the way"
    for a, b in zip(entries(cut), entries(whole), strict=True):
        same = ("loss", "grad_norm", "perturbed_loss", "perturbation_norm", "agreement")
        assert {k: a[k] for k in same if k in a} == pytest.approx({k: b[k] for k in same if k in b}, rel=ROUND_OFF)


def test_stock_still_multiplies_the_loss_of_clip():
    """huggingface/transformers#47688; once this fails, `hf_sage.trainer.loss` has lost one of its reasons."""
    data = Rows(without("domain", image_rows()))
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "trainer": Trainer}
    whole = train(clip(), data, **options)
    cut = train(clip(), data, per_device_train_batch_size=3, gradient_accumulation_steps=4, **options)
    assert entries(cut)[0]["loss"] == pytest.approx(4 * entries(whole)[0]["loss"], rel=ROUND_OFF)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_micro_batches_without_labels_are_no_obstacle(scope):
    """A micro-batch (the first 3 rows) and an update (the first 12 rows) with nothing to learn from, as in stock."""
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "domain_sampling": "natural"}
    options |= {"train_sampling_strategy": "sequential", "perturbation_scope": scope} | SAGE
    for unlabelled in (3, 12):
        trainer = train(language_model(), Rows(text_rows(unlabelled=unlabelled)), **options)
        assert trainer.state.global_step == 3
        assert flat(trainer.model).isfinite().all()


def test_scopes_agree_on_one_micro_batch_and_on_no_more():
    def trained(scope: str, n: int) -> torch.nn.Module:
        size = {"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n}
        return train(clip(), Rows(image_rows()), perturbation_scope=scope, **size, **SAGE).model

    assert_same_bits(weights(trained("local", 1)), weights(trained("global", 1)))
    largest, mean = relative_differences(trained("local", 2), trained("global", 2), start=clip())
    assert min(largest, mean) > 100 * ROUND_OFF  # ε of half a batch is another one, not a rounding of the same


# ---- Law 4: resume ----


class FirstOfTwoRanks(SAGETrainer):
    """Reads what the first of two ranks reads."""

    def get_train_dataloader(self) -> DataLoader:
        options = {"batch_size": self._train_batch_size, "collate_fn": self.data_collator}
        loader = DataLoader(self.train_dataset, sampler=self._get_train_sampler(), **options)
        return prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)


SMALL = {"per_device_train_batch_size": 6}
RESUMED = [
    pytest.param(clip, SAGETrainer, SMALL, id="balanced"),
    pytest.param(clip, SAGETrainer, SMALL | {"domain_sampling": "natural"}, id="natural"),
    pytest.param(clip, SAGETrainer, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, id="cut"),
    pytest.param(clip, FirstOfTwoRanks, {"per_device_train_batch_size": 3}, id="first of two ranks"),
    pytest.param(vit, SAGETrainer, SMALL, id="renamed weights"),
]


@pytest.mark.parametrize("checkpoint", [3, 6])  # in the middle of the first and of the second epoch of 4 updates
@pytest.mark.parametrize(("model", "trainer", "options"), RESUMED)
def test_resumed_is_as_if_never_stopped(model, trainer, options, checkpoint, tmp_path):
    options = options | SAGE | {"max_steps": 7, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    options |= {"output_dir": str(tmp_path), "trainer": trainer}
    whole = train(model(dropout=0.2), Rows(image_rows()), save_strategy="steps", save_steps=3, **options)
    assert all(entry["noise_scale"] > 0 for entry in entries(whole))
    resume = str(tmp_path / f"checkpoint-{checkpoint}")
    resumed = train(model(dropout=0.2), Rows(image_rows()), resume=resume, **options)
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert entries(resumed) == entries(whole)


# ---- Law 5: restore ----


class Interrupted(SAGETrainer):
    """Raises in the second pass of its second update, after so many parts of it."""

    parts = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.start = [w.clone() for w in weights(self.model)]
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        away = any(not torch.equal(a, b) for a, b in zip(weights(self.model), self.start, strict=True))
        if self.state.global_step == 1 and away:
            if self.parts == 0:
                raise RuntimeError("second pass")
            self.parts -= 1
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("method", ["sam", "sage"])
def test_weights_are_restored_when_the_second_pass_raises(method, parts):
    options = METHODS[method] | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer = build(clip(), Rows(image_rows()), trainer=Interrupted, **options)
    trainer.parts = parts
    with pytest.raises(RuntimeError, match="second pass"):
        trainer.train()
    assert_same_bits(weights(trainer.model), trainer.start)

    # And nothing is left behind that a second attempt would feel.
    trainer.model.load_state_dict(clip().state_dict())
    trainer.parts = -1
    trainer.train()
    assert_same_bits(weights(trainer.model), weights(train(clip(), Rows(image_rows()), **options).model))


@pytest.mark.parametrize("method", ["sam", "sage"])
def test_checkpoints_hold_the_unperturbed_weights(method, tmp_path):
    options = METHODS[method] | {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    train(clip(), Rows(image_rows()), max_steps=3, **options)
    stopped = train(clip(), Rows(image_rows()), **METHODS[method], max_steps=2).model.state_dict()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert_same_bits([saved[name] for name in sorted(saved)], [stopped[name] for name in sorted(saved)])
    assert set(saved) == set(stopped)


# ---- Clipping, BatchNorm, dropout ----


def one_update(**options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """What is subtracted from the weights (SGD at learning rate 1), and the log entry."""
    trainer = train(clip(), Rows(image_rows()), max_steps=1, learning_rate=1.0, **options)
    return flat(clip()) - flat(trainer.model), entries(trainer)[0]


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_logged_norm_is_that_of_the_perturbed_gradient_before_clipping(limit):
    gradient, _ = one_update(method="sage", rho=0.02, gamma=0.0, max_grad_norm=1e9)
    used, entry = one_update(method="sage", rho=0.02, gamma=0.0, max_grad_norm=limit)
    assert entry["grad_norm"] == pytest.approx(gradient.norm().item(), rel=ROUND_OFF)
    assert used.norm().item() == pytest.approx(min(limit, entry["grad_norm"]), rel=1e-3)  # 1e-3 is round-off of θ - g
    _, clean = one_update(method="erm")
    assert abs(clean["grad_norm"] / entry["grad_norm"] - 1) > 0.01


def test_noise_is_added_after_clipping():
    def noise(limit: float) -> tuple[torch.Tensor, float]:
        update, entry = one_update(method="sage", rho=0.02, gamma=1.0, max_grad_norm=limit)
        return update - one_update(method="sage", rho=0.02, gamma=0.0, max_grad_norm=limit)[0], entry["noise_scale"]

    (clipped, scale), (unclipped, _) = noise(1e-6), noise(1e9)
    assert (clipped - unclipped).norm() <= ROUND_OFF * unclipped.norm()
    drawn = clipped[clipped != 0]
    # The standard deviation of n normal numbers is known to 1/√(2n); five of these make it one seed in a million.
    assert drawn.std().item() == pytest.approx(scale, rel=5 / (2 * len(drawn)) ** 0.5)


def test_without_clipping():
    (free, entry), (wide, expected) = (one_update(**SAGE, max_grad_norm=limit) for limit in (0.0, 1e9))
    assert torch.equal(free, wide)
    assert entry["grad_norm"] == expected["grad_norm"]


def test_the_second_pass_leaves_running_statistics_alone():
    def statistics(**options: Any) -> list[torch.Tensor]:
        model = train(resnet(), Rows(image_rows()), max_steps=1, **options).model
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        return list(model.buffers())

    assert_same_bits(statistics(method="sam"), statistics(method="erm"))
    assert_same_bits(statistics(method="sage", rho=0.02), statistics(method="sage", rho=0.0))  # noise, no second pass


def test_same_dropout():
    def sharpness(same: bool) -> float:
        options = {"method": "sage", "rho": 1e-7, "same_dropout": same, "max_steps": 1}
        return abs(entries(train(vit(dropout=0.5), Rows(image_rows()), **options))[0]["sharpness"])

    # At ρ = 1e-7 the loss can rise by ‖ε‖‖g‖ ≈ 3e-6 only; other masks move it further.
    assert sharpness(same=True) < 1e-5
    assert sharpness(same=False) > 1e-4
