"""Tiny checkpoints with random weights, saved as the real ones are: weights, configuration, tokenizer, processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": 16, "patch_size": 8}
SQUARE = {"height": 16, "width": 16}


def save_clip(folder: Path, **vision: Any) -> str:
    """Two towers of different width with projections, and CLIP's own tokenizer on letters without merges."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    text = TOWER | {"vocab_size": len(tokens), "max_position_embeddings": 40, "hidden_size": 24}
    text |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(vision_config=TOWER | PIXELS | vision, text_config=text, projection_dim=20)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    _saved(CLIPModel(config), folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def save_siglip(folder: Path) -> str:
    """Two towers without projections; its tokenizer needs sentencepiece, so words stand in for its pieces."""
    words = ["</s>", "<unk>", "a", "photo", "of", ".", "cat", "dog", "alarm", "clock", "giraffe"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", unk_token="<unk>", model_input_names=["input_ids"]
    )
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": 64, "pad_token_id": 0}
    config = SiglipConfig(vision_config=TOWER | PIXELS, text_config=text | {"bos_token_id": 0, "eos_token_id": 0})
    model = SiglipModel(config)
    with torch.no_grad():  # as far from nothing as those of the real one: exp(4.7) and −16
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-7.0)
    _saved(model, folder)
    SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer).save_pretrained(folder)
    return str(folder)


def save_vit(folder: Path) -> str:
    _saved(ViTModel(ViTConfig(**TOWER, **PIXELS)), folder)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return str(folder)


def save_dinov2(folder: Path) -> str:
    shape = {key: value for key, value in TOWER.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
    _saved(Dinov2Model(Dinov2Config(**shape, **PIXELS)), folder)
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE).save_pretrained(folder)
    return str(folder)


def save_text_model(folder: Path) -> str:
    _saved(BertModel(BertConfig(**TOWER, vocab_size=8)), folder)
    return str(folder)


SAVE = {"clip": save_clip, "siglip": save_siglip, "vit": save_vit, "dinov2": save_dinov2}


def pictures(n: int, size: int = 16, seed: int = 0) -> list[Image.Image]:
    """Images of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def _saved(model: Any, folder: Path) -> None:
    """Saves weights that are not those of the initialisation: biases and norms too are to make a difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 0:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
