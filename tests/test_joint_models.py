"""The joint clean pass on networks of transformers: where it applies, where not, and what it finds (law 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import relative_error
from torch import Tensor, nn
from training import CLASSES, VOCABULARY, clip, image_rows, language_model, resnet, text_rows, vit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_sage.engine import Joint, Part, Verdict, clean_pass, joint_clean_pass

TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {"art": 3, "photo": 6, "sketch": 3}
EXACT = 1e-10
"""fp64, the same sums in another order."""
FP32 = 1e-6
"""transformers takes the loss of a language model in fp32, whatever the model is in."""


def gpt2() -> nn.Module:
    set_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def tied_llama() -> nn.Module:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TOWER, vocab_size=VOCABULARY, tie_word_embeddings=True))


def bert() -> nn.Module:
    set_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**TOWER, **none, vocab_size=VOCABULARY, num_labels=CLASSES))


def t5() -> nn.Module:
    set_seed(0)
    size = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0))


def swin() -> nn.Module:
    set_seed(0)
    size = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**size, num_labels=CLASSES, drop_path_rate=0.0))


def convnext() -> nn.Module:
    set_seed(0)
    size = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_scale_init_value": 0.1}
    return ConvNextForImageClassification(ConvNextConfig(**size, num_labels=CLASSES))


def low_rank_vit() -> nn.Module:
    """As LoRA has it: everything frozen, and a product of two small matrices beside each projection."""
    model = vit().requires_grad_(False)

    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not model.classifier:
                setattr(module, name, LowRank(child))
    return model


def dropping_vit() -> nn.Module:
    return vit(dropout=0.2)


def images() -> dict[str, Tensor]:
    rows = image_rows(12)
    pixels = torch.stack([row["pixel_values"] for row in rows]).double()
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def text() -> dict[str, Tensor]:
    rows = text_rows(12)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def sentences() -> dict[str, Tensor]:
    return text() | {"labels": torch.arange(12) % CLASSES}


SHARED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "clip": (clip, images),
    "vit": (vit, images),
    "vit with dropout": (dropping_vit, images),
    "low-rank vit": (low_rank_vit, images),
    "swin": (swin, images),
    "convnext": (convnext, images),
    "llama": (language_model, text),
    "tied llama": (tied_llama, text),
    "tied gpt2": (gpt2, text),
    "bert": (bert, sentences),
    "t5": (t5, text),
}


def batch_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Part], Joint]:
    """The parts of a batch and the batch as one, with the losses that a trainer would compute."""
    labels = inputs["labels"]
    items = [int((y[1:] != -100).sum()) if labels.dim() > 1 else 1 for y in labels]
    total = torch.tensor(sum(items))

    def loss(rows: slice) -> Tensor:
        own = {name: value[rows] for name, value in inputs.items()}
        if labels.dim() == 1 or isinstance(model, T5ForConditionalGeneration):
            share = (labels[rows] != -100).sum() / (labels != -100).sum()
            return model(**own).loss * share
        return model(**own, num_items_in_batch=total).loss

    parts, start = [], 0
    for group, n in SIZES.items():
        rows = slice(start, start + n)
        parts.append(Part(group, sum(items[rows]) / total.item(), lambda rows=rows: loss(rows)))
        start += n
    return parts, Joint(list(SIZES.items()), lambda: loss(slice(None)))


@pytest.mark.parametrize("name", SHARED)
def test_networks_whose_groups_share_a_pass(name):
    build, data = SHARED[name]
    model = build().double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts, joint = batch_of(model, data())
    torch.manual_seed(1)
    actual = joint_clean_pass(model, parameters, parts, joint, Tensor.backward)
    assert joint.verdict.obstacle is None
    assert actual is not None
    if name == "vit with dropout":  # other masks for the groups than for the whole
        model.eval()
        actual = joint_clean_pass(model, parameters, parts, joint, Tensor.backward)
    expected = clean_pass(parameters, parts, Tensor.backward)
    assert [g is None for g in actual.gradient] == [g is None for g in expected.gradient]
    exact = FP32 if data is text else EXACT
    found, wanted = (torch.cat([g.reshape(-1) for g in c.gradient if g is not None]) for c in (actual, expected))
    assert relative_error(found, wanted) < exact
    assert relative_error(actual.agreement, expected.agreement) < exact
    for group, (loss, weight) in expected.group_losses.items():
        assert relative_error(actual.group_losses[group][0], loss) < exact
        assert actual.group_losses[group][1] == pytest.approx(weight)


def test_a_network_with_batch_norm_sees_each_group_by_itself():
    model = resnet().double().train()
    parameters = list(model.parameters())
    parts, joint = batch_of(model, images())
    before = [b.clone() for b in model.buffers()]
    assert joint_clean_pass(model, parameters, parts, joint, Tensor.backward) is None
    assert "batch_norm" in joint.verdict.obstacle
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_checkpointed_network_keeps_to_one_pass_a_group():
    model = clip().double().train()
    model.gradient_checkpointing_enable()
    parts, joint = batch_of(model, images())
    assert joint_clean_pass(model, list(model.parameters()), parts, joint, Tensor.backward) is None
    assert joint.verdict.obstacle is not None


def test_what_was_found_out_holds_for_other_lengths():
    model, verdict = gpt2().double().train(), Verdict()
    tokens = torch.arange(12 * 14).view(12, 14)
    for length in (10, 7, 12, 14):  # 12 are as many places as rows
        inputs = {"input_ids": tokens[:, :length] % VOCABULARY, "labels": tokens[:, :length] % 9}
        parts, joint = batch_of(model, inputs)
        joint = Joint(joint.rows, joint.loss, verdict)
        parameters = list(model.parameters())
        actual = joint_clean_pass(model, parameters, parts, joint, Tensor.backward)
        expected = clean_pass(parameters, parts, Tensor.backward)
        assert actual is not None, verdict.obstacle
        assert relative_error(actual.agreement, expected.agreement) < FP32
    assert len(verdict.proven) == 1
