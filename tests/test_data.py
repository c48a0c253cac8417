"""Domain-labelled images: the embedded sets, folders, decoding, and splits that hold a domain out."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_sage.data import (
    EMBEDDED,
    ImageCollator,
    UnreadableImageError,
    decode_image,
    domain_names,
    hold_out,
    load_domains,
    load_embedded,
    load_image_folder,
    preprocess,
    undecoded,
)
from hf_sage.data.deal import deal
from hf_sage.models import tiny_clip


@pytest.fixture(scope="module")
def style_digits() -> datasets.DatasetDict:
    return load_embedded("style_digits")


def png(color: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format="PNG")
    return file.getvalue()


def save(root: Path, *parts: str, color: tuple[int, int, int] = (9, 9, 9)) -> None:
    file = root.joinpath(*parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(color))


# ---- The embedded sets ----


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_scan_is_in_two_splits(name: str) -> None:
    data = load_embedded(name)
    scans = {split: set(rows["scan"][:]) for split, rows in data.items()}
    assert {split: len(s) for split, s in scans.items()} == {"train": 1100, "validation": 200, "test": 497}
    assert len(set.union(*scans.values())) == 1797
    for rows in data.values():
        domains = rows.features["domain"].names
        assert len(rows) == len(set(rows["scan"][:])) * len(domains)  # every scan once in every domain


def test_embedded_set_is_a_function_of_its_seed(style_digits: datasets.DatasetDict) -> None:
    def pixels(data: datasets.DatasetDict) -> list[bytes]:
        return [image["bytes"] for image in undecoded(data["test"])["image"]]

    assert pixels(load_embedded("style_digits")) == pixels(style_digits)
    assert pixels(load_embedded("style_digits", seed=1)) != pixels(style_digits)


def test_digits_are_spread_over_the_splits_in_proportion(style_digits: datasets.DatasetDict) -> None:
    labels = {split: np.bincount(rows["label"][:], minlength=10) / 4 for split, rows in style_digits.items()}
    total = sum(labels.values())
    for counts in labels.values():
        # Dealing every digit out evenly leaves at most a scan or two of rounding.
        assert np.abs(counts - total * counts.sum() / 1797).max() <= 2


def test_styles_are_four_different_pictures_of_one_scan(style_digits: datasets.DatasetDict) -> None:
    rows = style_digits["train"]
    domain = np.array(rows["domain"][:])
    pixels = {
        name: np.stack([np.asarray(rows[int(i)]["image"], float) for i in np.flatnonzero(domain == k)[:100]])
        for k, name in enumerate(rows.features["domain"].names)
    }
    assert list(pixels) == ["plain", "photo", "sketch", "color"]
    assert all(p.shape == (100, 16, 16, 3) for p in pixels.values())
    grey = {name: np.ptp(p, axis=-1).max() == 0 for name, p in pixels.items()}
    assert grey == {"plain": True, "sketch": True, "photo": False, "color": False}
    assert pixels["plain"].mean() < 110 < pixels["sketch"].mean()  # white on black, black on white
    assert set(np.unique(pixels["sketch"])) == {0, 255}


def test_colors_of_colored_digits_tell_the_label_as_often_as_their_names_say() -> None:
    rows = load_embedded("colored_digits")["train"]
    names = rows.features["domain"].names
    assert names == ["+90%", "+80%", "-90%"]
    red_or_green = np.array([np.asarray(row["image"]).max(axis=(0, 1))[:2].argmax() for row in rows])
    told = red_or_green == np.array(rows["label"][:])
    for k, rate in enumerate((0.9, 0.8, 0.1)):
        # 1,100 draws: three standard errors are 3·√(.25/1100) = .045 at the most.
        assert told[np.array(rows["domain"][:]) == k].mean() == pytest.approx(rate, abs=0.045)


def test_rotation_by_zero_is_the_scan_itself() -> None:
    rotated, plain = load_embedded("rotated_digits")["test"], load_embedded("style_digits")["test"]
    for i in range(5):
        assert rotated[i]["scan"] == plain[i]["scan"]
        # Bilinear rotation by 0 degrees is the identity up to one rounding of a grey level.
        assert np.abs(np.asarray(rotated[i]["image"], int) - np.asarray(plain[i]["image"], int)).max() <= 1


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'style_digits', 'rotated_digits', 'colored_digits'"):
        load_embedded("mnist")
    with pytest.raises(ValueError, match="style_digits"):
        load_domains("no/such-dataset")


# ---- Holding a domain out ----


@pytest.mark.parametrize("held_out", ["plain", "photo", "sketch", "color"])
def test_the_held_out_domain_is_tested_on_and_nothing_else(style_digits: datasets.DatasetDict, held_out: str) -> None:
    splits = hold_out(style_digits, held_out)
    assert domain_names(splits["test"]) == [held_out]
    for split in ("train", "validation"):
        assert held_out not in domain_names(splits[split])
        assert len(domain_names(splits[split])) == 3


@pytest.mark.parametrize("kind", ["string", "integer", "label"])
def test_single_set_is_split_by_domain_and_class(kind: str) -> None:
    names = ["b", "a", "c"] if kind != "integer" else [30, 4, 5]
    rows = [(d, y) for d in names for y in (0, 1) for _ in range(10)]
    data = datasets.Dataset.from_dict({"domain": [d for d, _ in rows], "label": [y for _, y in rows]})
    if kind == "label":
        data = data.class_encode_column("domain")
    held_out = str(names[0])
    splits = hold_out(data, held_out, validation_fraction=0.3, seed=1)
    assert domain_names(splits["test"]) == [held_out]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 28, "validation": 12, "test": 20}
    for domain in set(splits["validation"]["domain"][:]):
        own = [
            y for d, y in zip(splits["validation"]["domain"], splits["validation"]["label"], strict=True) if d == domain
        ]
        assert sorted(own) == [0, 0, 0, 1, 1, 1]
    again = hold_out(data, held_out, validation_fraction=0.3, seed=1)
    other = hold_out(data.add_column("row", range(60)), held_out, validation_fraction=0.3, seed=2)
    assert again["train"].to_dict() == splits["train"].to_dict()
    first = hold_out(data.add_column("row", range(60)), held_out, validation_fraction=0.3, seed=1)
    assert first["validation"]["row"][:] != other["validation"]["row"][:]


def test_bad_splits_say_what_is_there(style_digits: datasets.DatasetDict) -> None:
    with pytest.raises(ValueError, match="'plain', 'photo', 'sketch', 'color'"):
        hold_out(style_digits, "watercolor")
    with pytest.raises(ValueError, match="'image', 'label', 'domain', 'scan'"):
        hold_out(style_digits, "plain", domain_column="style")
    with pytest.raises(ValueError, match="leaves 1"):
        hold_out(datasets.Dataset.from_dict({"domain": ["a", "b"], "label": [0, 1]}), "a")
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(style_digits, "plain", validation_fraction=1.0)


def test_every_beginning_of_a_deal_holds_each_class_in_proportion() -> None:
    labels = np.random.default_rng(0).choice(5, 300, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    order = deal(labels, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(300))
    counts = np.cumsum(labels[order][:, None] == np.arange(5), axis=0)
    ideal = np.arange(1, 301)[:, None] * np.bincount(labels) / 300
    # Each class begins at a random place within its first step, so it may be one row off, and the beginning too.
    assert np.abs(counts - ideal).max() <= 2


def test_scans_of_the_splits_stay_what_they_are(style_digits: datasets.DatasetDict) -> None:
    """Golden numbers: results on these sets compare only while the splits do not move."""
    assert {split: rows["scan"][:6] for split, rows in style_digits.items()} == {
        "train": [0, 2, 3, 4, 5, 6],
        "validation": [22, 29, 36, 42, 50, 70],
        "test": [1, 13, 14, 20, 21, 28],
    }


# ---- Folders ----


def test_folder_has_one_class_list_for_all_domains(tmp_path: Path) -> None:
    save(tmp_path, "Real World", "hund", "1.png")
    save(tmp_path, "Real World", "katze", "1.png")
    save(tmp_path, "Skizze über", "katze", "1.PNG")  # lacks a class, and comes in capitals
    save(tmp_path, ".hidden", "katze", "1.png")
    save(tmp_path, "__MACOSX", "katze", "1.png")
    (tmp_path / "readme.txt").write_text("stray")
    (tmp_path / "Real World" / "hund" / "notes.txt").write_text("no image")
    data = load_image_folder(tmp_path)
    assert data.features["domain"].names == ["Real World", "Skizze über"]
    assert data.features["label"].names == ["hund", "katze"]
    assert list(zip(data["domain"][:], data["label"][:], strict=True)) == [(0, 0), (0, 1), (1, 1)]


def test_stray_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "day", "cat", "1.png")
    (tmp_path / "readme.txt").write_text("stray")
    load_image_folder(tmp_path)
    assert "readme.txt" in caplog.text


def test_folder_of_another_layout_says_which_is_expected(tmp_path: Path) -> None:
    save(tmp_path, "cat", "1.png")
    with pytest.raises(ValueError, match="domain/class/file"):
        load_image_folder(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_image_folder(tmp_path / "nowhere")


def test_skip_leaves_out_and_counts_what_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        save(tmp_path, "day", "cat", f"{i}.png")
    (tmp_path / "day" / "cat" / "1.png").write_bytes(b"no picture")
    assert len(load_domains(str(tmp_path))) == 3
    assert len(load_domains(str(tmp_path), on_bad_image="skip")) == 2
    assert "1 unreadable image(s) of 3" in caplog.text
    assert "1.png" in caplog.text


def test_folder_of_parquet_is_read_by_datasets(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png((1, 2, 3)), "path": None}] * 2, "label": ["b", "a"], "domain": ["x", "y"]}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.Value("string"), domain=datasets.Value("string")
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_domains(str(tmp_path))
    assert data.features["label"].names == ["a", "b"]
    assert decode_image(data[0]["image"]).getpixel((0, 0)) == (1, 2, 3)


# ---- Decoding ----


def test_images_of_every_mode_become_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    deep = Image.fromarray(np.full((4, 4), 65535 // 2, dtype=np.uint16))
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    frames = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    for image, expected in (
        (cmyk, (255, 0, 0)),
        (deep, (127, 127, 127)),
        (clear, (255, 255, 255)),  # transparency is laid on white
        (palette, (10, 20, 30)),
        ({"bytes": frames.getvalue(), "path": None}, (255, 0, 0)),  # the first frame of an animation
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
    ):
        decoded = decode_image(image)
        assert decoded.mode == "RGB"
        # CMYK is converted with rounding; one level is its size.
        assert np.abs(np.asarray(decoded, int)[0, 0] - expected).max() <= 1


def test_rotation_noted_by_the_camera_is_applied() -> None:
    image, file, exif = Image.new("RGB", (6, 4), "black"), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate by 90 degrees
    image.save(file, "JPEG", exif=exif)
    assert decode_image({"bytes": file.getvalue(), "path": None}).size == (4, 6)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", png((1, 2, 3), size=(64, 64))[:60]], ids=["empty", "text", "cut"]
)
def test_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "töchter 1.png"
    file.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"töchter 1\.png.*on-bad-image"):
        decode_image({"bytes": None, "path": str(file)})


def test_collator_gives_what_the_processor_gives() -> None:
    _, processor = tiny_clip(["a", "b"])
    rows = [{"image": {"bytes": png((255, 0, 0)), "path": None}, "label": 1}, {"image": png_image(), "label": 0}]
    batch = ImageCollator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [1, 0]
    expected = processor(images=[Image.new("RGB", (20, 16), "red")], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0], expected)
    assert "labels" not in ImageCollator(processor)([{"image": rows[0]["image"]}])


def png_image() -> Image.Image:
    return Image.open(io.BytesIO(png((0, 255, 0))))


def test_preprocessing_once_equals_collating(style_digits: datasets.DatasetDict) -> None:
    _, processor = tiny_clip([str(i) for i in range(10)])
    rows = undecoded(style_digits["validation"].select(range(0, 800, 100)))
    batch = ImageCollator(processor)([rows[i] for i in range(len(rows))])
    tensors = preprocess(rows, processor)
    assert torch.equal(tensors.columns["pixel_values"], batch["pixel_values"])
    assert torch.equal(tensors.columns["labels"], batch["labels"])
    assert [int(tensors[i]["domain"]) for i in range(len(tensors))] == rows["domain"][:]
