"""What training logs, and metrics by domain."""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from assertions import assert_same_bits
from safetensors.torch import load_file
from torch import nn
from training import (
    DOMAINS,
    SAGE,
    Rows,
    accuracy,
    build,
    clip,
    entries,
    flat,
    hub_dataset,
    image_rows,
    text_rows,
    train,
    vit,
    weights,
    without,
)
from training import language_model as llama
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback

from hf_sage import SAGETrainer

STOCK = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
ASCENT = {"perturbed_loss", "sharpness", "perturbation_norm"}
GROUPS = {"agreement", "noise_scale"} | {f"loss/{domain}" for domain in DOMAINS}

FLOAT32 = 1e-6
"""Of an fp32 number near 1 that was rounded a few times."""


# ---- Training ----


@pytest.mark.parametrize(
    ("options", "keys"),
    [(SAGE, STOCK | ASCENT | GROUPS), ({"method": "sam"}, STOCK | ASCENT), ({"method": "erm"}, STOCK)],
    ids=["sage", "sam", "erm"],
)
def test_entries_of_a_method(options, keys):
    for cut in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}):
        trainer = train(vit(), Rows(image_rows()), **options, **cut)
        assert [set(entry) for entry in entries(trainer)] == [keys] * 3


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_entries_are_what_their_names_say(logging_steps):
    """Averages over three steps keep these laws, because all of them are linear."""
    for entry in entries(train(vit(), Rows(image_rows()), logging_steps=logging_steps, **SAGE)):
        assert entry["sharpness"] == pytest.approx(entry["perturbed_loss"] - entry["loss"], abs=FLOAT32)
        assert entry["sharpness"] > 0
        assert -0.5 <= entry["agreement"] <= 1  # the range of S for three groups
        assert entry["noise_scale"] == pytest.approx(SAGE["gamma"] * (1 - entry["agreement"]), rel=1e-12)  # fp64
        assert np.mean([entry[f"loss/{d}"] for d in set(DOMAINS)]) == pytest.approx(entry["loss"], rel=FLOAT32)


def test_norm_of_the_perturbation_is_sams_radius():
    for entry in entries(train(vit(), Rows(image_rows()), method="sam", rho=0.03)):
        assert entry["perturbation_norm"] == pytest.approx(0.03, rel=FLOAT32)


def test_entries_over_three_steps_are_means_of_those_of_each():
    each = entries(train(vit(), Rows(image_rows()), **SAGE))
    (mean,) = entries(train(vit(), Rows(image_rows()), logging_steps=3, **SAGE))
    for key in (ASCENT | GROUPS | {"loss"}) - {"grad_norm"}:
        assert mean[key] == pytest.approx(np.mean([entry[key] for entry in each]), rel=FLOAT32)


@pytest.mark.parametrize(("model", "rows"), [(clip, image_rows), (llama, text_rows)])
def test_losses_of_the_groups_are_those_of_their_rows(model, rows):
    """And their mean, weighted by what each has to learn from, is the loss."""
    batch = rows(12)
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential", "max_steps": 1}
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    (entry,) = entries(train(model(), Rows(batch), **order, **cut, **SAGE))
    plain, weighted, items = build(model(), Rows(batch), method="erm", per_device_eval_batch_size=12), 0.0, 0
    for domain in set(DOMAINS):
        own = [row for row in batch if row["domain"] == domain]
        assert entry[f"loss/{domain}"] == pytest.approx(plain.evaluate(Rows(own))["eval_loss"], rel=FLOAT32)
        labelled = sum((torch.as_tensor(row["labels"]).reshape(-1)[rows is text_rows :] != -100).sum() for row in own)
        weighted, items = weighted + entry[f"loss/{domain}"] * labelled, items + labelled
    assert float(weighted / items) == pytest.approx(entry["loss"], rel=FLOAT32)


def test_streams_log_their_groups_too():
    for domains in (DOMAINS, (0, 1, 0, 2)):
        stream = hub_dataset(image_rows(domains=domains)).to_iterable_dataset()
        entry = entries(train(vit(), stream, max_steps=1, **SAGE))[0]
        assert {key for key in entry if key.startswith("loss/")} == {f"loss/{d}" for d in domains}


class Broken(SAGETrainer):
    """The clean loss of the second update is NaN."""

    update = 1

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == self.update else loss


class BrokenFirst(Broken):
    """That of the first one is."""

    update = 0


class DropNaN(TrainerCallback):
    """Leaves an update out whose gradient is NaN, as a GradScaler does."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(p.grad.isfinite().all() for p in parameters):
            for p in parameters:
                p.grad = None


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}])
def test_a_loss_that_is_not_a_number_is_counted_and_passed_over(options):
    trainer = train(vit(), Rows(image_rows()), trainer=Broken, callbacks=[DropNaN()], **options)
    before, broken, after = entries(trainer)
    assert broken["skipped_perturbations"] == 1
    assert not ASCENT & set(broken)
    assert all("skipped_perturbations" not in entry and set(entry) >= ASCENT for entry in (before, after))
    assert flat(trainer.model).isfinite().all()
    assert math.isfinite(after["perturbed_loss"])
    # Of the mean over the three steps the broken one is no part.
    again = train(vit(), Rows(image_rows()), trainer=Broken, callbacks=[DropNaN()], logging_steps=3, **options)
    (entry,) = entries(again)
    assert entry["sharpness"] == pytest.approx((before["sharpness"] + after["sharpness"]) / 2, rel=FLOAT32)
    assert entry["skipped_perturbations"] == 1


def divided_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}, {"method": "erm"}])
def test_a_first_loss_that_is_not_a_number_does_not_decide_how_losses_are_normalised(options):
    whole, cut = (
        train(
            vit(),
            Rows(image_rows()),
            trainer=BrokenFirst,
            callbacks=[DropNaN()],
            compute_loss_func=divided_loss,
            per_device_train_batch_size=12 // n,
            gradient_accumulation_steps=n,
            **options,
        )
        for n in (1, 4)
    )
    # Round-off of sums in another order.
    assert entries(cut)[1]["loss"] == pytest.approx(entries(whole)[1]["loss"], rel=1e-5)


# ---- Evaluation ----


def evaluation_rows(rows: int = 21, domains: Any = DOMAINS) -> list[dict[str, Any]]:
    return image_rows(rows, domains, seed=2)


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Real numbers, so that no two domains tie."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return accuracy(prediction) | {"score": float(logits[:, 0].mean()), "own_loss": float(logits[:, 1].mean())}


@pytest.mark.parametrize("wrap", [Rows, hub_dataset])
@pytest.mark.parametrize("model", [clip, vit])
def test_metrics_of_a_domain_are_those_of_its_rows_alone(model, wrap):
    rows = evaluation_rows()
    trainer = build(model(), Rows(image_rows()), compute_metrics=scores, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(wrap(rows))
    for name in ("accuracy", "score", "own_loss"):
        alone = {}
        for domain in set(DOMAINS):
            own = wrap(without("domain", [row for row in rows if row["domain"] == domain]))
            alone[domain] = trainer.evaluate(own)[f"eval_{name}"]
            # Means over rows in batches of another size: rounded otherwise.
            assert metrics[f"eval_{domain}_{name}"] == pytest.approx(alone[domain], rel=FLOAT32, abs=FLOAT32)
        values = list(alone.values())
        worst = max(values) if name == "own_loss" else min(values)
        assert metrics[f"eval_avg_{name}"] == pytest.approx(np.mean(values), rel=FLOAT32, abs=FLOAT32)
        assert metrics[f"eval_worst_{name}"] == pytest.approx(worst, rel=FLOAT32, abs=FLOAT32)
    pooled = trainer.evaluate(wrap(without("domain", rows)))
    assert {key: metrics[key] for key in pooled if key in ("eval_loss", "eval_accuracy", "eval_score")} == {
        key: pooled[key] for key in ("eval_loss", "eval_accuracy", "eval_score")
    }


def test_evaluation_without_a_domain_column_is_stock():
    rows = Rows(without("domain", evaluation_rows()))
    ours, stock = (
        build(vit(), Rows(image_rows()), trainer=kind, compute_metrics=accuracy).evaluate(rows)
        for kind in (SAGETrainer, Trainer)
    )
    assert set(ours) == set(stock)
    assert ours["eval_accuracy"] == stock["eval_accuracy"]


def test_predictions_are_stock():
    rows = evaluation_rows()
    ours = build(vit(), Rows(image_rows()), compute_metrics=accuracy).predict(Rows(rows))
    stock = build(vit(), Rows(image_rows()), trainer=Trainer).predict(Rows(without("domain", rows)))
    assert isinstance(ours.label_ids, np.ndarray)
    assert np.array_equal(ours.label_ids, [row["labels"] for row in rows])
    assert np.array_equal(ours.predictions, stock.predictions)
    assert {"test_art_accuracy", "test_worst_accuracy"} <= set(ours.metrics)


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_domains_have_their_names(workers):
    """Domains that training never met, read by a worker process or not."""
    trainer = build(vit(), Rows(image_rows()), compute_metrics=accuracy, dataloader_num_workers=workers)
    metrics = trainer.evaluate(Rows(evaluation_rows(domains=("clipart", "quickdraw"))))
    assert {"eval_clipart_accuracy", "eval_quickdraw_accuracy"} <= set(metrics)


def test_class_labels_of_another_set_keep_their_own_names():
    def labelled(rows: list[dict[str, Any]], names: list[str]) -> datasets.Dataset:
        return hub_dataset(rows).cast_column("domain", datasets.ClassLabel(names=names))

    trainer = train(vit(), labelled(image_rows(), sorted(set(DOMAINS))), compute_metrics=accuracy, **SAGE)
    metrics = trainer.evaluate(labelled(evaluation_rows(domains=("clipart",)), ["clipart"]))
    assert "eval_clipart_accuracy" in metrics
    assert "eval_art_accuracy" not in metrics


class WithScalar(nn.Module):
    """Returns, beside the logits, a number for the whole batch, as models with auxiliary losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(pixel_values.flatten(1))
        return {
            "loss": nn.functional.cross_entropy(logits, labels),
            "logits": logits,
            "auxiliary": logits.square().mean(),
        }


def test_outputs_without_rows_are_no_obstacle():
    trainer = build(WithScalar(), Rows(image_rows()), compute_metrics=accuracy)
    assert "eval_art_accuracy" in trainer.evaluate(Rows(evaluation_rows()))


def test_several_sets_have_an_average_and_a_worst():
    sets = {name: Rows(without("domain", image_rows(9, seed=seed))) for seed, name in enumerate(("one", "two"), 5)}
    trainer = build(vit(), Rows(image_rows()), eval_dataset=sets, compute_metrics=scores)
    metrics = trainer.evaluate()
    for name in ("loss", "score", "own_loss"):
        values = [metrics[f"eval_{which}_{name}"] for which in sets]
        assert metrics[f"eval_avg_{name}"] == pytest.approx(np.mean(values))
        assert metrics[f"eval_worst_{name}"] == (max if name.endswith("loss") else min)(values)
    summaries = {
        f"eval_{kind}_{name}" for kind in ("avg", "worst") for name in ("accuracy", "loss", "score", "own_loss")
    }
    assert {key for key in metrics if key.startswith(("eval_avg", "eval_worst"))} == summaries  # and of no run times
    assert any(summaries <= set(entry) for entry in trainer.state.log_history)


def evaluation_set(by_domain: bool) -> Any:
    """One set with a domain column, or one for each domain."""
    rows = evaluation_rows()
    if not by_domain:
        return Rows(rows)
    return {d: Rows(without("domain", [row for row in rows if row["domain"] == d])) for d in sorted(set(DOMAINS))}


@pytest.mark.parametrize("by_domain", [False, True])
def test_worst_domain_stops_training(by_domain):
    """A learning rate of zero improves nothing: the second evaluation is one too many."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_worst_score"}
    options |= {"eval_dataset": evaluation_set(by_domain), "compute_metrics": scores, "learning_rate": 0.0}
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    assert train(vit(), Rows(image_rows()), callbacks=[stop], **options).state.global_step == 2


@pytest.mark.parametrize("by_domain", [False, True])
def test_worst_domain_selects_the_model(by_domain, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_worst_score"} | SAGE
    options |= {"eval_dataset": evaluation_set(by_domain), "compute_metrics": scores, "output_dir": str(tmp_path)}
    trainer = train(clip(), Rows(image_rows()), **options)
    worst = [entry["eval_worst_score"] for entry in entries(trainer, "eval_worst_score")]
    assert len(worst) == 4
    assert trainer.state.best_metric == max(worst) > min(worst)
    best = load_file(tmp_path / f"checkpoint-{1 + int(np.argmax(worst))}" / "model.safetensors")
    assert_same_bits(weights(trainer.model), [best[name] for name in trainer.model.state_dict()])
