"""Fishr: the gradients of the classifier are to vary alike in every group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from hf_sage.objectives.base import FeatureObjective, Rows
from hf_sage.rules import Need, Step


@dataclass(frozen=True)
class Fishr(FeatureObjective):
    """Adds λ · mean_k ‖v_k − v̄‖²/d, v_k being the variance over a group's rows of the classifier's gradients.

    Rame, Dancette & Cord 2022, arXiv 2109.02934, eqs. 4 and 5. For a linear classifier the gradient of a row is
    (softmax(z) − onehot(y)) ⊗ (features, 1): no per-sample backward pass is needed. The variances are averaged over
    steps by v ← (ema·v + (1 − ema)·v_now)/(1 − emaᵗ), the average that the paper means; its code divides the whole sum
    by 1 − ema, which makes v about 1/(1 − ema) times as large and the penalty's gradient with it. Multiply λ by 20 for
    that at the default ema.

    Attributes:
        penalty: λ ≥ 0, default 1000 (the paper's and DomainBed's).
        warmup: Updates without the penalty, default 1500 (DomainBed).
        ema: Weight of the past, default 0.95.
    """

    penalty: float = 1000.0
    warmup: int = 1500
    ema: float = 0.95

    delayed_by: ClassVar[str | None] = "warmup"
    needs = FeatureObjective.needs | frozenset[Need]({"memory"})

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`.

        Raises:
            ValueError: If the classifier is not linear.
        """
        _check_linear(head)
        variances = []
        for name, rows in groups.items():
            logits = head(rows.features)
            error = softmax(logits, dim=-1) - one_hot(rows.labels, logits.shape[-1]).to(logits.dtype)
            inputs = torch.cat([rows.features, rows.features.new_ones(len(rows.features), 1)], dim=1)
            gradients = (error.unsqueeze(2) * inputs.to(error.dtype).unsqueeze(1)).flatten(1)
            variance = gradients.var(0, correction=0)
            past, age = step.memory.get(f"variance/{name}"), int(step.memory.get(f"age/{name}", 0))
            mean = (1 - self.ema) * variance + (self.ema * past.to(variance) if past is not None else 0)
            step.memory[f"variance/{name}"] = mean.detach()
            step.memory[f"age/{name}"] = age + 1
            variances.append(mean / (1 - self.ema ** (age + 1)))
        stacked = torch.stack(variances)
        scale = self.penalty if step.number >= self.warmup else 0.0
        return scale * (stacked - stacked.mean(0)).square().mean()


def _check_linear(head: object) -> None:
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    if not all(isinstance(layer, nn.Linear | nn.Flatten | nn.Dropout | nn.Identity) for layer in layers):
        raise ValueError(
            f"Fishr takes the gradients of a linear classifier in closed form; this one is a {type(head).__name__}. "
            "Use a model with a linear head, or name the last linear layer by classifier=... ."
        )
