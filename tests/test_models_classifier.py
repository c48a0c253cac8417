"""Linear classifiers on checkpoints of every kind, what is frozen in them and why, and what cannot be one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assertions import assert_same_bits
from checkpoints import SAVE, pictures, save_clip, save_text_model, save_vit
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import resnet
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, CLIPVisionModel

from hf_sage.models import TINY, TINY_CLIP, freeze_unused, image_classifier, tiny_clip, unused_parameters

LABELS = ["cat", "dog", "giraffe"]
UNUSED = {
    "clip": {"vision_model.post_layernorm"},
    "siglip": {"vision_model.head"},
    "vit": set(),
    "dinov2": {"dinov2.embeddings.mask_token"},
}
"""What each architecture's classifier leaves aside."""


@pytest.fixture(params=SAVE, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return SAVE[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)


def frozen(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


# ---- What comes out ----


def test_the_tower_is_the_checkpoints_and_the_head_is_new(checkpoint):
    model, processor = image_classifier(checkpoint, LABELS)
    pixels = processor(images=pictures(2, size=40), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (2, 3)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert type(processor).__name__.endswith("Pil")
    original = AutoModel.from_pretrained(checkpoint).state_dict()
    tower = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    without_prefix = {k.removeprefix("vit.").removeprefix("dinov2."): v for k, v in tower.items()}
    assert len(tower) > 30
    assert_same_bits(without_prefix.values(), [original[k] for k in without_prefix])


@pytest.mark.parametrize(("classes", "kept"), [(3, True), (4, False)])
def test_a_head_for_as_many_classes_is_kept(tmp_path, classes, kept):
    model, processor = image_classifier(save_vit(tmp_path / "base"), LABELS)
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    again, _ = image_classifier(str(tmp_path / "tuned"), [str(i) for i in range(classes)])
    assert again.classifier.weight.shape[0] == classes
    assert (again.classifier.weight[:3] == model.classifier.weight).all().item() == kept


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_need_no_file(name, tmp_path):
    torch.manual_seed(5)
    one, _ = TINY[name](LABELS)
    torch.manual_seed(5)
    model, processor = image_classifier(name, LABELS)
    assert_same_bits(one.state_dict().values(), model.state_dict().values())  # by torch's seed
    pixels = processor(images=pictures(2, size=40), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    assert model(pixels).logits.shape == (2, 3)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert torch.equal(again(images=pictures(2, size=40), return_tensors="pt")["pixel_values"], pixels)


@pytest.mark.parametrize("name", TINY)
def test_nothing_learns_in_a_tiny_model_that_its_logits_do_not_depend_on(name):
    model, processor = image_classifier(name, LABELS)
    pixels = processor(images=pictures(2), return_tensors="pt")["pixel_values"]
    assert unused_parameters(model, pixels) == []


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_no_text_tower(name):
    with pytest.raises(ValueError, match=f"'{name}' has no text tower: use head='linear'"):
        image_classifier(name, LABELS, head="zero_shot")


# ---- What is frozen ----


def test_what_the_logits_do_not_depend_on_is_frozen(checkpoint):
    model, processor = image_classifier(checkpoint, LABELS)
    names = UNUSED[Path(checkpoint).name]
    found = frozen(model)
    assert {name for name in names if any(f.startswith(name) for f in found)} == names
    assert all(f.startswith(tuple(names)) for f in found)
    # And everything else learns.
    model.train()
    model(processor(images=pictures(2), return_tensors="pt")["pixel_values"]).logits[:, 0].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == found


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_zero_shot_head_uses_everything(kind, tmp_path):
    model, _ = image_classifier(SAVE[kind](tmp_path), ["cat", "dog"], head="zero_shot")
    assert frozen(model) == set()


def test_looking_leaves_the_model_as_it_was():
    model = tiny_clip(LABELS)[0].train()
    model.vision_model.encoder.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, drawn = [m.training for m in model.modules()], torch.get_rng_state()
    found = unused_parameters(model, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert found == ["vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"]
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same_bits(model.state_dict().values(), before.values())


def test_running_statistics_stay():
    model = resnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert freeze_unused(model, torch.randn(1, 3, 32, 32)) == []
    assert_same_bits(model.state_dict().values(), before.values())


# ---- DistributedDataParallel ----


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_steps(model: Any, processor: Any) -> None:
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    pixels = processor(images=pictures(2), return_tensors="pt")["pixel_values"]
    for _ in range(2):
        cross_entropy(parallel(pixel_values=pixels).logits, torch.tensor([0, 1])).backward()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_needs_no_search_for_unused_parameters(checkpoint, checkpointing):
    """Trainer turns the search off beside gradient checkpointing."""
    model, processor = image_classifier(checkpoint, LABELS)
    if checkpointing:
        model.gradient_checkpointing_enable()
    two_steps(model.train(), processor)


@pytest.mark.usefixtures("one_process")
def test_ddp_would_stop_at_the_second_step(tmp_path):
    """Or there would be nothing to freeze anything for."""
    model, processor = image_classifier(save_clip(tmp_path / "clip"), LABELS)
    with pytest.raises(RuntimeError, match="finished reduction"):
        two_steps(model.requires_grad_(True), processor)


# ---- What cannot be one ----


def test_a_text_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a 'bert', which has no image classifier.*CLIP.*ViT, DINOv2"):
        image_classifier(save_text_model(tmp_path), LABELS)


def test_a_tower_alone_is_refused(tmp_path):
    CLIPVisionModel.from_pretrained(save_clip(tmp_path / "whole")).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"is a 'clip_vision_model'.*whole CLIP"):
        image_classifier(str(tmp_path / "tower"), LABELS)


def test_weights_of_another_model_are_refused(checkpoint, tmp_path):
    """transformers would train the tower from random weights, after a report in the log."""
    shutil.copytree(checkpoint, tmp_path / "mixed")
    shutil.copy(Path(save_text_model(tmp_path / "bert")) / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"config.json and its weights belong to different models"):
        image_classifier(str(tmp_path / "mixed"), LABELS)


def test_weights_of_another_size_are_refused(tmp_path):
    folder = Path(save_clip(tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json and its weights belong to different models"):
        image_classifier(str(folder), LABELS)


def test_an_unknown_head_lists_the_known():
    with pytest.raises(ValueError, match="'linear', 'zero_shot'"):
        image_classifier(TINY_CLIP, LABELS, head="mlp")
