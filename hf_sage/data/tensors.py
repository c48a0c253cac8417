"""Small sets whose images are processed once and kept as tensors."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_sage.data.images import decode_image


class TensorDomains(Dataset[dict[str, Tensor]]):
    """Processed images, labels and domains in memory; a row is a dictionary of tensors.

    Attributes:
        columns: ``pixel_values`` (rows, 3, height, width), ``labels`` and ``domain`` (rows,).
        features: The ClassLabels of ``labels`` and ``domain``.
    """

    def __init__(self, columns: dict[str, Tensor], features: datasets.Features) -> None:
        self.columns = columns
        self.features = features

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.columns.items()}


def preprocess(dataset: datasets.Dataset, processor: Any) -> TensorDomains:
    """Runs an image processor once over a small set without augmentation.

    Args:
        dataset: Columns ``image``, ``label`` and ``domain``; the latter two ClassLabels.
        processor: An image processor of transformers.

    Returns:
        The processed set; its images take 4 bytes a value in memory.
    """
    rows = dataset.with_format(None)
    images = [decode_image(image) for image in rows["image"]]
    columns = {
        "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
        "labels": torch.tensor(rows["label"][:]),
        "domain": torch.tensor(rows["domain"][:]),
    }
    features = datasets.Features(labels=dataset.features["label"], domain=dataset.features["domain"])
    return TensorDomains(columns, features)
