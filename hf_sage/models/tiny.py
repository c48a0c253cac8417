"""Tiny classifiers with random weights, for what needs no download."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessorPil,
    ConvNextConfig,
    ConvNextForImageClassification,
)

from hf_sage.models.labels import label_maps

TINY_CLIP = "tiny-clip"
"""A model that needs no download: a CLIP vision tower of transformers with random weights."""

TINY_CONVNEXT = "tiny-convnext"
"""Another: a ConvNeXt of transformers with random weights, which small images teach sooner than a transformer."""


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
    config = CLIPConfig(vision_config=vision, text_config=text, num_labels=len(labels), **label_maps(labels))
    model = CLIPForImageClassification(config)
    model.vision_model.post_layernorm.requires_grad_(False)  # the head does not use it: see hf_sage.models.unused
    return model, _processor(image_size)


def tiny_convnext(
    labels: Sequence[str], image_size: int = 16
) -> tuple[ConvNextForImageClassification, CLIPImageProcessorPil]:
    """A ConvNeXt of 3 stages, one block each, widths 16, 32 and 64, on 2 × 2 patches.

    It has neither layer scale nor dropped paths, and its weights are drawn wider than transformers' 0.02: those are for
    deep networks, and with them this one learns later. They are random: seed torch before for the same model. Its
    processor is `tiny_clip`'s.
    """
    config = ConvNextConfig(
        patch_size=2,
        num_stages=3,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_scale_init_value=0.0,  # none
        initializer_range=0.1,
        num_labels=len(labels),
        **label_maps(labels),
    )
    return ConvNextForImageClassification(config), _processor(image_size)


def _processor(image_size: int) -> CLIPImageProcessorPil:
    size = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)


TINY = {TINY_CLIP: tiny_clip, TINY_CONVNEXT: tiny_convnext}
"""The models that need no download, by name."""
