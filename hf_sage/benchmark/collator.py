"""Images go through the transform of what they are used for: training, validation or test."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hf_sage.data import ImageCollator, image_transforms

USE = "use"
"""Column of evaluated rows. Rows without it are trained on."""

USES = ("validation", "test")
"""What it holds: of rows of source domains, and of held-out ones."""


class CollatorByUse:
    """Decodes, transforms, processes and batches rows of images and labels.

    Args:
        processor: An image processor of transformers.
        transform: Name of the transforms, see `hf_sage.data.image_transforms`.

    Attributes:
        training: Collates the rows trained on; give it to `hf_sage.data.callback.DrawsCallback`, so that a restart
            draws the same. Evaluation draws from torch's generator, whose state is in every checkpoint.
    """

    def __init__(self, processor: Any, transform: str) -> None:
        chosen = image_transforms(transform, processor)
        augments = {"train": chosen.train, "validation": chosen.validation, "test": chosen.test}
        self._collators = {use: ImageCollator(processor, augment=own) for use, own in augments.items()}
        self.training = self._collators["train"]

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns ``pixel_values`` and ``labels``, the rows in their order."""
        parts = [self._collators[use](list(rows)) for use, rows in groupby(features, lambda row: row.get(USE, "train"))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
