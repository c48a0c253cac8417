"""Tiny models and data of the trainer's tests, and the ways to train them and to compare what came out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_sage import SAGEConfig, SAGEMixin, SAGETrainer

CLASSES = 5
VOCABULARY = 64
DOMAINS = ("photo", "art", "photo", "sketch")
"""The domains of consecutive rows, over and over: half photos, a quarter art, a quarter sketches."""

SAGE = {"method": "sage", "rho": 0.02, "gamma": 1e-3}
"""Radius and noise large enough that a test sees what either does to the weights."""

TRAINING = {
    "per_device_train_batch_size": 12,
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
TRAINER_ARGUMENTS = ("eval_dataset", "data_collator", "compute_metrics", "compute_loss_func", "callbacks")

_OUTPUT = tempfile.TemporaryDirectory()

_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


# ---- Models ----


def clip(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    vision = _TOWER | {"image_size": 16, "patch_size": 8, "attention_dropout": dropout}
    config = CLIPConfig(vision_config=vision, text_config=_TOWER | {"vocab_size": 8}, num_labels=CLASSES)
    return CLIPForImageClassification(config)


def vit(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    config = ViTConfig(**_TOWER, image_size=16, patch_size=8, hidden_dropout_prob=dropout, num_labels=CLASSES)
    return ViTForImageClassification(config)


def resnet(**_: float) -> nn.Module:
    """Has BatchNorm, and no dropout whatever is asked for."""
    set_seed(0)
    shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=CLASSES))


def language_model(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_TOWER, vocab_size=VOCABULARY, attention_dropout=dropout))


# ---- Data ----


class Rows(torch.utils.data.Dataset):
    """A map-style dataset that is nothing but a list of rows."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def image_rows(rows: int = 24, domains: Sequence[Any] = DOMAINS, seed: int = 1) -> list[dict[str, Any]]:
    """Images of noise with labels at random: nothing here is about learning well."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 16, 16, generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator).tolist()
    return [
        {"pixel_values": image, "labels": label, "domain": domains[i % len(domains)]}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def text_rows(rows: int = 24, unlabelled: int = 0, seed: int = 1) -> list[dict[str, Any]]:
    """Sequences of 10 tokens of which some, 0 to 8, are ignored; of the first ``unlabelled`` rows all are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows, 10), generator=generator)
    labels = tokens.clone()
    for i, prompt in enumerate(torch.randint(0, 9, (rows,), generator=generator).tolist()):
        labels[i, : 10 if i < unlabelled else prompt] = -100
    return [{"input_ids": tokens[i], "labels": labels[i], "domain": DOMAINS[i % len(DOMAINS)]} for i in range(rows)]


def hub_dataset(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """The rows as a `datasets.Dataset`."""
    plain = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
    return datasets.Dataset.from_list(plain)


def without(column: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


# ---- Training ----


def build(model: nn.Module, data: Any, *, trainer: type[Trainer] = SAGETrainer, **options: Any) -> Any:
    """A trainer; ``options`` are its own arguments and fields of its arguments class, over `TRAINING`."""
    given = {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    config = SAGEConfig if issubclass(trainer, SAGEMixin) else TrainingArguments
    arguments = config(**({"output_dir": _OUTPUT.name} | TRAINING | options))
    return trainer(model, arguments, train_dataset=data, **given)


def train(model: nn.Module, data: Any, *, resume: str | None = None, **options: Any) -> Any:
    """A trainer, trained."""
    trainer = build(model, data, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer: Trainer, key: str = "loss") -> list[dict[str, float]]:
    """The log entries that hold ``key``: by default those of training steps."""
    return [entry for entry in trainer.state.log_history if key in entry]


# ---- Comparison ----


def weights(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return list(model.state_dict().values())


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters, as one fp64 vector."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def max_difference(a: nn.Module, b: nn.Module) -> float:
    return (flat(a) - flat(b)).abs().max().item()


def relative_differences(a: nn.Module, b: nn.Module, start: nn.Module) -> tuple[float, float]:
    """The largest and the mean |Δ| of two trained models, in units of the largest and the mean way they came.

    The mean beside the largest shows a small error in every weight, e.g. a micro-batch that was dropped.
    """
    difference, way = (flat(a) - flat(b)).abs(), (flat(b) - flat(start)).abs()
    assert way.max() > 0, "nothing was trained, so nothing is compared"
    return (difference.max() / way.max()).item(), (difference.mean() / way.mean()).item()
