"""Image classifiers: any checkpoint of transformers, or a tiny CLIP that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessorPil,
)

__all__ = ["TINY_CLIP", "image_classifier", "tiny_clip"]

TINY_CLIP = "tiny-clip"
"""The name of the model that needs no download: a CLIP vision tower of transformers with random weights."""


def image_classifier(name: str, labels: Sequence[str]) -> tuple[Any, Any]:
    """A classifier for the given labels and its image processor.

    Args:
        name: A checkpoint by Hub name or path, or ``"tiny-clip"``.
        labels: The class names, in the order of the label integers.

    Returns:
        The model (its head new where the checkpoint has another number of classes) and the processor (on Pillow).
    """
    if name == TINY_CLIP:
        return tiny_clip(labels)
    model = AutoModelForImageClassification.from_pretrained(
        name, num_labels=len(labels), ignore_mismatched_sizes=True, **_label_maps(labels)
    )
    return model, AutoImageProcessor.from_pretrained(name, backend="pil")


def tiny_clip(labels: Sequence[str], image_size: int = 16) -> tuple[CLIPForImageClassification, CLIPImageProcessorPil]:
    """A CLIP vision tower of 3 layers and width 64 on 4 × 4 patches, with a linear head on the mean patch token.

    The weights are random: seed torch before for the same model. Its processor scales to ``image_size`` and normalises
    to mean 0.5 and standard deviation 0.25.
    """
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 4,
    }
    # The classifier drops the text tower; its config is kept as small as it gets.
    text = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = CLIPConfig(vision_config=vision, text_config=text, num_labels=len(labels), **_label_maps(labels))
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return CLIPForImageClassification(config), processor


def _label_maps(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
