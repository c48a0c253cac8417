"""What the steps are measured on: a CLIP vision tower with a linear head and random images of K groups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPForImageClassification

from hf_sage.engine import Part
from hf_sage.engine.joint import Joint, Verdict
from hf_sage.engine.step import trainable

CLASSES = 7
"""As many as PACS has."""


@dataclass(frozen=True)
class Tower:
    """Shape of a vision tower; its MLP is four times as wide as its tokens."""

    hidden: int
    layers: int
    heads: int
    patch: int
    pixels: int = 224

    def build(self) -> nn.Module:
        """The tower under a linear head, with random weights."""
        vision = {
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "patch_size": self.patch,
            "image_size": self.pixels,
        }
        model: nn.Module = CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=CLASSES))
        # The head reads the patch tokens: what only the pooled output goes through gets no gradient.
        model.get_submodule("vision_model.post_layernorm").requires_grad_(False)
        return model.train()


TOWERS = {
    "vit_b_16": Tower(hidden=768, layers=12, heads=12, patch=16),
    "vit_l_14": Tower(hidden=1024, layers=24, heads=16, patch=14),
    "clip_384x6": Tower(hidden=384, layers=6, heads=6, patch=16),
    "toy": Tower(hidden=16, layers=2, heads=2, patch=8, pixels=16),
}
"""Shapes by the name that ``--model`` takes."""


@dataclass(frozen=True)
class Setting:
    """How everything is measured, from the command line.

    Attributes:
        device: Where.
        dtype: ``"fp32"``, ``"tf32"`` (products only, on a GPU), or ``"bf16"`` (autocast over fp32 parameters).
        compile: Whether the network goes through ``torch.compile``.
        model: A name in `TOWERS`, or ``None`` for the one that each row is defined on.
        repetitions: Rounds that count.
        seed: Seed of weights, images and orders.
        quick: Whether to run at toy size.
    """

    device: torch.device
    dtype: str = "fp32"
    compile: bool = False
    model: str | None = None
    repetitions: int = 3
    seed: int = 0
    quick: bool = False

    def tower(self, default: str) -> str:
        """The name of the tower to measure on."""
        return "toy" if self.quick else self.model or default

    def rows(self, default: int) -> int:
        """How many images of each group to measure on."""
        return 2 if self.quick else default


class Workload:
    """A network, and one batch of ``groups`` × ``rows`` images.

    Attributes:
        network: The network itself.
        parameters: Its trainable parameters.
        groups: Number of groups K.
        images: The batch, group after group.
        labels: Its labels.
        verdict: What the engine has found out about the network.
    """

    def __init__(self, setting: Setting, tower: str, groups: int, rows: int) -> None:
        torch.manual_seed(setting.seed)
        shape = TOWERS[tower]
        self.network = shape.build().to(setting.device)
        self.parameters = trainable(self.network)
        self.groups = groups
        self.verdict = Verdict()
        self._rows = rows
        self._forward: Callable[..., Any] = torch.compile(self.network) if setting.compile else self.network
        self.images = torch.randn(groups * rows, 3, shape.pixels, shape.pixels, device=setting.device)
        self.labels = torch.randint(CLASSES, (groups * rows,), device=setting.device)
        self._passes: Callable[[], AbstractContextManager[Any]] = (
            partial(torch.autocast, setting.device.type, torch.bfloat16) if setting.dtype == "bf16" else nullcontext
        )

    def group_losses(self) -> Tensor:
        """Mean loss of each group, by one forward pass over all rows; shape ``(K,)``."""
        return self.row_losses().view(self.groups, self._rows).mean(1)

    def row_losses(self) -> Tensor:
        """Loss of each row, group after group."""
        return self._losses(slice(None), "none")

    def loss(self) -> Tensor:
        """Mean loss over all rows."""
        return self._losses(slice(None))

    def parts(self) -> list[Part]:
        """The batch as `hf_sage.engine` takes it: a part for each group."""
        return [Part(k, 1 / self.groups, partial(self._share, k)) for k in range(self.groups)]

    def whole(self) -> list[Part]:
        """The batch in one part, for methods that need no groups."""
        return [Part("all", 1.0, self.loss)]

    def joint(self) -> Joint:
        """The batch as `hf_sage.engine` takes it at once, beside its parts."""
        return Joint([(k, self._rows) for k in range(self.groups)], self.loss, self.verdict)

    def clear(self) -> None:
        """Drops the gradients."""
        for p in self.parameters:
            p.grad = None

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one copy of the trainable parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    def _share(self, group: int) -> Tensor:
        return self._losses(slice(group * self._rows, (group + 1) * self._rows)) / self.groups

    def _losses(self, rows: slice, reduction: str = "mean") -> Tensor:
        with self._passes():
            logits = self._forward(pixel_values=self.images[rows]).logits
        return cross_entropy(logits.float(), self.labels[rows], reduction=reduction)
