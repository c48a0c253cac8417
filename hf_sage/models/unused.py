"""Parameters that a model has and its logits do not depend on.

``CLIPForImageClassification`` never uses ``post_layernorm``, SigLIP's its pooling head, DINOv2's its mask token. They
get no gradient, and DistributedDataParallel stops at the second step unless it searches for them in every step
(``ddp_find_unused_parameters``, which Trainer turns off beside gradient checkpointing). Frozen they are no part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unused_parameters(model: Any, pixel_values: Tensor) -> list[str]:
    """The names of the trainable parameters that the logits of some images do not depend on.

    One forward pass without dropout and one backward; weights, gradients, running statistics and modes stay.

    Args:
        model: An image classifier of transformers.
        pixel_values: A batch of images, one is enough: of shape (rows, channels, height, width).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.enable_grad():
        total = model(pixel_values=pixel_values).logits.sum()
    for module, mode in modes.items():
        module.training = mode
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def freeze_unused(model: Any, pixel_values: Tensor) -> list[str]:
    """Freezes the parameters that `unused_parameters` finds; no training can tell the difference.

    Afterwards DistributedDataParallel needs no ``find_unused_parameters``, beside gradient checkpointing or not.

    Args:
        model: An image classifier of transformers.
        pixel_values: A batch of images, as for `unused_parameters`.

    Returns:
        The names of the parameters that were frozen.
    """
    names = unused_parameters(model, pixel_values)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
