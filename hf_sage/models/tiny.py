"""A tiny CLIP classifier with random weights, for what needs no download."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import CLIPConfig, CLIPForImageClassification, CLIPImageProcessorPil

from hf_sage.models.labels import label_maps

TINY_CLIP = "tiny-clip"
"""The name of the model that needs no download: a CLIP vision tower of transformers with random weights."""


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
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    model = CLIPForImageClassification(config)
    model.vision_model.post_layernorm.requires_grad_(False)  # the head does not use it: see hf_sage.models.unused
    return model, processor
