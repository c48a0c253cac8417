"""SAGEConfig: fields and defaults, command lines, serialisation, refusals; and what SAGEMixin combines with."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from torch import nn
from training import DOMAINS, SAGE, TRAINING, Rows, accuracy, clip, entries, image_rows, train, vit, weights
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_sage import SAGEArguments, SAGEConfig, SAGEMixin, SAGETrainer
from hf_sage.ascents import L2Ascent, SpectralAscent
from hf_sage.corrections import AgreementNoise
from hf_sage.methods import METHODS, Method
from hf_sage.polar import PRESETS

DEFAULTS = {
    "method": "sage",
    "rho": None,
    "gamma": None,
    "method_options": None,
    "ascent_interval": 1,
    "classifier": None,
    "polar": "auto",
    "polar_steps": 5,
    "bias_radius": "fixed",
    "weight_scale": True,
    "domain_column": "domain",
    "domain_sampling": "balanced",
    "perturbation_scope": "global",
    "same_dropout": False,
    "full_precision_passes": False,
}


def config(**fields: Any) -> SAGEConfig:
    return SAGEConfig("out", report_to=[], use_cpu=True, **fields)


# ---- Fields ----


def test_fields_and_defaults():
    ours = set(inspect.signature(SAGEConfig).parameters) - set(inspect.signature(TrainingArguments).parameters)
    assert ours == set(DEFAULTS)
    assert {name: getattr(config(), name) for name in DEFAULTS} == DEFAULTS


def test_default_method_is_the_papers():
    method = config().build_method()
    assert method == Method("sage", SpectralAscent(1e-6, "auto", 5, "fixed", True), (AgreementNoise(1e-6),))
    assert config(method="sam").build_method() == Method("sam", L2Ascent(0.05))
    assert config(method="erm").build_method().is_plain


def test_fields_reach_the_method():
    fields = {"rho": 0.1, "polar": "svd", "polar_steps": 7, "bias_radius": "norm", "weight_scale": False}
    method = config(gamma=0.2, **fields).build_method()
    assert method.ascent == SpectralAscent(**fields)
    assert method.corrections == (AgreementNoise(0.2),)


def test_positional_output_dir_and_the_parents_own_checks():
    assert SAGEConfig("out", use_cpu=True).output_dir == "out"
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        config(load_best_model_at_end=True, save_strategy="steps")


# ---- Refusals ----


@pytest.mark.parametrize("field", ["rho", "gamma"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf])
def test_radius_and_noise_are_finite_and_not_negative(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be a finite number, 0 or more; got {value}"):
        config(**{field: value})
    with pytest.raises(ValueError, match="rho must be"):
        config(method="sam", rho=value)


CHOICES = {
    "method": list(METHODS),
    "polar": list(PRESETS),
    "bias_radius": ["fixed", "norm"],
    "domain_sampling": ["balanced", "natural"],
    "perturbation_scope": ["global", "local"],
}


@pytest.mark.parametrize("method", ["sage", "erm"])
@pytest.mark.parametrize("field", CHOICES)
def test_unknown_values_are_refused_with_the_known_ones(field, method):
    with pytest.raises(ValueError, match=rf"{field}.*'bogus'") as error:
        config(**({"method": method} | {field: "bogus"}))
    assert all(f"'{choice}'" in str(error.value) for choice in CHOICES[field])


@pytest.mark.parametrize("method", ["sage", "erm"])
def test_polar_needs_a_step(method):
    with pytest.raises(ValueError, match="polar_steps must be a whole number, 1 or more; got 0"):
        config(method=method, polar_steps=0)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("erm", {"rho": 0.1}, "'erm' has no rho.*no hyperparameters"),
        ("erm", {"rho": 0.0, "gamma": 0.1}, "'erm' has no rho and no gamma"),
        ("sam", {"gamma": 0.1}, "'sam' has no gamma.*takes rho"),
        (Method("own", L2Ascent(0.1)), {"rho": 0.1}, "rho cannot be set beside a Method object"),
    ],
)
def test_hyperparameters_that_a_method_has_not(method, fields, message):
    with pytest.raises(ValueError, match=message):
        config(method=method, **fields)


@pytest.mark.parametrize("interval", [0, 2.5, "2", True])
def test_an_interval_is_a_whole_number(interval):
    with pytest.raises(ValueError, match=f"ascent_interval must be a whole number, 1 or more; got {interval!r}"):
        Method("own", L2Ascent(0.1), ascent_interval=interval)


# ---- Command lines and serialisation ----


def parse(*flags: str) -> SAGEConfig:
    return HfArgumentParser(SAGEConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *flags])[0]


def test_flags_become_fields():
    assert {name: getattr(parse(), name) for name in DEFAULTS} == DEFAULTS
    given = {"method": "sage", "rho": 1e-3, "gamma": 0.0, "polar": "muon", "polar_steps": 3, "bias_radius": "norm"}
    given |= {"weight_scale": False, "domain_column": "source", "domain_sampling": "natural"}
    given |= {"perturbation_scope": "local", "same_dropout": True}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert {name: getattr(parse(*flags), name) for name in given} == given


@pytest.mark.parametrize("word", ["none", "None"])
def test_no_domain_column_from_the_command_line(word):
    assert parse("--domain_column", word).domain_column is None


def test_command_line_lists_what_is_allowed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in DEFAULTS)
    with pytest.raises(SystemExit):
        parse("--perturbation_scope", "bogus")
    assert "local" in capsys.readouterr().err


@dataclass
class CombinedArguments(SAGEArguments, Seq2SeqTrainingArguments):
    """The arguments of another trainer with SAGE's."""


@pytest.mark.parametrize("kind", [SAGEConfig, CombinedArguments])
def test_arguments_are_written_as_json(kind):
    own = Method("own", L2Ascent(0.1), (AgreementNoise(0.1),))
    for method, name in (("sam", "sam"), (own, "own")):
        arguments = kind(output_dir="out", report_to=[], use_cpu=True, method=method, domain_column=None)
        assert arguments.to_dict()["method"] == name
        assert json.loads(arguments.to_json_string())["domain_column"] is None
        assert arguments.to_sanitized_dict()["method"] == name


def test_dictionary_makes_the_same_arguments_again():
    arguments = config(rho=1e-3, domain_sampling="natural", method="sam")
    again = SAGEConfig(**{name: value for name, value in arguments.to_dict().items() if name in DEFAULTS})
    assert {name: getattr(again, name) for name in DEFAULTS} == {name: getattr(arguments, name) for name in DEFAULTS}


# ---- Trainer ----


def test_plain_arguments_get_the_defaults(tmp_path):
    plain = TrainingArguments(**TRAINING, output_dir=str(tmp_path))
    trainer = SAGETrainer(vit(), plain, train_dataset=Rows(image_rows()))
    assert trainer.sage_method == METHODS["sage"]()
    trainer.train()
    assert_same_bits(weights(trainer.model), weights(train(vit(), Rows(image_rows())).model))
    assert entries(trainer, "agreement")


def test_arguments_come_in_the_order_of_trainer(tmp_path):
    model, collator, rows = vit(), default_data_collator, Rows(image_rows())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    arguments = SAGEConfig(str(tmp_path), report_to=[], use_cpu=True)
    given = {
        "model": model,
        "args": arguments,
        "data_collator": collator,
        "train_dataset": rows,
        "eval_dataset": Rows(image_rows(6)),
        "processing_class": None,
        "model_init": None,
        "compute_loss_func": lambda *_: None,
        "compute_metrics": accuracy,
        "callbacks": [TrainerCallback()],
        "optimizers": (optimizer, schedule),
        "optimizer_cls_and_kwargs": None,
        "preprocess_logits_for_metrics": lambda logits, _: logits,
    }
    assert list(given) == list(inspect.signature(Trainer.__init__).parameters)[1:]
    trainer = SAGETrainer(*given.values())
    found = {name: getattr(trainer, name) for name in given if hasattr(trainer, name)}
    found |= {"data_collator": trainer.data_collator.collator, "optimizers": (trainer.optimizer, trainer.lr_scheduler)}
    assert {name: found[name] for name in found if name in given} == {name: given[name] for name in found}
    assert given["callbacks"][0] in trainer.callback_handler.callbacks


def test_own_method_object():
    own = Method("own", SpectralAscent(SAGE["rho"]), (AgreementNoise(SAGE["gamma"]),))
    trainer = train(clip(), Rows(image_rows()), method=own)
    assert trainer.sage_method is own
    assert_same_bits(weights(trainer.model), weights(train(clip(), Rows(image_rows()), **SAGE).model))


class SAGESeq2SeqTrainer(SAGEMixin, Seq2SeqTrainer):
    """SAGE on top of another subclass of Trainer."""


def test_mixin_on_top_of_another_trainer(tmp_path):
    set_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    tokens = torch.arange(120).view(12, 10) % 32
    rows = Rows([{"input_ids": t, "labels": t[:4], "domain": DOMAINS[i % 4]} for i, t in enumerate(tokens)])
    options = TRAINING | SAGE | {"output_dir": str(tmp_path), "predict_with_generate": True, "generation_max_length": 5}
    trainer = SAGESeq2SeqTrainer(
        model,
        CombinedArguments(**options),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"length": float(prediction.predictions.shape[1])},
    )
    trainer.train()
    assert all(entry["perturbation_norm"] > 0 and "agreement" in entry for entry in entries(trainer))
    metrics = trainer.evaluate()
    assert metrics["eval_art_length"] == metrics["eval_length"] > 4  # generated tokens, not logits


class Doubled(SAGETrainer):
    """A subclass with a loss of its own."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}, {"method": "erm"}])
def test_own_loss_is_the_one_that_is_trained_on(options):
    own, plain = (entries(train(vit(), Rows(image_rows()), trainer=t, **options))[0] for t in (Doubled, SAGETrainer))
    # The directions of ascent do not depend on the loss' scale, so all but round-off doubles.
    for key in {"loss", "perturbed_loss", "grad_norm"} & set(plain):
        assert own[key] == pytest.approx(2 * plain[key], rel=1e-5)
    assert {"perturbed_loss", "agreement"} & set(plain) or options["method"] == "erm"


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match=r"write class Backwards\(SAGEMixin, Trainer\)"):
        type("Backwards", (Trainer, SAGEMixin), {})
    assert issubclass(type("Forwards", (SAGEMixin, Trainer), {}), SAGEMixin)
