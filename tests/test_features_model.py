"""Features of the model's side of Trainer beside the two-pass step: each is stock at ρ = γ = 0, and itself at ρ > 0."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import (
    CLASSES,
    SAGE,
    VOCABULARY,
    Rows,
    build,
    clip,
    entries,
    flat,
    image_rows,
    language_model,
    max_difference,
    relative_differences,
    resnet,
    text_rows,
    train,
    vit,
    weights,
    without,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_sage import SAGETrainer

# Every training begins with accelerate's gc.collect(): a quarter of a second, were what is imported by now not frozen.
gc.freeze()

NOTHING = {"method": "sage", "rho": 0.0, "gamma": 0.0, "domain_sampling": "natural"}
"""Nothing from nothing, on the batches of stock Trainer (law 1)."""

NOISY = {"method": "sage", "rho": 0.02, "gamma": 1.0}
"""Noise as large as the weights: what it reaches at all, it moves visibly."""

ROUND_OFF = 1e-5
"""Of fp32 sums taken in another order, relative to the way of the weights."""


def assert_is_stock(model: Callable[[], nn.Module], rows: Sequence[dict[str, Any]], **options: Any) -> Any:
    """Law 1 with a feature on: the same weights to the bit and the same log as `transformers.Trainer`'s."""
    ours = train(model(), Rows(rows), **NOTHING, **options)
    stock = train(model(), Rows(without("domain", rows)), trainer=Trainer, **options)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)
    assert max_difference(ours.model, model()) > 0
    return ours


class Watcher(SAGETrainer):
    """Notes how far each parameter is from where the update began, at every loss that is computed."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.passes = self.passes if hasattr(self, "passes") else []
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            now = self.model.named_parameters()
            self.passes.append({n: (p.detach() - self.start[n]).double().norm().item() for n, p in now})
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def perturbed_passes(self) -> list[dict[str, float]]:
        return [distances for distances in self.passes if any(distances.values())]


# ---- Gradient checkpointing ----

CHECKPOINTING = {
    "vit": (vit, image_rows, {}),
    "vit, reentrant": (vit, image_rows, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "language model": (language_model, text_rows, {}),
}


def forwards_of_a_layer(model: nn.Module) -> list[int]:
    """Counts how often the first transformer layer's normalisation is computed."""
    count = [0]
    first = next(m for m in model.modules() if "Norm" in type(m).__name__)
    first.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize("problem", CHECKPOINTING)
def test_gradient_checkpointing_is_stock(problem):
    model, rows, options = CHECKPOINTING[problem]
    assert_is_stock(lambda: model(dropout=0.2), rows(), gradient_checkpointing=True, **options)


@pytest.mark.parametrize(("problem", "same_dropout"), [*((p, False) for p in CHECKPOINTING), ("vit", True)])
def test_gradient_checkpointing_changes_nothing(problem, same_dropout):
    """Activations computed again in the backward pass, at θ + ε in the second, with the masks of their forward pass."""
    model, rows, options = CHECKPOINTING[problem]
    on, off = model(dropout=0.2), model(dropout=0.2)
    often, seldom = forwards_of_a_layer(on), forwards_of_a_layer(off)
    train(on, Rows(rows()), gradient_checkpointing=True, same_dropout=same_dropout, method="sam", **options)
    train(off, Rows(rows()), same_dropout=same_dropout, method="sam")
    assert often[0] > 1.5 * seldom[0]  # it really was on
    assert_same_bits(weights(on), weights(off))


@pytest.mark.parametrize("problem", CHECKPOINTING)
def test_gradient_checkpointing_goes_group_by_group(problem):
    """Activations are then computed anew where the joint pass would not see them; it is the same but for round-off."""
    model, rows, options = CHECKPOINTING[problem]
    on = train(model(), Rows(rows()), gradient_checkpointing=True, **options, **SAGE)
    off = train(model(), Rows(rows()), **SAGE)
    assert max(relative_differences(on.model, off.model, start=model())) <= ROUND_OFF


# ---- torch.compile ----


class Small(nn.Module):
    """Two layers and dropout, for compilers: graphs of transformers' models take them seconds."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        set_seed(0)
        self.layers = nn.Sequential(nn.Linear(768, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values.flatten(1))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


COMPILED = [
    pytest.param(Small, "eager", {"method": "sam"}, id="eager, sam"),
    pytest.param(lambda: Small(0.0), "aot_eager", SAGE, id="aot_eager, sage"),
    pytest.param(vit, "eager", SAGE, id="eager, sage, transformers"),
]


@pytest.mark.parametrize(("model", "backend", "options"), COMPILED)
def test_compiled_is_uncompiled(model, backend, options):
    torch._dynamo.reset()
    options = options | {"max_steps": 2}
    how = {"torch_compile": True, "torch_compile_backend": backend}
    compiled = train(model(), Rows(image_rows()), **how, **options)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    plain = train(model(), Rows(image_rows()), **options)
    # The compiled graph may sum in another order than the layers one by one.
    assert max(relative_differences(compiled.model, plain.model, start=model())) <= ROUND_OFF
    assert len(entries(compiled)) == len(entries(plain)) == 2
    for a, b in zip(entries(compiled), entries(plain), strict=True):
        assert a == pytest.approx(b, rel=ROUND_OFF, abs=1e-6)  # sharpness is a difference of two fp32 numbers near 1


def test_compiled_is_stock_compiled():
    torch._dynamo.reset()
    assert_is_stock(Small, image_rows(), torch_compile=True, torch_compile_backend="eager")


# ---- Parameters that do not take part ----


def partly_frozen() -> nn.Module:
    model = clip()
    for name, p in model.named_parameters():
        p.requires_grad_("layers" not in name)
    return model


def moved(model: nn.Module, start: nn.Module) -> set[str]:
    before = dict(start.named_parameters())
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("options", [NOISY, {"method": "sam"}], ids=["sage", "sam"])
def test_frozen_parameters_stay(options):
    trainer = build(partly_frozen(), Rows(image_rows()), trainer=Watcher, **options)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.05)  # Trainer's own would leave them out
    trainer.train()
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert not frozen & moved(trainer.model, partly_frozen())
    assert trainer.perturbed_passes
    for distances in trainer.perturbed_passes:
        assert not any(distances[name] for name in frozen)
        assert distances["classifier.weight"] > 0


def test_frozen_parameters_are_stock():
    assert_is_stock(partly_frozen, image_rows(), weight_decay=0.1)


class Thaw(TrainerCallback):
    """Unfreezes everything after the first update."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.requires_grad_(True)


def test_parameters_that_thaw_in_the_middle_join_in():
    """The optimizer holds them from the start, as it must in stock too."""
    trainer = build(partly_frozen(), Rows(image_rows()), trainer=Watcher, callbacks=[Thaw()], **SAGE)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.05)
    trainer.train()
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    passes = trainer.perturbed_passes
    assert passes[0][name] == 0
    assert passes[-1][name] > 0
    assert name in moved(trainer.model, partly_frozen())


@pytest.mark.parametrize("options", [NOISY, {"method": "sam"}], ids=["sage", "sam"])
def test_unused_parameters_stay(options):
    """The loss of CLIP's classifier does not depend on these: no gradient, so neither ε nor noise."""
    trainer = train(clip(), Rows(image_rows()), trainer=Watcher, **options)
    unused = {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    everything = {name for name, _ in trainer.model.named_parameters()}
    if "gamma" in options:  # the key bias has a zero gradient, which SAM leaves as it is and noise does not
        assert everything - moved(trainer.model, clip()) == unused
    else:
        assert not unused & moved(trainer.model, clip())
    assert not any(distances[name] for distances in trainer.perturbed_passes for name in unused)


# ---- Tied weights ----


def tied(tie: bool = True) -> nn.Module:
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, tie_word_embeddings=tie))


def test_tied_weights_are_one_parameter():
    """SAM's ε has length ρ over all parameters; an embedding counted or moved twice would make it longer."""
    trainer = train(tied(), Rows(text_rows()), trainer=Watcher, method="sam", rho=0.05)
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    assert trainer.perturbed_passes
    for distances in trainer.perturbed_passes:
        length = sum(d**2 for d in distances.values()) ** 0.5
        assert length == pytest.approx(0.05, rel=1e-4)  # of θ + ε − θ in fp32
        assert distances["model.embed_tokens.weight"] > 0


def test_tied_weights_move_by_one_singular_step():
    trainer = train(tied(), Rows(text_rows()), trainer=Watcher, max_steps=1, polar="svd", **SAGE)
    start = dict(tied().named_parameters())["model.embed_tokens.weight"].double()
    # Every singular direction by ρ‖W‖_F: of the 32 of a 64×32 matrix, all.
    expected = SAGE["rho"] * start.norm().item() * min(start.shape) ** 0.5
    assert trainer.perturbed_passes[0]["model.embed_tokens.weight"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_stock(tie):
    assert_is_stock(lambda: tied(tie), text_rows())


# ---- BatchNorm, and other state in buffers ----


class Normed(nn.Module):
    """A small network with BatchNorm, in any dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        set_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)
        ).to(dtype)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def test_batchnorm_is_textbook_sam():
    """In fp64: the gradient at θ + ε, and the running statistics of one forward pass at θ."""
    rows = [row | {"pixel_values": row["pixel_values"].double()} for row in image_rows(12)]
    options = {"method": "sam", "rho": 0.05, "max_steps": 1, "max_grad_norm": 0.0}
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}
    ours = train(Normed(torch.float64), Rows(rows), **options, **order).model

    model = Normed(torch.float64)
    batch = {"pixel_values": torch.stack([r["pixel_values"] for r in rows])}
    batch["labels"] = torch.tensor([r["labels"] for r in rows])
    theta = list(model.parameters())
    gradient = torch.autograd.grad(model(**batch)["loss"], theta)
    statistics = [b.clone() for b in model.buffers()]
    length = torch.cat([g.reshape(-1) for g in gradient]).norm()
    start = [p.detach().clone() for p in theta]
    with torch.no_grad():
        for p, g in zip(theta, gradient, strict=True):
            p += 0.05 * g / length
    final = torch.autograd.grad(model(**batch)["loss"], theta)
    for p, at, g in zip(ours.parameters(), start, final, strict=True):
        assert torch.allclose(p, at - 0.05 * g, rtol=0, atol=1e-12)  # the learning rate is 0.05 too; fp64 round-off
    for ours_, b in zip(ours.buffers(), statistics, strict=True):
        assert torch.allclose(ours_, b, rtol=1e-12)


@pytest.mark.parametrize("model", [resnet, Normed])
def test_batchnorm_is_stock(model):
    assert_is_stock(model, image_rows(), eval_strategy="steps", eval_steps=1, eval_dataset=Rows(image_rows(5, seed=2)))


def test_batchnorm_of_a_group_of_one_row_is_an_error_with_the_cure():
    """Stock trains on these 4 rows; cut into groups, some of a single row have no variance."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layers(pixel_values)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    train(Dense(), Rows(image_rows()), per_device_train_batch_size=4, trainer=Trainer, remove_unused_columns=True)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # what it says is checked below
        train(Dense(), Rows(image_rows()), per_device_train_batch_size=4, **SAGE)
    notes = " ".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "per_device_train_batch_size" in notes


class Spectral(nn.Module):
    """Spectral normalisation keeps the vectors of its power iteration in buffers, and moves them in each forward."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(768, CLASSES))

    def forward(self, pixel_values: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> Any:
        logits = self.layer(pixel_values.flatten(1))
        loss = cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / (len(labels) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


def test_the_second_pass_leaves_other_buffers_alone():
    def buffers(rho: float) -> list[Tensor]:
        options = {"method": "sage", "rho": rho, "gamma": 1e-3, "max_steps": 1}
        return list(train(Spectral(), Rows(image_rows()), **options).model.buffers())

    assert_same_bits(buffers(rho=0.1), buffers(rho=0.0))


def test_other_buffers_are_stock_over_micro_batches():
    assert_is_stock(Spectral, image_rows(), per_device_train_batch_size=4, gradient_accumulation_steps=3)


# ---- Models that are none of transformers' ----


class Plain(nn.Module):
    """Returns its loss in any of the forms that Trainer takes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        set_seed(0)
        self.form = form
        self.layer = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layer(pixel_values.flatten(1))
        loss = cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.form == "dict" else (loss, logits)


class PlainWithMore(Plain):
    """Takes any further arguments, and so `num_items_in_batch`, and forgets them."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        return super().forward(pixel_values, labels)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_plain_modules_are_stock(form, n):
    """Over micro-batches too, for a forward without ``**kwargs``: there stock accumulates rightly."""
    cut = {"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n}
    assert_is_stock(lambda: Plain(form), image_rows(), **cut)


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}, {"method": "erm"}], ids=["sage", "sam", "erm"])
def test_plain_modules_are_one_whatever_they_return_and_take(options):
    order = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}

    def trained(model: nn.Module, n: int) -> nn.Module:
        cut = {"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n}
        return train(model, Rows(image_rows()), **cut, **order, **options).model

    whole = trained(Plain("dict"), 1)
    assert_same_bits(weights(trained(Plain("tuple"), 1)), weights(whole))
    assert_same_bits(weights(trained(PlainWithMore("tuple"), 1)), weights(whole))
    for model in (Plain("tuple"), PlainWithMore("dict")):
        assert max(relative_differences(trained(model, 3), whole, start=Plain("dict"))) <= ROUND_OFF


# ---- Losses without labels ----


def contrastive(dropout: float = 0.0) -> nn.Module:
    """CLIP as it is pre-trained: images against texts, rows of a batch against each other."""
    set_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"attention_dropout": dropout}
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(vision_config=tower | {"image_size": 16, "patch_size": 8}, text_config=text))


def captioned() -> list[dict[str, Any]]:
    pairs = zip(image_rows(), text_rows(), strict=True)
    return [without("labels", [image])[0] | {"input_ids": text["input_ids"]} for image, text in pairs]


def with_return_loss(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return default_data_collator(rows) | {"return_loss": True}


def test_contrastive_losses_are_stock():
    assert_is_stock(lambda: contrastive(dropout=0.2), captioned(), data_collator=with_return_loss)


@pytest.mark.parametrize("options", [SAGE, {"method": "sam"}], ids=["sage", "sam"])
def test_contrastive_losses_train(options):
    """SAGE contrasts the rows of a domain with each other alone; SAM those of the batch."""
    trainer = train(contrastive(), Rows(captioned()), data_collator=with_return_loss, **options)
    assert all(entry["perturbed_loss"] > entry["loss"] for entry in entries(trainer))
    assert flat(trainer.model).isfinite().all()


# ---- NEFTune ----


def test_neftune_is_stock():
    ours = assert_is_stock(language_model, text_rows(), neftune_noise_alpha=5.0)
    without_it = train(language_model(), Rows(text_rows()), **NOTHING)
    assert max_difference(ours.model, without_it.model) > 0
    assert not ours.model.get_input_embeddings()._forward_hooks  # taken off again


def test_neftune_draws_the_same_noise_in_both_passes_where_asked():
    def sharpness(same: bool) -> float:
        options = {"method": "sage", "rho": 1e-7, "same_dropout": same, "max_steps": 1, "neftune_noise_alpha": 500.0}
        return abs(entries(train(language_model(), Rows(text_rows()), **options))[0]["sharpness"])

    # At ρ = 1e-7 the loss can rise by ‖ε‖‖g‖, about 1e-6, only; other noise moves it further.
    assert sharpness(same=True) < 1e-5
    assert sharpness(same=False) > 1e-4


# ---- PEFT ----


def lora(dropout: float = 0.0, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = language_model()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**config | {"lora_dropout": dropout} | options))


def test_lora_is_stock():
    assert_is_stock(lambda: lora(dropout=0.2), text_rows())


def test_lora_perturbs_and_moves_the_adapters_alone(tmp_path):
    peft = pytest.importorskip("peft")
    options = NOISY | {"gamma": 1e-3, "max_steps": 4, "learning_rate": 1.0, "output_dir": str(tmp_path)}
    trainer = train(lora(), Rows(text_rows()), trainer=Watcher, **options)
    adapters = {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert moved(trainer.model, lora()) == adapters
    assert flat(trainer.model).isfinite().all()
    log = entries(trainer)
    # B starts at zero: ε_B = ρ‖B‖ polar(G) and the gradient of A are zero then, and are no longer after an update.
    assert log[0]["perturbation_norm"] == 0
    assert all(entry["perturbation_norm"] > 0 for entry in log[1:])
    assert {name for distances in trainer.perturbed_passes for name in distances if distances[name]} == adapters
    trainer.save_model(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(language_model(), tmp_path / "adapter")
    assert_same_bits(weights(loaded), weights(trainer.model))


@pytest.mark.parametrize("init", ["gaussian", "olora", {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_variants_of_lora_train(init):
    options = init if isinstance(init, dict) else {"init_lora_weights": init}
    trainer = train(lora(**options), Rows(text_rows()), trainer=Watcher, **SAGE)
    assert flat(trainer.model).isfinite().all()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved(trainer.model, lora(**options)) == trained


def test_lora_with_gradient_checkpointing_changes_nothing():
    on, off = (train(lora(), Rows(text_rows()), gradient_checkpointing=on, **SAGE) for on in (True, False))
    assert max(relative_differences(on.model, off.model, start=lora())) <= ROUND_OFF


def test_lora_on_images():
    peft = pytest.importorskip("peft")

    def model() -> nn.Module:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(clip(), config)

    trainer = train(model(), Rows(image_rows()), **SAGE)
    assert all(entry["perturbation_norm"] > 0 for entry in entries(trainer))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved(trainer.model, model()) == trained
