"""Trainer's own features beside the two-pass step: callbacks, reports, searches, overrides, and other trainers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from assertions import assert_same_bits
from test_features_model import NOTHING, ROUND_OFF, assert_is_stock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import (
    DOMAINS,
    SAGE,
    TRAINING,
    Rows,
    accuracy,
    build,
    clip,
    entries,
    flat,
    hub_dataset,
    image_rows,
    language_model,
    max_difference,
    relative_differences,
    train,
    vit,
    weights,
    without,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend
from transformers.trainer_utils import BestRun

from hf_sage import SAGEArguments, SAGEConfig, SAGEMixin, SAGETrainer
from hf_sage.trainer.refusals import refuse_what_cannot_be_exact

CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
METHODS = {"sage": SAGE, "sam": {"method": "sam"}, "erm": {"method": "erm"}}


# ---- Hyperparameter search ----


class Backend:
    """What transformers' backend for Optuna does with a fixed list of trials."""

    trials: tuple[dict[str, Any], ...] = ()

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Trainer, n_trials: int, direction: str, **_: Any) -> BestRun:
        values = []
        for number, params in enumerate(self.trials[:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            metrics = trainer.evaluate()
            self.seen.append((trainer.sage_method, flat(trainer.model), metrics))
            values.append(trainer.compute_objective(metrics))
        best = values.index(min(values))
        return BestRun(str(best), values[best], self.trials[best])


TRIALS = (
    {"method": "sage", "rho": 0.0, "gamma": 0.0},
    {"method": "sage", "rho": 0.05, "gamma": 1e-2},
    {"method": "sage", "rho": 0.02, "gamma": 0.0, "polar": "svd", "gradient_accumulation_steps": 2},
)


def searching(model_init: Any = vit, **options: Any) -> SAGETrainer:
    arguments = SAGEConfig(**TRAINING | {"output_dir": "unused", "per_device_train_batch_size": 6} | options)
    data = {"train_dataset": Rows(image_rows()), "eval_dataset": Rows(image_rows(9, seed=2))}
    return SAGETrainer(args=arguments, model_init=lambda: model_init(), **data)


def test_a_search_over_radius_and_noise(monkeypatch, tmp_path):
    """The method is built anew for each trial, whose result is that of the same training alone."""
    backend = type("Stub", (Backend,), {"trials": TRIALS, "seen": []})
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, backend)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = searching(output_dir=str(tmp_path))
    best = trainer.hyperparameter_search(
        lambda trial: trial.params, lambda metrics: metrics["eval_loss"], n_trials=3, backend="optuna"
    )
    assert len({method for method, _, _ in backend.seen}) == 3
    for trial, (method, found, metrics) in zip(TRIALS, backend.seen, strict=True):
        assert method.ascent.rho == trial["rho"]
        assert method.corrections[0].gamma == trial["gamma"]
        alone = searching(output_dir=str(tmp_path), **trial)
        alone.train()
        assert torch.equal(found, flat(alone.model))
        assert metrics["eval_loss"] == alone.evaluate()["eval_loss"]
    assert best.objective == min(metrics["eval_loss"] for _, _, metrics in backend.seen)


def test_a_search_with_optuna(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = searching(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1)
    best = trainer.hyperparameter_search(
        lambda trial: {"rho": trial.suggest_float("rho", 1e-3, 1e-1, log=True)}, n_trials=2, backend="optuna"
    )
    assert 1e-3 <= best.hyperparameters["rho"] <= 1e-1


def test_a_search_cannot_set_what_the_method_refuses(monkeypatch, tmp_path):
    backend = type("Stub", (Backend,), {"trials": ({"rho": -1.0},), "seen": []})
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, backend)
    with pytest.raises(ValueError, match="rho must be"):
        searching(output_dir=str(tmp_path)).hyperparameter_search(lambda trial: trial.params, backend="optuna")


# ---- Reports ----


def test_tensorboard_shows_what_the_step_found(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    rows = Rows(image_rows())
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows, "compute_metrics": accuracy} | SAGE
    reported = train(vit(), rows, report_to="tensorboard", output_dir=str(tmp_path), **options)
    silent = train(vit(), rows, report_to="none", **options)
    assert_same_bits(weights(reported.model), weights(silent.model))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"agreement", "noise_scale", "sharpness", "perturbed_loss", "perturbation_norm"}
    expected |= {f"loss/{name}" for name in DOMAINS}
    assert {f"train/{name}" for name in expected} | {"eval/worst_accuracy", "eval/art_accuracy"} <= tags
    values = [event.value for event in events.Scalars("train/agreement")]
    assert values == pytest.approx([entry["agreement"] for entry in entries(reported)], rel=1e-6)  # fp32 on the disk


def test_every_log_entry_is_of_plain_numbers():
    """So that every reporting integration can take it."""
    trainer = train(vit(), Rows(image_rows()), **SAGE)
    assert {type(value) for entry in trainer.state.log_history for value in entry.values()} <= {float, int}


def test_notebooks_show_several_sets():
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    sets = {name: Rows(image_rows(6, seed=seed)) for seed, name in enumerate(("one", "two"), 2)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": sets, "compute_metrics": accuracy} | SAGE
    trainer = train(vit(), Rows(image_rows()), callbacks=[NotebookProgressCallback()], **options)
    assert len(entries(trainer, "eval_worst_accuracy")) >= 3


def test_logging_first_step_and_by_epoch():
    options = {"logging_steps": 3, "max_steps": 5, **SAGE}
    assert [e["step"] for e in entries(train(vit(), Rows(image_rows()), logging_first_step=True, **options))] == [1, 3]
    by_epoch = train(vit(), Rows(image_rows()), logging_strategy="epoch", **options)
    assert [e["step"] for e in entries(by_epoch)] == [2, 4, 5]
    each = entries(train(vit(), Rows(image_rows()), **(options | {"logging_steps": 1})))
    for mean, of in zip(entries(by_epoch), (each[:2], each[2:4], each[4:]), strict=True):
        for key in ("loss", "agreement", "perturbed_loss", "loss/art"):
            assert mean[key] == pytest.approx(sum(e[key] for e in of) / len(of), rel=1e-6)  # fp32 sums


# ---- Callbacks ----


class Recorder(TrainerCallback):
    """The order of events, and the gradient and the weights at each of them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gradients: list[Tensor] = []
        self.weights: dict[str, list[Tensor]] = {}

    def note(self, event: str, model: nn.Module) -> None:
        self.events.append(event)
        self.weights.setdefault(event, []).append(flat(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.note("step_begin", model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.note("substep_end", model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.note("pre_optimizer_step", model)
        self.gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.note("optimizer_step", model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.note("step_end", model)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_come_in_stocks_order_and_never_see_perturbed_weights(method):
    ours, stock = Recorder(), Recorder()
    train(vit(), Rows(image_rows()), callbacks=[ours], **CUT, **METHODS[method])
    train(vit(), Rows(without("domain", image_rows())), trainer=Trainer, callbacks=[stock], **CUT)
    assert ours.events == stock.events
    per_update = zip(*(ours.weights[e] for e in ("step_begin", "pre_optimizer_step")), strict=True)
    assert all(torch.equal(a, b) for a, b in per_update)
    assert all(torch.equal(w, ours.weights["step_begin"][i // 2]) for i, w in enumerate(ours.weights["substep_end"]))
    per_update = zip(*(ours.weights[e] for e in ("optimizer_step", "step_end")), strict=True)
    assert all(torch.equal(a, b) for a, b in per_update)


def test_a_callback_before_the_optimizer_sees_the_clipped_perturbed_gradient():
    recorder = Recorder()
    options = {"max_grad_norm": 0.1, "callbacks": [recorder], "max_steps": 1}
    (entry,) = entries(train(vit(), Rows(image_rows()), **options, **SAGE))
    assert entry["grad_norm"] > 0.1
    assert recorder.gradients[0].norm().item() == pytest.approx(0.1, rel=1e-4)  # 1e-6 is added to the norm, over 1


class Masks(TrainerCallback):
    """Holds the classifier still by its gradient, as users do who have no frozen parameters."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.classifier.weight.grad = None


def test_a_callback_can_take_a_gradient_away():
    """No gradient, so no noise either."""
    trainer = train(vit(), Rows(image_rows()), callbacks=[Masks()], **(SAGE | {"gamma": 1.0}))
    assert torch.equal(trainer.model.classifier.weight, vit().classifier.weight)
    assert not torch.equal(trainer.model.classifier.bias, vit().classifier.bias)


class Stop(TrainerCallback):
    """Stops training, or the epoch, with the second micro-batch of the second update, or after that update."""

    def __init__(self, what: str, moment: str) -> None:
        self.what, self.moment, self.substeps, self.done = what, moment, 0, False

    def _stop(self, control: Any) -> None:
        if not self.done:
            setattr(control, self.what, True)
            self.done = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.substeps += 1
        if self.moment == "substep" and self.substeps == 4:
            self._stop(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.moment == "step" and state.global_step == 2:
            self._stop(control)


@pytest.mark.parametrize("what", ["should_training_stop", "should_epoch_stop"])
@pytest.mark.parametrize("moment", ["substep", "step"])
def test_stopping_is_stock(moment, what):
    """In the middle of an accumulation too."""

    def options() -> dict[str, Any]:
        return {"callbacks": [Stop(what, moment)], "max_steps": -1, "num_train_epochs": 2, **CUT}

    data = image_rows(36)
    ours = train(vit(), Rows(data), **NOTHING, **options())
    stock = train(vit(), Rows(without("domain", data)), trainer=Trainer, **options())
    assert ours.state.global_step == stock.state.global_step
    assert_same_bits(weights(ours.model), weights(stock.model))
    perturbed = train(vit(), Rows(data), **SAGE, **options())
    assert perturbed.state.global_step == stock.state.global_step


def test_micro_batches_before_a_stop_are_not_part_of_the_next_training():
    def trained(stop: bool) -> Any:
        options = {"callbacks": [Stop("should_training_stop", "substep")] if stop else []}
        trainer = build(vit(), Rows(image_rows()), **options, **CUT, **SAGE)
        if stop:
            trainer.train()
            assert trainer.state.global_step == 1
            trainer.model.load_state_dict(vit().state_dict())
        trainer.train()
        return trainer

    assert_same_bits(weights(trained(stop=True).model), weights(trained(stop=False).model))


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_that_is_cut_short_moves_the_balanced_window_on(method):
    """The second epoch is the second one, however early the first ended."""
    seen: list[list[int]] = []

    def noting(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append([row["row"] for row in rows])
        return {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in ("pixel_values", "labels")}

    rows = [row | {"row": i} for i, row in enumerate(image_rows(48))]
    options = {"remove_unused_columns": False, "max_steps": -1, "num_train_epochs": 2, **METHODS[method]}
    train(vit(), Rows(rows), data_collator=noting, **options)
    second = seen[4:]
    seen.clear()

    class StopEpoch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    train(vit(), Rows(rows), data_collator=noting, callbacks=[StopEpoch()], **options)
    assert seen[-4:] == second


# ---- Overrides ----


class Weighted(SAGETrainer):
    """A loss of the user's, from the model's logits."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, weight=torch.arange(1.0, 6.0))
        return (loss, outputs) if return_outputs else loss


class WeightedStock(Trainer):
    compute_loss = Weighted.compute_loss


@pytest.mark.parametrize("model", [vit, clip])
def test_an_own_loss_is_stock(model):
    """One that is handed its labels to keep, and that is not divided by the number of items."""
    ours = train(model(), Rows(image_rows()), trainer=Weighted, **NOTHING)
    stock = train(model(), Rows(without("domain", image_rows())), trainer=WeightedStock)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


def test_an_own_loss_sees_the_labels_in_every_pass():
    trainer = train(vit(), Rows(image_rows()), trainer=Weighted, **CUT, **SAGE)
    assert all(entry["perturbed_loss"] > entry["loss"] for entry in entries(trainer))


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    losses = cross_entropy(outputs.logits, labels, reduction="none")
    total = ((1 - (-losses).exp()) ** 2 * losses).sum()
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def test_compute_loss_func_is_stock():
    assert_is_stock(vit, image_rows(), compute_loss_func=focal)
    assert_is_stock(vit, image_rows(), compute_loss_func=focal, **CUT)


@pytest.mark.parametrize("method", METHODS)
def test_compute_loss_func_over_micro_batches(method):
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential", "compute_loss_func": focal}
    whole, cut = (train(vit(), Rows(image_rows()), **order, **METHODS[method], **c) for c in ({}, CUT))
    assert max(relative_differences(cut.model, whole.model, start=vit())) <= ROUND_OFF


class Steps(SAGETrainer):
    """Does something of its own around each step, as TRL's trainers do."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.rows = [*getattr(self, "rows", []), len(inputs["labels"])]
        loss = super().training_step(model, inputs, num_items_in_batch)
        assert not loss.requires_grad
        self.had_gradient = [*getattr(self, "had_gradient", []), model.classifier.weight.grad is not None]
        return loss


@pytest.mark.parametrize("method", METHODS)
def test_an_own_training_step_around_ours(method):
    trainer = train(vit(), Rows(image_rows()), trainer=Steps, **CUT, **METHODS[method])
    plain = train(vit(), Rows(image_rows()), **CUT, **METHODS[method])
    assert trainer.rows == [4] * 9
    assert trainer.had_gradient[2::3] == [True] * 3  # after each update's last micro-batch
    assert_same_bits(weights(trainer.model), weights(plain.model))


class StepsBelow(Trainer):
    """The same below the mixin: what a base does around its step, such as TRL's activation offloading."""

    around = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.around += 1
        return super().training_step(*args, **kwargs)


class SAGEOnSteps(SAGEMixin, StepsBelow):
    pass


@pytest.mark.parametrize(("method", "runs"), [("erm", 3), ("sam", 0), ("sage", 0)])
def test_a_training_step_below_the_mixin_is_the_one_that_is_replaced(method, runs):
    """What it did around the base's one pass, such as TRL's activation offloading, is not done around our two."""
    assert train(vit(), Rows(image_rows()), trainer=SAGEOnSteps, **METHODS[method]).around == runs


# ---- Lengths of training, and more than one ----


def test_epochs_are_steps():
    epochs = train(vit(), Rows(image_rows()), max_steps=-1, num_train_epochs=2, **SAGE)
    steps = train(vit(), Rows(image_rows()), max_steps=4, **SAGE)
    assert epochs.state.global_step == steps.state.global_step == 4
    assert_same_bits(weights(epochs.model), weights(steps.model))
    assert [e["loss"] for e in entries(epochs)] == [e["loss"] for e in entries(steps)]


def test_epochs_are_stock():
    assert_is_stock(vit, image_rows(), max_steps=-1, num_train_epochs=2.5, lr_scheduler_type="linear")


def twice(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.train()
    return trainer


def test_training_twice_is_stock():
    ours = twice(build(vit(dropout=0.2), Rows(image_rows()), optim="adamw_torch", **NOTHING))
    stock = twice(build(vit(dropout=0.2), Rows(without("domain", image_rows())), trainer=Trainer, optim="adamw_torch"))
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


def test_training_twice_begins_with_the_same_batches():
    """The balanced window starts again with the first epoch, as every other sampler's seed does."""
    trainer = build(vit(), Rows(image_rows()), learning_rate=0.0, **SAGE)
    trainer.train()
    first = entries(trainer)
    trainer.train()
    assert entries(trainer) == first


def test_evaluating_and_predicting_before_training_changes_nothing():
    trainer = build(vit(), Rows(image_rows()), compute_metrics=accuracy, **SAGE)
    before = trainer.evaluate(Rows(image_rows(9, seed=2)))
    assert before["eval_accuracy"] == trainer.predict(Rows(image_rows(9, seed=2))).metrics["test_accuracy"]
    trainer.train()
    assert_same_bits(weights(trainer.model), weights(train(vit(), Rows(image_rows()), **SAGE).model))


def test_evaluating_while_training_changes_nothing():
    held_out = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "compute_metrics": accuracy}
    for name, options in METHODS.items():
        with_it = train(vit(), Rows(image_rows()), eval_dataset=Rows(image_rows(9)), **held_out, **options)
        without_it = train(vit(), Rows(image_rows()), **options)
        assert max_difference(with_it.model, without_it.model) == 0, name


def test_predictions_without_labels():
    unlabelled = [{"pixel_values": row["pixel_values"], "domain": row["domain"]} for row in image_rows(9)]
    prediction = build(vit(), Rows(image_rows()), compute_metrics=accuracy, **SAGE).predict(Rows(unlabelled))
    assert prediction.predictions.shape == (9, 5)
    assert prediction.label_ids is None


def test_a_step_can_be_made_without_train():
    """By hand, as loops of one's own do."""
    trainer = build(vit(), Rows(image_rows()), **SAGE)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch, torch.tensor(12))
    assert loss > 0
    assert_same_bits(weights(trainer.model), weights(vit()))
    assert trainer.model.classifier.weight.grad.norm() > 0


class OutOfMemory(SAGETrainer):
    """Fails once in the second pass, as a GPU does whose batch is too large."""

    failed = 0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and not torch.equal(model.classifier.weight, self.start) and self._train_batch_size > 6:
            self.failed += 1
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.start = self.model.classifier.weight.detach().clone()
        return super().training_step(*args, **kwargs)


def test_a_smaller_batch_is_found_after_running_out_of_memory():
    """By ten per cent, or by half in older releases of accelerate; each attempt from where training began."""
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 7, "max_steps": 1, "learning_rate": 0.0}
    trainer = train(vit(), Rows(image_rows()), trainer=OutOfMemory, **options, **SAGE)
    assert (trainer.failed, trainer.state.global_step) == (1, 1)
    assert trainer._train_batch_size < 7
    assert_same_bits(weights(trainer.model), weights(vit()))


# ---- The Hub ----


class Hub:
    """Notes what it is asked for, and does nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"name": name} | options))
        return SimpleNamespace(repo_id="user/" + name)

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True)


@pytest.mark.parametrize("options", [{}, {"commit_message": "m", "revision": "r", "token": "t", "tags": ["a"]}])
def test_pushing_to_the_hub_is_stock(options, monkeypatch, tmp_path):
    calls = {}
    for kind in (SAGETrainer, Trainer):
        hub = Hub()
        if hasattr(transformers.trainer, "hf_api"):
            monkeypatch.setattr("transformers.trainer.hf_api", lambda hub=hub: hub)
        else:  # older releases call the functions of huggingface_hub
            monkeypatch.setattr("transformers.trainer.create_repo", hub.create_repo)
            monkeypatch.setattr("transformers.trainer.upload_folder", hub.upload_folder)
        method = SAGE if kind is SAGETrainer else {}
        own = {"output_dir": str(tmp_path), "hub_model_id": "model", "eval_dataset": Rows(image_rows(6, seed=2))}
        trainer = train(clip(), Rows(image_rows()), trainer=kind, eval_strategy="steps", eval_steps=1, **own, **method)
        trainer.push_to_hub(**{k: list(v) if isinstance(v, list) else v for k, v in options.items()})
        calls[kind] = hub.calls
        assert "README.md" in {p.name for p in tmp_path.iterdir()}
    assert calls[SAGETrainer] == calls[Trainer]
    assert [name for name, _ in calls[Trainer]] == ["create_repo", "upload_folder"]


@pytest.mark.parametrize("several", [False, True])
def test_the_card_of_an_evaluation_by_domain(several, tmp_path):
    """Its rows are the domains, or the evaluation sets where there are several."""
    sets = {name: Rows(image_rows(6, seed=n)) for n, name in enumerate(("one", "two"))}
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": sets if several else sets["one"]}
    trainer = train(clip(), Rows(image_rows()), output_dir=str(tmp_path), compute_metrics=accuracy, **options, **SAGE)
    trainer.create_model_card(model_name="model")
    card = (tmp_path / "README.md").read_text()
    assert "\n# model\n" in card
    for name in ("one", "two") if several else set(DOMAINS):
        assert f"| {name} | " in card


# ---- Arguments ----


def two_gpus(**options: Any) -> SAGEConfig:
    """Arguments that believe in two GPUs."""
    return type("TwoGPUs", (SAGEConfig,), {"n_gpu": 2})(**TRAINING | {"output_dir": "unused"} | options)


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}], ids=["sage", "sam"])
def test_more_than_one_gpu_in_a_process_is_refused(options):
    """That is torch's DataParallel."""
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        SAGETrainer(vit(), two_gpus(**options), train_dataset=Rows(image_rows()))
    SAGETrainer(vit(), two_gpus(method="erm"), train_dataset=Rows(image_rows()))


def test_a_search_does_not_get_around_a_refusal():
    """erm may run on torch's DataParallel; a search that turns it into SAM may not."""
    trainer = SAGETrainer(vit(), two_gpus(method="erm"), train_dataset=Rows(image_rows()))
    trainer.args.method = "sam"
    with pytest.raises(ValueError, match="2 GPUs"):
        trainer.train()


@pytest.mark.parametrize("arguments", [None, "plain"])
def test_plain_arguments_train(arguments, tmp_path, monkeypatch):
    """Stock's, or none at all."""
    monkeypatch.chdir(tmp_path)
    if arguments is None:
        trainer = SAGETrainer(vit(), train_dataset=Rows(image_rows()))
        trainer.args.max_steps, trainer.args.use_cpu = 1, True
    else:
        plain = TrainingArguments(**TRAINING | {"output_dir": str(tmp_path)})
        trainer = SAGETrainer(vit(), plain, train_dataset=Rows(image_rows()))
    trainer.train()
    assert trainer.sage_method.ascent.rho == 1e-6
    assert flat(trainer.model).isfinite().all()


def test_gradients_of_bf16_autocast_train():
    trainer = train(vit(), Rows(image_rows()), bf16=True, **SAGE)
    assert flat(trainer.model).isfinite().all()
    assert all(entry["perturbation_norm"] > 0 for entry in entries(trainer))


# ---- Sequence to sequence ----


@dataclass
class Seq2SeqSAGEArguments(SAGEArguments, Seq2SeqTrainingArguments):
    pass


class SAGESeq2SeqTrainer(SAGEMixin, Seq2SeqTrainer):
    pass


def t5(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, dropout_rate=dropout))


def bart(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**shape, **special, vocab_size=32, dropout=dropout))


def translations() -> list[dict[str, Any]]:
    tokens = torch.arange(240).view(24, 10) % 29 + 3
    return [{"input_ids": t, "labels": t[:4].flip(0), "domain": DOMAINS[i % 4]} for i, t in enumerate(tokens)]


def seq2seq(model: nn.Module, kind: type[Trainer], rows: list[dict[str, Any]], output: Any, **options: Any) -> Any:
    arguments = Seq2SeqSAGEArguments if issubclass(kind, SAGEMixin) else Seq2SeqTrainingArguments
    given = TRAINING | {"output_dir": str(output), "predict_with_generate": True, "generation_max_length": 5} | options
    trainer = kind(
        model,
        arguments(**given),
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows),
        compute_metrics=lambda p: {"length": float(p.predictions.shape[1]), "first": float(p.predictions[:, 1].mean())},
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("model", [t5, bart])
def test_seq2seq_is_stock(model, tmp_path):
    ours = seq2seq(model(dropout=0.2), SAGESeq2SeqTrainer, translations(), tmp_path, **NOTHING)
    stock = seq2seq(model(dropout=0.2), Seq2SeqTrainer, without("domain", translations()), tmp_path)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)
    metrics, expected = ours.evaluate(num_beams=2), stock.evaluate(num_beams=2)
    same = ("eval_loss", "eval_length", "eval_first")
    assert {k: metrics[k] for k in same} == {k: expected[k] for k in same}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [t5, bart])
def test_seq2seq_micro_batches_make_the_batch(model, method, tmp_path):
    """Their losses are means that ignore num_items_in_batch: stock multiplies them (huggingface/transformers#47688)."""
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"} | METHODS[method]
    whole, cut = (seq2seq(model(), SAGESeq2SeqTrainer, translations(), tmp_path, **order, **c) for c in ({}, CUT))
    assert max(relative_differences(cut.model, whole.model, start=model())) <= ROUND_OFF


@pytest.mark.parametrize("model", [t5, bart])
def test_seq2seq_generates_by_domain(model, tmp_path):
    trainer = seq2seq(model(), SAGESeq2SeqTrainer, translations(), tmp_path, **CUT, **SAGE)
    assert all(entry["perturbation_norm"] > 0 and "agreement" in entry for entry in entries(trainer))
    metrics = trainer.evaluate()
    predicted = trainer.predict(Rows(translations()))
    for name in set(DOMAINS):
        rows = [i for i in range(24) if DOMAINS[i % 4] == name]
        first = float(predicted.predictions[rows, 1].mean())
        assert metrics[f"eval_{name}_first"] == predicted.metrics[f"test_{name}_first"] == first
    assert metrics["eval_worst_first"] == min(metrics[f"eval_{name}_first"] for name in set(DOMAINS))


# ---- TRL ----


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(61))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def texts(column: str = "text", rows: int = 24) -> list[dict[str, Any]]:
    """Of 3 to 10 words."""
    words = torch.randint(0, 61, (rows, 10), generator=torch.Generator().manual_seed(3)).tolist()
    lines = [" ".join(f"w{j}" for j in line[: 3 + (5 * i) % 8]) for i, line in enumerate(words)]
    return [{column: line, "domain": DOMAINS[i % 4]} for i, line in enumerate(lines)]


def sft(ours: bool, rows: list[dict[str, Any]], output: Any, model: Any = language_model, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    config = dataclass(type("SAGESFTConfig", (SAGEArguments, trl.SFTConfig), {})) if ours else trl.SFTConfig
    kind = type("SAGESFTTrainer", (SAGEMixin, trl.SFTTrainer), {}) if ours else trl.SFTTrainer
    given = TRAINING | {"output_dir": str(output), "bf16": False, "gradient_checkpointing": False} | options
    trainer = kind(model(), config(**given), train_dataset=hub_dataset(rows), processing_class=tokenizer())
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", ["text", "prompt and completion"])
def test_trls_sft_is_stock(form, tmp_path):
    rows = texts() if form == "text" else [r | {"completion": r["prompt"]} for r in texts("prompt")]
    ours = sft(True, rows, tmp_path, **NOTHING)
    stock = sft(False, without("domain", rows), tmp_path)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)
    for data in (hub_dataset(rows), {"a": hub_dataset(rows[:6]), "b": hub_dataset(rows[6:])}):
        metrics, expected = ours.evaluate(data), stock.evaluate(data)
        losses = {name for name in expected if name.endswith(("loss", "accuracy"))}
        assert losses
        assert {name: metrics[name] for name in losses} == {name: expected[name] for name in losses}


@pytest.mark.parametrize("method", METHODS)
def test_trls_sft_micro_batches_make_the_batch(method, tmp_path):
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"} | METHODS[method]
    whole, cut = (sft(True, texts(), tmp_path, **order, **c) for c in ({}, CUT))
    assert max(relative_differences(cut.model, whole.model, start=language_model())) <= ROUND_OFF
    if method == "sage":
        assert {f"loss/{name}" for name in DOMAINS} <= set(entries(cut)[0])


def test_trls_sft_is_sage_of_the_same_tokens(tmp_path):
    """TRL's loss is the mean over tokens, so it is the same training as on the plain trainer."""
    rows = texts()
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"} | SAGE
    ours = sft(True, rows, tmp_path, **order)
    encode, end = tokenizer(), tokenizer().eos_token_id
    tokens = [torch.tensor([*encode(row["text"])["input_ids"], end]) for row in rows]
    plain = [{"input_ids": t, "labels": t, "domain": r["domain"]} for t, r in zip(tokens, rows, strict=True)]

    def pad(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        own = [row["input_ids"] for row in batch]
        join = nn.utils.rnn.pad_sequence
        mask = join([torch.ones_like(t) for t in own], batch_first=True)
        return {"input_ids": join(own, True), "labels": join(own, True, -100), "attention_mask": mask}

    expected = train(language_model(), Rows(plain), data_collator=pad, **order)
    assert max(relative_differences(ours.model, expected.model, start=language_model())) <= ROUND_OFF


@pytest.mark.parametrize("method", ["sage", "sam"])
def test_trls_sft_counts_the_tokens_of_the_first_pass(method, tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    ours = sft(True, texts(), tmp_path, domain_sampling="natural", **order, **METHODS[method])
    stock = sft(False, without("domain", texts()), tmp_path, **order)
    assert [e["num_tokens"] for e in entries(ours)] == [e["num_tokens"] for e in entries(stock)]


def test_trls_sft_is_stock_over_micro_batches_with_its_log(tmp_path):
    ours = sft(True, texts(), tmp_path, **NOTHING, **CUT)
    stock = sft(False, without("domain", texts()), tmp_path, **CUT)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


def test_trls_sft_trains_adapters(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        return peft.get_peft_model(language_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    trainer = sft(True, texts(), tmp_path, model=adapted, **SAGE)
    assert [entry["perturbation_norm"] > 0 for entry in entries(trainer)] == [False, True, True]


def test_trls_packing_is_refused_with_the_cure(tmp_path):
    """Packed rows hold several domains: TRL drops the column."""
    with pytest.raises(ValueError, match=r"'domain'.*domain_column=None"):
        sft(True, texts(), tmp_path, packing=True, packing_strategy="wrapped", max_length=16, **SAGE)


def test_trls_padding_free_batches_are_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"'input_ids' has 1 rows.*domain_column=None"):
        sft(True, texts(), tmp_path, padding_free=True, max_length=None, **SAGE)


@pytest.mark.parametrize("method", ["erm", "sam", "sage"])
def test_trls_preference_pairs(method, tmp_path):
    """Its collators put the chosen rows before the rejected ones: twice the rows, which SAGE cannot cut by domain."""
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**shape, vocab_size=64, num_labels=1))
    pairs = zip(texts("chosen"), texts("rejected", rows=25)[1:], strict=True)
    rows = [a | {"rejected": b["rejected"]} for a, b in pairs]
    config = dataclass(type("SAGERewardConfig", (SAGEArguments, trl.RewardConfig), {}))
    kind = type("SAGERewardTrainer", (SAGEMixin, trl.RewardTrainer), {})
    given = TRAINING | {"output_dir": str(tmp_path), "bf16": False, "gradient_checkpointing": False} | METHODS[method]
    trainer = kind(model, config(**given), train_dataset=hub_dataset(rows), processing_class=tokenizer())
    if method == "sage":
        with pytest.raises(ValueError, match=r"24 rows in a batch of 12.*domain_column=None"):
            trainer.train()
    else:
        trainer.train()
        assert len(entries(trainer)) == 3


# ---- sentence-transformers ----


def encoder(dropout: float = 0.0) -> Any:
    """A BERT of one layer that pools its tokens; built without any download."""
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel

    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    masks = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**shape, **masks, vocab_size=64, max_position_embeddings=32)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        word = models.Transformer(folder, max_seq_length=16)
    return SentenceTransformer(modules=[word, models.Pooling(32)], device="cpu")


def sentence_pairs() -> list[dict[str, Any]]:
    first, second = texts(), texts(rows=25)[1:]
    return [
        {"sentence1": a["text"], "sentence2": b["text"], "score": i / 24, "domain": a["domain"]}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def sentences(ours: bool, rows: list[dict[str, Any]], output: Any, loss: Any = None, **options: Any) -> Any:
    st = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    arguments = st.SentenceTransformerTrainingArguments
    config = dataclass(type("SAGESTArguments", (SAGEArguments, arguments), {})) if ours else arguments
    base = st.SentenceTransformerTrainer
    kind = type("SAGESentenceTrainer", (SAGEMixin, base), {}) if ours else base
    model = encoder(options.pop("dropout", 0.0))
    loss = losses.CosineSimilarityLoss if loss is None else loss
    arguments_ = config(**TRAINING | {"output_dir": str(output)} | options)
    trainer = kind(model, arguments_, train_dataset=hub_dataset(rows), loss=loss(model))
    trainer.train()
    return trainer


def test_sentence_transformers_are_stock(tmp_path):
    ours = sentences(True, sentence_pairs(), tmp_path, dropout=0.2, **NOTHING)
    stock = sentences(False, without("domain", sentence_pairs()), tmp_path, dropout=0.2)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)
    metrics = ours.evaluate(hub_dataset(sentence_pairs()))
    assert metrics["eval_loss"] == stock.evaluate(hub_dataset(without("domain", sentence_pairs())))["eval_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_sentence_transformers_train(method, tmp_path):
    trainer = sentences(True, sentence_pairs(), tmp_path, **METHODS[method])
    for entry in entries(trainer):
        if method != "erm":
            assert entry["perturbed_loss"] > entry["loss"]
        if method == "sage":
            assert {f"loss/{name}" for name in DOMAINS} <= set(entry)


def test_sentence_transformers_micro_batches_make_the_batch(tmp_path):
    whole, cut = (sentences(True, sentence_pairs(), tmp_path, **c, **SAGE) for c in ({}, CUT))
    assert max(relative_differences(cut.model, whole.model, start=encoder())) <= ROUND_OFF


def test_sampling_that_a_base_does_itself_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"domain_sampling"):
        sentences(True, sentence_pairs(), tmp_path, domain_sampling="balanced", **SAGE)


def test_losses_of_sentence_transformers_with_weights_get_one_gradient(tmp_path):
    """SoftmaxLoss has a classifier of its own, in the optimizer and not in the model."""
    losses = pytest.importorskip("sentence_transformers.losses")

    def softmax(model: Any) -> nn.Module:
        set_seed(1)
        return losses.SoftmaxLoss(model, 32, num_labels=3)

    rows = [row | {"score": i % 3} for i, row in enumerate(sentence_pairs())]
    options = {"max_steps": 1, "max_grad_norm": 0.0, "domain_sampling": "natural", "loss": softmax}
    start = flat(softmax(encoder()).classifier)
    plain = flat(sentences(True, rows, tmp_path, method="erm", **options).loss.classifier) - start
    tiny = flat(sentences(True, rows, tmp_path, method="sam", rho=1e-7, **options).loss.classifier) - start
    assert (tiny - plain).norm() <= 1e-3 * plain.norm()


def test_sentence_transformers_without_duplicates_are_stock(tmp_path):
    """For in-batch negatives, the commonest of its losses."""
    losses = pytest.importorskip("sentence_transformers.losses")
    rows = without("score", sentence_pairs())
    options = {"batch_sampler": "no_duplicates", "loss": losses.MultipleNegativesRankingLoss}
    ours = sentences(True, rows, tmp_path, **options, **NOTHING)
    stock = sentences(False, without("domain", rows), tmp_path, **options)
    assert_same_bits(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize("split", ["tp_enabled", "cp_enabled", "sp_enabled"])
def test_split_gradients_are_refused_with_the_alternative(split):
    """Tensor, context and sequence parallelism; accelerate's own configuration wants GPUs to be made."""
    trainer = build(vit(), Rows(image_rows()))
    parallel = SimpleNamespace(tp_enabled=False, cp_enabled=False, sp_enabled=False)
    setattr(parallel, split, True)
    accelerator = SimpleNamespace(distributed_type="MULTI_GPU", parallelism_config=parallel)
    with pytest.raises(ValueError, match="accelerate launch --multi_gpu"):
        refuse_what_cannot_be_exact(trainer.args, accelerator, trainer.model, trainer.sage_method)
