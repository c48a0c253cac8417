"""The classifier that starts from the text tower: its logits, its files, the way back, and what cannot be one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from checkpoints import pictures, save_clip, save_siglip, save_text_model, save_vit
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    SiglipModel,
    pipeline,
)

from hf_sage.models import (
    ZeroShotImageClassifier,
    ZeroShotImageClassifierConfig,
    image_classifier,
    with_text_tower,
    zero_shot_classifier,
)

LABELS = ["cat", "dog", "Alarm_Clock", "giraffe"]
PROMPTS = ["a photo of a cat.", "a photo of a dog.", "a photo of a Alarm Clock.", "a photo of a giraffe."]
SAVE = {"clip": save_clip, "siglip": save_siglip}


@pytest.fixture(params=SAVE, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return SAVE[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_clip(tmp_path_factory.mktemp("checkpoints") / "clip")


def as_text_and_images(checkpoint: str, prompts: list[str] = PROMPTS, n: int = 3) -> dict[str, Any]:
    """What both towers read, padded as each model's card says."""
    padding = {"padding": "max_length", "max_length": 64} if "siglip" in checkpoint else {"padding": True}
    return AutoProcessor.from_pretrained(checkpoint)(text=prompts, images=pictures(n), return_tensors="pt", **padding)


def logits(model: Any, processor: Any, n: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(images=pictures(n), return_tensors="pt")).logits


def fine_tune(model: Any, processor: Any, steps: int = 3) -> None:
    """Moves what is trained, far enough to be seen."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        batch = processor(images=pictures(4, seed=7), return_tensors="pt")
        model(**batch, labels=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- Where it starts ----


def test_it_starts_as_the_model_of_both_towers(checkpoint):
    whole = AutoModel.from_pretrained(checkpoint)
    assert isinstance(whole, CLIPModel | SiglipModel)
    with torch.no_grad():
        expected = whole(**as_text_and_images(checkpoint)).logits_per_image
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    # fp32, with logits of about 10: the order of the products is all that differs.
    torch.testing.assert_close(logits(model, processor), expected, atol=1e-5, rtol=0)
    assert expected.std(dim=0).min() > 1e-3, "the images must make a difference, or the test sees nothing"
    assert expected.std(dim=1).min() > 1e-3, "and the classes"


def test_the_prompt_is_the_users(checkpoint):
    default, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    other, _ = image_classifier(checkpoint, LABELS, head="zero_shot", prompt="{} dog")
    texts = ["cat dog", "dog dog", "Alarm Clock dog", "giraffe dog"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(checkpoint)(**as_text_and_images(checkpoint, texts)).logits_per_image
    torch.testing.assert_close(logits(other, processor), expected, atol=1e-5, rtol=0)
    assert (logits(default, processor) - expected).abs().max() > 1e-3


def test_it_has_the_vision_tower_and_one_weight_a_class(checkpoint):
    model = zero_shot_classifier(checkpoint, LABELS)
    whole = AutoModel.from_pretrained(checkpoint).state_dict()
    own = model.state_dict()
    assert own.pop("classifier.weight").shape[0] == len(LABELS)
    assert own.keys() == {key for key in whole if key.startswith(("vision_model.", "visual_projection."))}
    assert_same_bits(own.values(), [whole[key] for key in own])
    assert model.config.id2label == dict(enumerate(LABELS))
    assert not model.training


def test_vit_b16_has_the_published_size():
    """86.19 M parameters in 125 vectors, 74 matrices and 1 kernel, as openai/clip-vit-base-patch16, and the head."""
    vision = CLIPVisionConfig(patch_size=16, projection_dim=512)
    config = ZeroShotImageClassifierConfig(vision_config=vision, projection_dim=512, num_labels=7)
    with torch.device("meta"):
        model = ZeroShotImageClassifier(config)
    shapes = [p.dim() for name, p in model.named_parameters() if name != "classifier.weight"]
    assert {d: shapes.count(d) for d in set(shapes)} == {1: 125, 2: 74, 4: 1}
    assert sum(p.numel() for p in model.parameters()) == 86_192_640 + 7 * 512


def test_weights_are_fp32_whatever_the_checkpoint_stores(clip, tmp_path):
    CLIPModel.from_pretrained(clip).half().save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path)
    for head in ("linear", "zero_shot"):
        model, _ = image_classifier(str(tmp_path), LABELS, head=head)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---- Its loss ----


def test_the_loss_is_divided_by_what_it_is_told(checkpoint):
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    batch = processor(images=pictures(3), return_tensors="pt") | {"labels": torch.tensor([0, 3, -100])}
    mean = model(**batch).loss
    expected = -logits(model, processor).log_softmax(-1)[[0, 1], [0, 3]]
    torch.testing.assert_close(mean, expected.mean())
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(8)).loss, expected.sum() / 8)
    assert model.accepts_loss_kwargs


# ---- Its files ----


def test_saved_and_loaded_it_is_the_same_to_the_bit(checkpoint, tmp_path):
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    fine_tune(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ZeroShotImageClassifier
    assert_same_bits(loaded.state_dict().values(), model.state_dict().values())
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert_same_bits([logits(loaded, again)], [logits(model, processor)])
    assert loaded.config.id2label == dict(enumerate(LABELS))
    # And where it came from is nobody's business.
    text = "".join(file.read_text() for file in tmp_path.iterdir() if file.suffix != ".safetensors")
    assert str(Path(checkpoint).parent) not in text


def test_it_goes_on_training_from_its_own_files(clip, tmp_path):
    model, processor = image_classifier(clip, LABELS, head="zero_shot")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = image_classifier(str(tmp_path), LABELS)
    assert_same_bits(again.state_dict().values(), model.state_dict().values())
    with pytest.raises(ValueError, match="no text tower"):
        image_classifier(str(tmp_path), LABELS, head="zero_shot")


WITHOUT_HF_SAGE = """
import sys
sys.modules["hf_sage"] = None  # import hf_sage raises ImportError
import torch
from transformers import AutoModelForImageClassification, pipeline
folder, pixels = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(pixels).logits, sys.argv[2])
pipeline("image-classification", model=folder, trust_remote_code=True)
try:
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print(error)
"""


def test_it_loads_where_hf_sage_is_not_installed(clip, tmp_path):
    model, processor = image_classifier(clip, LABELS, head="zero_shot")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pixels = processor(images=pictures(3), return_tensors="pt")["pixel_values"]
    torch.save(pixels, tmp_path / "tensor.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HF_SAGE, tmp_path / "model", tmp_path / "tensor.pt"],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "tensor.pt"), logits(model, processor))
    assert "trust_remote_code=True" in done.stdout  # who has not allowed the code is told how to


def test_pipeline_classifies_images(checkpoint, tmp_path):
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = pipeline("image-classification", model=str(tmp_path))(pictures(1)[0], top_k=len(LABELS))
    scores = logits(model, processor, 1).softmax(-1)[0]
    assert {f["label"]: f["score"] for f in found} == pytest.approx(dict(zip(LABELS, scores.tolist(), strict=True)))


# ---- As any model of transformers ----


def test_gradient_checkpointing_changes_no_gradient(checkpoint):
    gradients = []
    for checkpointing in (False, True):
        model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(**processor(images=pictures(2), return_tensors="pt"), labels=torch.tensor([0, 1])).loss.backward()
        assert model.is_gradient_checkpointing == checkpointing
        gradients.append([p.grad for p in model.parameters()])
    assert_same_bits(*gradients)


def test_attention_is_chosen_as_ever(checkpoint, tmp_path):
    zero_shot_classifier(checkpoint, LABELS).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    found = {}
    for attention in ("eager", "sdpa"):
        model = ZeroShotImageClassifier.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.vision_model.config._attn_implementation == attention
        with torch.no_grad():
            found[attention] = model(images, output_hidden_states=True, output_attentions=attention == "eager")
    torch.testing.assert_close(found["eager"].logits, found["sdpa"].logits)
    assert len(found["eager"].attentions) == 2
    assert len(found["sdpa"].hidden_states) == 3


def test_type_and_form_of_the_output_are_chosen_as_ever(checkpoint, tmp_path):
    zero_shot_classifier(checkpoint, LABELS).save_pretrained(tmp_path)
    model = ZeroShotImageClassifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss, values = model(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), return_dict=False)
    assert values.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    larger = model(torch.randn(2, 3, 24, 24), interpolate_pos_encoding=True).logits
    assert larger.shape == (2, len(LABELS))


# ---- And back ----


def test_back_it_classifies_as_it_did_if_its_head_stayed(checkpoint, tmp_path):
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    before = logits(model, processor)
    model.classifier.requires_grad_(False)
    fine_tune(model, processor)
    assert (logits(model, processor) - before).abs().max() > 0.1
    whole, both = with_text_tower(model, checkpoint)
    with torch.no_grad():
        found = whole(**as_text_and_images(checkpoint)).logits_per_image
    torch.testing.assert_close(found, logits(model, processor), atol=1e-5, rtol=0)
    original = AutoModel.from_pretrained(checkpoint).state_dict()
    texts = [key for key in original if not key.startswith(("vision_model.", "visual_projection."))]
    assert any(key.startswith("text_model.") for key in texts)
    assert_same_bits([whole.state_dict()[key] for key in texts], [original[key] for key in texts])

    whole.save_pretrained(tmp_path)
    both.save_pretrained(tmp_path)
    zero_shot = pipeline("zero-shot-image-classification", model=str(tmp_path))
    scores = zero_shot(
        pictures(1)[0],
        candidate_labels=[label.replace("_", " ") for label in LABELS],
        hypothesis_template="a photo of a {}.",
    )
    expected = found[0].sigmoid() if "siglip" in checkpoint else found[0].softmax(-1)
    order = expected.argsort(descending=True)
    assert [s["label"] for s in scores] == [LABELS[i].replace("_", " ") for i in order]
    assert [s["score"] for s in scores] == pytest.approx(expected[order].tolist(), rel=1e-4)


def test_back_the_trained_head_is_left_out(checkpoint):
    model, processor = image_classifier(checkpoint, LABELS, head="zero_shot")
    fine_tune(model, processor)
    whole, _ = with_text_tower(model, checkpoint)
    with torch.no_grad():
        found = whole(**as_text_and_images(checkpoint)).logits_per_image
    assert (found - logits(model, processor)).abs().max() > 1e-3
    afresh = zero_shot_classifier(checkpoint, LABELS)
    afresh.load_state_dict(model.state_dict() | {"classifier.weight": afresh.classifier.weight})
    torch.testing.assert_close(found, logits(afresh, processor), atol=1e-5, rtol=0)


def test_back_needs_the_checkpoint_it_came_from(clip, tmp_path):
    model = zero_shot_classifier(clip, LABELS)
    with pytest.raises(ValueError, match="the checkpoint that the classifier was made from"):
        with_text_tower(model, save_clip(tmp_path / "wider", hidden_size=48))
    with pytest.raises(ValueError, match="the checkpoint that the classifier was made from"):
        with_text_tower(model, save_siglip(tmp_path / "siglip"))


# ---- What cannot be one ----


def test_other_models_are_refused(tmp_path):
    for save, kind in ((save_text_model, "bert"), (save_vit, "vit")):
        with pytest.raises(ValueError, match=rf"is a '{kind}', which has no text tower.*CLIP.*SigLIP.*head='linear'"):
            image_classifier(save(tmp_path / kind), LABELS, head="zero_shot")
    with pytest.raises(ValueError, match="'tiny-clip' has no text tower"):
        image_classifier("tiny-clip", LABELS, head="zero_shot")


def test_a_lost_text_tower_is_named(clip, tmp_path):
    CLIPForImageClassification.from_pretrained(clip, num_labels=4).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a whole 'clip'.*one of its towers"):
        image_classifier(str(tmp_path), LABELS, head="zero_shot")


def test_a_lost_tokenizer_is_named(checkpoint, tmp_path):
    """For CLIP transformers makes an empty one instead, which reads every text the same."""
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs the tokenizer of"):
        image_classifier(str(tmp_path), LABELS, head="zero_shot")


def test_prompts_that_cannot_be_are_refused(checkpoint):
    with pytest.raises(ValueError, match="no place for the class name"):
        image_classifier(checkpoint, LABELS, head="zero_shot", prompt="a photo")
    with pytest.raises(ValueError, match=r"has \d+ tokens, the text tower takes \d+"):
        image_classifier(checkpoint, ["cat", "dog " * 70], head="zero_shot")
    with pytest.raises(ValueError, match="'cat' appears twice"):
        image_classifier(checkpoint, ["cat", "dog", "cat"], head="zero_shot")


def test_configuration_names_its_code(clip, tmp_path):
    """Only what a reader without hf_sage needs: one file, and where each class is in it."""
    zero_shot_classifier(clip, LABELS).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "zero_shot.py"]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "zero_shot.ZeroShotImageClassifierConfig",
        "AutoModelForImageClassification": "zero_shot.ZeroShotImageClassifier",
    }
