"""An image classifier and its processor, from the name of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from hf_sage.models.labels import label_maps
from hf_sage.models.text_tower import PROMPT, zero_shot_classifier
from hf_sage.models.tiny import TINY
from hf_sage.models.unused import freeze_unused

Head = Literal["linear", "zero_shot"]


def image_classifier(
    name: str, labels: Sequence[str], *, head: Head = "linear", prompt: str = PROMPT
) -> tuple[Any, Any]:
    """A classifier for the given labels and its image processor.

    Its weights are fp32, and parameters that its logits do not depend on are frozen (see `hf_sage.models.unused`).

    Args:
        name: A vision checkpoint by Hub name or path (CLIP, SigLIP, ViT, DINOv2, ...), or a tiny one without download,
            ``"tiny-clip"`` or ``"tiny-convnext"``.
        labels: The class names, in the order of the label integers.
        head: ``"linear"``: the checkpoint's own classifier where it has one for as many classes, else a new one with
            random weights. ``"zero_shot"``: the text features of the class names, for CLIP and SigLIP.
        prompt: The sentence around a class name, for the zero-shot head.

    Returns:
        The model and the processor (on Pillow).

    Raises:
        ValueError: If the checkpoint cannot be such a classifier; the message says what can.
        OSError: If it cannot be had or read.
    """
    if head not in get_args(Head):
        raise ValueError(f"Unknown head {head!r}: use one of {', '.join(map(repr, get_args(Head)))}.")
    if name in TINY:
        if head == "zero_shot":
            raise ValueError(f"{name!r} has no text tower: use head='linear', or a checkpoint of CLIP or SigLIP.")
        return TINY[name](labels)
    try:
        model, fresh = (
            (zero_shot_classifier(name, labels, prompt), []) if head == "zero_shot" else _linear(name, labels)
        )
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The checkpoint {name!r} cannot be loaded: {str(error).rstrip('.')}. It must be a name on the Hub, or a "
            "folder with config.json, whole weights and preprocessor_config.json."
        ) from error
    blank = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    freeze_unused(model, blank)
    _refuse_random_tower(name, model, fresh)
    return model, processor


def _linear(name: str, labels: Sequence[str]) -> tuple[Any, list[str]]:
    """The classifier, and the names of its weights that the checkpoint does not have."""
    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"The checkpoint {name!r} is a {config.model_type!r}, which has no image classifier in transformers. Use a "
            "whole CLIP or SigLIP, a ViT, DINOv2, ResNet, ConvNeXt or Swin, such as 'openai/clip-vit-base-patch16', "
            "'google/vit-base-patch16-224-in21k' or 'facebook/dinov2-base'."
        )
    model, loaded = AutoModelForImageClassification.from_pretrained(
        name,
        dtype=torch.float32,
        num_labels=len(labels),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **label_maps(labels),
    )
    return model, [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]


def _refuse_random_tower(name: str, model: Any, fresh: Sequence[str]) -> None:
    """A new head is wanted; anything else that starts random means that the checkpoint is of another model."""
    tower = max(model.named_children(), key=lambda child: sum(p.numel() for p in child[1].parameters()))[0]
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    classes = model.config.num_labels  # some models keep the head inside
    lost = [k for k in fresh if k in trained and k.startswith(f"{tower}.") and trained[k].shape[0] != classes]
    if lost:
        raise ValueError(
            f"The checkpoint {name!r} has no weights for {len(lost)} parameters of its {type(model).__name__} (such as "
            f"{lost[0]!r}), or some of other shapes: its config.json and its weights belong to different models. "
            "Use a checkpoint whose two agree."
        )
