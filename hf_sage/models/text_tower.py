"""Between a CLIP or SigLIP with both towers and the classifier made of its vision tower: there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from hf_sage.models.labels import label_maps
from hf_sage.models.zero_shot import ZeroShotImageClassifier, ZeroShotImageClassifierConfig

PROMPT = "a photo of a {}."
"""The prompt of the fine-tuning literature (CLIPood) for CLIP."""

HEAD_WEIGHT = "classifier.weight"


def zero_shot_classifier(name: str, labels: Sequence[str], prompt: str = PROMPT) -> ZeroShotImageClassifier:
    """The vision tower of a CLIP or SigLIP checkpoint with a classifier made of the class names' text features.

    Its logits are those of the whole model for the same prompts. The text tower itself is not kept: see
    `with_text_tower` for the way back. The weights are fp32 whatever the checkpoint stores, because a perturbation of
    ρ = 1e-6 does not survive in half precision.

    Args:
        name: Hub name or path of a checkpoint with both towers and a tokenizer.
        labels: The class names, in the order of the label integers; ``_`` is read as a space.
        prompt: A sentence with ``{}`` where the class name goes.

    Raises:
        ValueError: If the checkpoint has no text tower or tokenizer, or a prompt is too long for it.
    """
    maps = label_maps(labels)
    prompts = class_prompts(labels, prompt)
    towers = load_both_towers(name)
    config = ZeroShotImageClassifierConfig(
        vision_config=towers.config.vision_config,
        projection_dim=getattr(towers.config, "projection_dim", None),
        logit_bias=towers.logit_bias.item() if hasattr(towers, "logit_bias") else 0.0,
        **maps,
    )
    model = ZeroShotImageClassifier(config)
    own = {key: value for key, value in towers.state_dict().items() if key in model.state_dict()}
    model.load_state_dict(own | {HEAD_WEIGHT: text_classifier(towers, _tokenizer(name), prompts)})
    model.eval()
    return model


def with_text_tower(model: ZeroShotImageClassifier, base: str) -> tuple[Any, Any]:
    """The whole CLIP or SigLIP around a fine-tuned vision tower: it takes any class names again.

    The vision tower and its projection are the classifier's, the text tower and ``logit_scale`` are those of ``base``.
    **The trained head is left out**: classes are again what the text tower makes of their names. The logits are the
    classifier's own where its head was frozen in training, and differ by what the head has learnt where it was not.

    Args:
        model: The fine-tuned classifier.
        base: Hub name or path of the checkpoint it was made from.

    Returns:
        The model and its processor; ``save_pretrained`` of both into one folder makes a checkpoint for
        ``pipeline("zero-shot-image-classification")``.

    Raises:
        ValueError: If the vision tower of ``base`` has another shape than the classifier's.
    """
    towers = load_both_towers(base)
    own = {key: value for key, value in model.state_dict().items() if key != HEAD_WEIGHT}
    vision = {key: v.shape for key, v in towers.state_dict().items() if key.startswith(("vision_model.", "visual_"))}
    if vision != {key: value.shape for key, value in own.items()}:
        raise ValueError(
            f"The vision tower of {base!r} is another than the classifier's. "
            "Name the checkpoint that the classifier was made from."
        )
    towers.load_state_dict(own, strict=False)
    return towers, AutoProcessor.from_pretrained(base)


def class_prompts(labels: Sequence[str], prompt: str = PROMPT) -> list[str]:
    """One sentence a class.

    Raises:
        ValueError: If the prompt has no ``{}`` for the class name.
    """
    if prompt.format("") == prompt.format("x"):
        raise ValueError(f"The prompt {prompt!r} has no place for the class name: write {{}} there, as in {PROMPT!r}.")
    return [prompt.format(label.replace("_", " ")) for label in labels]


@torch.no_grad()
def text_classifier(towers: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Rows exp(logit_scale) · t/‖t‖ for the text features t of the prompts: of shape (prompts, projection width).

    Raises:
        ValueError: If a prompt has more tokens than the text tower takes.
    """
    longest = max(len(tokens) for tokens in tokenizer(list(prompts))["input_ids"])
    most = towers.config.text_config.max_position_embeddings
    if longest > most:
        raise ValueError(f"A class prompt has {longest} tokens, the text tower takes {most}. Shorten names or prompt.")
    # SigLIP was trained on texts padded to full length, and reads the last position.
    full_length = towers.config.model_type == "siglip"
    padding = {"padding": "max_length", "max_length": most} if full_length else {"padding": True}
    features = towers.get_text_features(**tokenizer(list(prompts), return_tensors="pt", **padding)).pooler_output
    weight: Tensor = towers.logit_scale.exp() * normalize(features, dim=-1)
    return weight


def load_both_towers(name: str) -> Any:
    """A CLIP or SigLIP in fp32.

    Raises:
        ValueError: If the checkpoint is another model, or lacks weights of one of the towers.
    """
    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in ("clip", "siglip"):
        raise ValueError(
            f"The checkpoint {name!r} is a {kind!r}, which has no text tower to make a zero-shot head of. Use a CLIP "
            "or SigLIP (also SigLIP 2 of fixed resolution) with both towers, such as 'openai/clip-vit-base-patch16' or "
            "'google/siglip-base-patch16-224', or head='linear'."
        )
    towers, loaded = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"The checkpoint {name!r} lacks {len(missing)} weights of a whole {kind!r}, {missing[0]!r} among them: it "
            "was saved without one of its towers. Use the checkpoint it was made from, or head='linear'."
        )
    return towers


def _tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # transformers 5 makes an empty tokenizer of CLIP where the files are missing: every text would read the same.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError("its vocabulary is missing")
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(
            f"The zero-shot head needs the tokenizer of {name!r}, which does not load: {error}. Save it beside the "
            "weights (`AutoProcessor.from_pretrained(original).save_pretrained(folder)`), or use head='linear'."
        ) from error
    return tokenizer
