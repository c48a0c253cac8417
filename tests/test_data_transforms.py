"""DomainBed's augmentation: what it draws, what it does, and that a restart draws the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same_bits
from pictures import png
from PIL import Image, ImageEnhance
from training import Rows, build, weights
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil, set_seed

from hf_sage.data import TRANSFORMS, ImageCollator, decode_image, image_transforms
from hf_sage.data.augmentation import Draw, apply_by_pillow, draw, operations
from hf_sage.data.callback import DrawsCallback
from hf_sage.data.transforms import Squash, input_size
from hf_sage.models import tiny_clip

BICUBIC = int(Image.Resampling.BICUBIC)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return decode_image({"bytes": png(seed, size), "path": None})


def levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference, of 256 levels."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


# ---- What is drawn ----


def test_draws_have_the_shares_and_ranges_of_the_protocol() -> None:
    source = generator()
    drawn = [draw((300, 200), source) for _ in range(2000)]
    # 2,000 draws: three standard errors are 3·√(p(1−p)/2000): .034 for p = .5, .02 for p = .1.
    assert np.mean([d.flip for d in drawn]) == pytest.approx(0.5, abs=0.034)
    assert np.mean([d.grey for d in drawn]) == pytest.approx(0.1, abs=0.02)
    areas = np.array([w * h / (300 * 200) for _, _, w, h in (d.box for d in drawn)])
    assert areas.min() > 0.7 - 0.01  # sides are whole pixels
    assert areas.max() <= 1
    ratios = np.array([w / h for _, _, w, h in (d.box for d in drawn)])
    assert ratios.max() < 4 / 3 * 1.01
    assert ratios.min() > 300 / 200 * 0.7 * 0.98  # of this wide image, narrower boxes of that area are too tall
    for left, upper, w, h in (d.box for d in drawn):
        assert 0 <= left <= 300 - w
        assert 0 <= upper <= 200 - h
    for what, low, high in (
        ("brightness", 0.7, 1.3),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.7, 1.3),
        ("hue", -0.3, 0.3),
    ):
        values = [dict(d.jitter)[what] for d in drawn]
        assert low <= min(values) < low + 0.01
        assert high - 0.01 < max(values) <= high
    orders = {tuple(what for what, _ in d.jitter) for d in drawn}
    assert len(orders) == 24  # every order of four


def test_image_that_no_crop_fits_is_cropped_in_the_middle() -> None:
    """Ten to one: every box of 70 % of the area and a ratio up to 4/3 is too tall."""
    assert draw((100, 10), generator()).box == (43, 0, 13, 10)
    assert draw((10, 100), generator()).box == (0, 43, 10, 13)
    assert draw((1, 1), generator()).box == (0, 0, 1, 1)


# ---- What is done ----

NOTHING = Draw((0, 0, 60, 40), False, (), False)


def test_nothing_drawn_is_the_squashed_image() -> None:
    image = picture()
    assert levels(apply_by_pillow(image, NOTHING, (24, 32), BICUBIC), image.resize((32, 24), BICUBIC)) == 0
    assert levels(Squash((24, 32), BICUBIC)(image, generator()), image.resize((32, 24), BICUBIC)) == 0


def test_each_drawn_step_is_done_in_its_order() -> None:
    image = picture(size=(32, 32))
    whole = (0, 0, 32, 32)

    def done(**drawn: Any) -> Image.Image:
        fields = {"box": whole, "flip": False, "jitter": (), "grey": False} | drawn
        return apply_by_pillow(image, Draw(**fields), (32, 32), BICUBIC)

    assert levels(done(box=(4, 2, 16, 20)), image.crop((4, 2, 20, 22)).resize((32, 32), BICUBIC)) == 0
    assert levels(done(flip=True), Image.fromarray(np.asarray(image)[:, ::-1])) == 0
    grey = np.asarray(done(grey=True), int)
    # Luma of ITU-R 601, rounded once.
    assert np.abs(grey - np.asarray(image, float) @ np.array([[0.299], [0.587], [0.114]])).max() <= 1
    dark = ImageEnhance.Brightness(image).enhance(0.7)
    pale = ImageEnhance.Contrast(dark).enhance(1.3)
    assert levels(done(jitter=(("brightness", 0.7), ("contrast", 1.3))), pale) == 0
    assert levels(done(jitter=(("contrast", 1.3), ("brightness", 0.7))), pale) > 0


def test_hue_turns_on_its_circle() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))

    def turned(turns: float) -> np.ndarray:
        return np.asarray(apply_by_pillow(red, Draw((0, 0, 8, 8), False, (("hue", turns),), False), (8, 8), BICUBIC))[
            0, 0
        ]

    # 256 steps around the circle: a third of it is not a whole number of steps, six levels off at the most.
    assert np.abs(turned(1 / 3).astype(int) - (0, 255, 0)).max() <= 6
    assert np.abs(turned(-1 / 3).astype(int) - (0, 0, 255)).max() <= 6
    assert (turned(0.0) == (255, 0, 0)).all()


# ---- By name ----

PROCESSORS = [
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ViTImageProcessorPil(size={"height": 16, "width": 16}),
    BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),  # DINOv2's
]
names = [type(p).__name__ for p in PROCESSORS]


@pytest.mark.parametrize("processor", PROCESSORS, ids=names)
def test_processor_adds_its_mean_and_deviation_and_nothing_else(processor: Any) -> None:
    assert input_size(processor) == (16, 16)
    test = image_transforms("domainbed", processor).test
    batch = ImageCollator(processor, augment=test)([{"image": picture()}])
    squashed = np.asarray(picture().resize((16, 16), Image.Resampling(processor.resample)), np.float64) / 255
    expected = (squashed - np.array(processor.image_mean)) / np.array(processor.image_std)
    # One rounding of fp32 at values up to 3, twice.
    torch.testing.assert_close(
        batch["pixel_values"][0].double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6
    )


def test_names_differ_in_what_is_validated_on() -> None:
    processor = PROCESSORS[0]
    domainbed, swad, none = (image_transforms(name, processor) for name in TRANSFORMS)
    assert domainbed.train == domainbed.validation == swad.train
    assert swad.validation == swad.test == domainbed.test == Squash((16, 16), BICUBIC)
    assert (none.train, none.validation, none.test) == (None, None, None)
    with pytest.raises(ValueError, match="'domainbed', 'swad', 'none'"):
        image_transforms("clip", processor)


def test_collator_without_augmentation_leaves_all_to_the_processor() -> None:
    processor, rows = PROCESSORS[2], [{"image": picture()}]
    expected = processor(images=[picture()], return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageCollator(processor)(rows)["pixel_values"], expected)


# ---- Restarts ----


def rows() -> Rows:
    return Rows(
        [{"image": {"bytes": png(i), "path": None}, "label": i % 3, "domain": ("a", "b")[i % 2]} for i in range(24)]
    )


def trained(folder: Path, resume: Path | None = None, follow: bool = True, **options: Any) -> Any:
    """Two epochs of 3 updates of 2 × 4 rows with augmentation."""
    set_seed(0)
    model, processor = tiny_clip(["x", "y", "z"])
    collator = ImageCollator(processor, augment=image_transforms("domainbed", processor).train)
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
    options |= {"remove_unused_columns": False, "output_dir": str(folder)}
    callbacks = [DrawsCallback(collator)] if follow else []
    trainer = build(model, rows(), data_collator=collator, callbacks=callbacks, method="erm", **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


SAVED = {"save_strategy": "steps", "save_steps": 1}
LOADERS = {
    "no workers": {},
    "workers": {"dataloader_num_workers": 2},
    "lasting workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """The checkpoints and the end of a training that nothing cut short, without workers."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(trained(folder, **SAVED).model)


@pytest.mark.parametrize(
    ("checkpoint", "loader"), [(2, "no workers"), (3, "no workers"), (2, "workers"), (2, "lasting workers")]
)
def test_restart_draws_the_same(checkpoint: int, loader: str, whole: tuple, tmp_path: Path) -> None:
    """In the middle of an epoch and at its end, whoever reads the batches."""
    folder, expected = whole
    resumed = trained(tmp_path, folder / f"checkpoint-{checkpoint}", **LOADERS[loader])
    assert_same_bits(weights(resumed.model), expected)


def test_draws_from_torch_s_generator_come_again_after_a_whole_epoch(tmp_path: Path) -> None:
    """Without the callback: the state that Trainer restores is that of the epoch's end."""
    expected = weights(trained(tmp_path, follow=False, **SAVED).model)
    assert_same_bits(weights(trained(tmp_path, tmp_path / "checkpoint-3", follow=False).model), expected)


def test_draws_differ_by_seed_update_micro_batch_and_rank() -> None:
    collator = ImageCollator(PROCESSORS[0], augment=image_transforms("swad", PROCESSORS[0]).train)
    row, seen = [{"image": picture()}], []
    for seed, updates, rank in ((0, 0, 0), (1, 0, 0), (0, 7, 0), (0, 0, 1)):
        collator.draws.begin_epoch(seed, updates, micro_batches=2, rank=rank)
        seen += [collator(row)["pixel_values"] for _ in range(4)]
    assert len({batch.numpy().tobytes() for batch in seen}) == 16
    collator.draws.begin_epoch(0, 1, micro_batches=2)  # resumed after one update: its batches are the third and fourth
    again = [collator(row)["pixel_values"] for _ in range(2)]
    assert_same_bits(again, seen[2:4])


# ---- torchvision ----


def torchvision_works() -> bool:
    return operations() is not apply_by_pillow


@pytest.mark.skipif(not torchvision_works(), reason="torchvision is not installed, or not for this torch")
def test_torchvision_gives_the_same_image() -> None:
    """To the bit: torchvision leaves the images to Pillow too."""
    source = generator()
    for i in range(20):
        image = picture(i)
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            drawn = draw(image.size, source)
            ours = apply_by_pillow(image, drawn, (32, 32), int(resample))
            assert levels(operations()(image, drawn, (32, 32), int(resample)), ours) == 0


BROKEN = {
    "missing operator": "raise RuntimeError('operator torchvision::nms does not exist')",
    "half installed": "raise ImportError('libjpeg.so: cannot open shared object file')",
    "no v2": "",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_broken_torchvision_is_left_alone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    others = {name: m for name, m in sys.modules.items() if "torchvision" not in name}
    monkeypatch.setattr(sys, "modules", others)
    assert operations() is apply_by_pillow
