"""``hf-sage data``: the list, the findings on a set, and the contact sheet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import PACS_CLASSES, PACS_DOMAINS, folders, hub_folder, hub_rows, png
from PIL import Image

from hf_sage.data import DATASETS, load_embedded, load_image_folder, row_domains
from hf_sage.data import contact_sheet as sheet_module
from hf_sage.data.command import main
from hf_sage.data.contact_sheet import EMPTY, GAP, THUMBNAIL, contact_sheet
from hf_sage.data.digits import EMBEDDED_DOMAINS
from hf_sage.data.load import DECLARED

# ---- ls ----


def test_ls_names_every_set_with_its_domains_and_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, dataset in DATASETS.items():
        for domain in dataset.domains:
            assert domain in lines[name]
        assert f" {dataset.class_count} " in lines[name]
        assert f"{dataset.total:,}" in lines[name]
        assert f"{dataset.folder}/" in lines[name]
    assert "wltjr1007/DomainNet@ee20570a" in lines["DomainNet"]
    assert {"style_digits", "RotatedMNIST", "Camelyon17-WILDS"} <= set(lines)


@pytest.mark.parametrize("name", EMBEDDED_DOMAINS)
def test_embedded_sets_have_the_domains_that_ls_prints(name: str) -> None:
    data = load_embedded(name)["test"]
    assert tuple(data.features["domain"].names) == EMBEDDED_DOMAINS[name]


# ---- check ----


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["check", *arguments])
    return status, capsys.readouterr().out


def test_sound_folder_has_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path, ["Real World", "Skizze über"], ["hund", "kočka"], images=3)
    status, said = check(capsys, str(tmp_path))
    assert status == 0
    assert "12 images, 2 domains, 2 classes" in said
    assert [line.split() for line in said.splitlines() if line.startswith(("hund", "all"))] == [
        ["hund", "3", "3"],
        ["all", "6", "6"],
    ]
    assert "no problems" in said


def test_every_kind_of_problem_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path, ["day", "night"], ["cat", "Alarm_Clock"])
    folders(tmp_path, ["dusk"], ["alarm clock"], images=1)
    (tmp_path / "day" / "empty").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "day" / "cat" / "0.png").write_bytes(png()[:60])
    (tmp_path / "night" / "cat" / "1.png").write_text("<html>not found</html>")
    status, said = check(capsys, str(tmp_path))
    assert status == 1
    for problem in (
        f"Cannot be read as an image: {tmp_path / 'day' / 'cat' / '0.png'}",
        f"Cannot be read as an image: {tmp_path / 'night' / 'cat' / '1.png'}",
        "The class folder day/empty holds no image",
        "The domain 'dusk' has one image",
        "Labels differ between domains: 'dusk' has no image of 'Alarm_Clock', 'cat'",
        "The classes 'Alarm_Clock' and 'alarm clock' differ in case, spaces",
    ):
        assert f"problem: {problem}" in said
    assert "note: Left out: the folder '__MACOSX'" in said


def test_odd_images_are_read_and_cut_ones_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path, ["Außen", "In Doors"], ["chien"], images=2)
    folder = tmp_path / "Außen" / "chien"
    image, turned = Image.open(folder / "0.png"), Image.Exif()
    turned[0x0112] = 6  # Orientation: rotate by 90 degrees
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "16 bits.png")
    image.save(folder / "moves.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "turned.jpeg", exif=turned)
    status, said = check(capsys, str(tmp_path))
    assert (status, "8 images" in said) == (0, True)
    whole = (folder / "turned.jpeg").read_bytes()
    (folder / "turned.jpeg").write_bytes(whole[: len(whole) - 40])
    status, said = check(capsys, str(tmp_path))
    assert status == 1
    assert f"problem: Cannot be read as an image: {folder / 'turned.jpeg'}\n1 problem" in said


def test_declared_set_is_compared_with_its_declaration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(DATASETS["PACS"], counts=dict.fromkeys(PACS_DOMAINS, 7), total=28)
    monkeypatch.setitem(DECLARED, "PACS", small)
    folders(tmp_path / "PACS", PACS_DOMAINS, PACS_CLASSES, images=1)
    assert check(capsys, "PACS", "--root", str(tmp_path))[0] == 0
    folders(tmp_path / "PACS", ["photo"], ["dog"], images=2)
    status, said = check(capsys, "PACS", "--root", str(tmp_path))
    assert status == 1
    assert "problem: 8 images in 'photo' instead of 7" in said


def test_folder_of_parquet_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = hub_rows(["day", "night"], datasets.Value("string"), ["cat", "dog"])
    hub_folder(tmp_path / "copy", {"train": rows})
    status, said = check(capsys, str(tmp_path / "copy"))
    assert status == 0
    assert "8 images, 2 domains, 2 classes" in said


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such"):
        main(["check", str(tmp_path / "no such")])


# ---- preview ----


def test_preview_writes_a_picture_with_a_cell_for_every_domain_and_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders(tmp_path / "set", ["Real World", "Skizze über"], ["hund", "kočka", "犬"])
    output = tmp_path / "new" / "contact.png"
    assert main(["preview", str(tmp_path / "set"), "-o", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    sheet = Image.open(output)
    assert (sheet.format, sheet.mode) == ("PNG", "RGB")
    assert sheet.width > 3 * THUMBNAIL
    assert sheet.height > 2 * THUMBNAIL


def cells(sheet: Image.Image, rows: int, columns: int) -> np.ndarray:
    """``(rows, columns, THUMBNAIL, THUMBNAIL, 3)``, of a sheet whose names are narrower than a cell."""
    pixels = np.asarray(sheet)
    side, left = THUMBNAIL + GAP, sheet.width - columns * (THUMBNAIL + GAP)
    top = sheet.height - rows * side
    return np.stack(
        [
            [pixels[top + r * side :, left + c * side :][:THUMBNAIL, :THUMBNAIL] for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_cells_hold_the_right_image_grey_for_none_red_for_broken(tmp_path: Path) -> None:
    colors = {("a", "x"): (255, 0, 0), ("a", "y"): (0, 255, 0), ("b", "x"): (0, 0, 255)}
    for (domain, label), color in colors.items():
        folders(tmp_path, [domain], [label], images=0)
        Image.new("RGB", (50, 50), color).save(tmp_path / domain / label / "0.png")
    folders(tmp_path, ["c"], ["x"], images=1)
    (tmp_path / "c" / "x" / "0.png").write_bytes(b"broken")
    data = load_image_folder(tmp_path)
    found = cells(contact_sheet(data, row_domains(data), row_domains(data, "label")), 3, 2)
    for (r, c), (_, color) in zip(((0, 0), (0, 1), (1, 0)), colors.items(), strict=True):
        assert (found[r, c] == color).all()
    assert (found[1, 1] == int(EMPTY[1:3], 16)).all()
    assert (found[2, 0] == (255, 213, 213)).all()


def test_names_that_no_font_has_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the font inside Pillow alone: an empty box for each letter would be the same for "犬" and "猫"."""
    monkeypatch.setattr(sheet_module, "FONTS", ())
    monkeypatch.setattr(sheet_module, "find_spec", lambda _: None)
    fonts = sheet_module._fonts()
    written = {name: sheet_module._written(name, fonts)[0] for name in ("hund", "kočka ž", "犬", "猫", "Real World")}
    assert written == {
        "hund": "hund",
        "kočka ž": "kocka z",
        "犬": "[U+72AC]",
        "猫": "[U+732B]",
        "Real World": "Real World",
    }
