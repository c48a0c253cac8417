"""DANN and CDANN: a discriminator is not to tell from the features which group a row is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_sage.objectives.base import FeatureObjective, Rows
from hf_sage.rules import Memory, Need, Step


@dataclass(frozen=True)
class DANN(FeatureObjective):
    """Adds −λ times a discriminator's cross entropy, which is minimised over the discriminator in the same step.

    Ganin et al. 2016, arXiv 1505.07818, eqs. 9–15: one update of the discriminator on the features as they are, and the
    reversed gradient into the network. DomainBed alternates instead, so that half of its updates leave the network
    alone; here every update is one of the network. The discriminator, a perceptron with two hidden layers, and its Adam
    are remembered from step to step; the groups are told apart by their order.

    Attributes:
        penalty: λ ≥ 0, default 1 (DomainBed's ``lambda``).
        conditional: Whether features are joined by an embedding of the label, and rows are weighed so that every class
            counts the same: CDANN (Li et al. 2018, "Deep Domain Generalization via Conditional Invariant Adversarial
            Networks").
        width: Units of a hidden layer, default 256 (DomainBed's ``mlp_width``).
        discriminator_learning_rate: Of the discriminator's Adam, default 5e-5, β₁ = 0.5 (DomainBed's ``lr_d`` and
            ``beta1``).
    """

    penalty: float = 1.0
    conditional: bool = False
    width: int = 256
    discriminator_learning_rate: float = 5e-5

    needs = FeatureObjective.needs | frozenset[Need]({"memory"})

    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """See `FeatureObjective`. The discriminator is updated in the step's clean pass, where its memory is kept."""
        features = torch.cat([rows.features for rows in groups.values()])
        labels = torch.cat([rows.labels for rows in groups.values()])
        group = torch.cat([torch.full_like(rows.labels, k) for k, rows in enumerate(groups.values())])
        classes = head(features[:1].detach()).shape[-1]
        with torch.random.fork_rng(devices=[]):  # its layers draw weights that `_recall` replaces
            player = _Discriminator(features.shape[1], len(groups), classes if self.conditional else 0, self.width)
        player.to(features)
        optimizer = torch.optim.Adam(player.parameters(), lr=self.discriminator_learning_rate, betas=(0.5, 0.9))
        _recall(player, optimizer, step)

        weights = (
            _by_class(labels, classes)
            if self.conditional
            else torch.full_like(features[:, 0].detach(), 1 / len(labels))
        )
        with torch.enable_grad():
            own = (weights * cross_entropy(player(features.detach(), labels), group, reduction="none")).sum()
        found = torch.autograd.grad(own, list(player.parameters()))
        for p, g in zip(player.parameters(), found, strict=True):
            p.grad = g
        optimizer.step()
        step.memory["player"] = {name: value.detach().clone() for name, value in player.state_dict().items()}
        step.memory["optimizer"] = optimizer.state_dict()

        for p in player.parameters():
            p.requires_grad_(False)
        fooled = (weights * cross_entropy(player(features, labels), group, reduction="none")).sum()
        return -self.penalty * fooled


class _Discriminator(nn.Module):
    def __init__(self, features: int, groups: int, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, features) if classes else None
        layers = (nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, groups))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            features = features + self.embedding(labels)
        logits: Tensor = self.layers(features)
        return logits


def _recall(player: nn.Module, optimizer: torch.optim.Optimizer, step: Step) -> None:
    """Puts the discriminator and its optimizer where the last step left them, or begins them by the step's seed."""
    memory: Memory = step.memory
    held: dict[str, Any] | None = memory.get("player")
    if held is not None and [v.shape for v in held.values()] == [v.shape for v in player.state_dict().values()]:
        player.load_state_dict(held)
        optimizer.load_state_dict(deepcopy(memory["optimizer"]))  # which it would go on to write in
        return
    generator = torch.Generator().manual_seed(step.seed)
    with torch.no_grad():
        for p in player.parameters():  # uniform, as torch's own layers begin, but alike on all ranks and after restarts
            bound = 1 / max(p.shape[-1], 1) ** 0.5
            p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)


def _by_class(labels: Tensor, classes: int) -> Tensor:
    """Weights of the rows, summing to one, by which every class that occurs counts the same."""
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    weights = 1 / counts[labels].double()
    return (weights / weights.sum()).float()
