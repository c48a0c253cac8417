"""Datasets as folders: what is written is read back the same, and nothing is overwritten."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import folders, hub_rows, png
from PIL import Image

from hf_sage.data import EMBEDDED, decode_image, load_embedded, load_image_folder, row_domains
from hf_sage.data.command import main
from hf_sage.data.digits import EMBEDDED_DOMAINS, SCANS
from hf_sage.data.export import at_most, each_scan_once, export_folders


def pixels(data: datasets.Dataset) -> list[tuple[str, str, bytes]]:
    """Domain, class and picture of every row, in an order that does not depend on the rows'."""
    images = [decode_image(image).tobytes() for image in data["image"]]
    return sorted(zip(row_domains(data), row_domains(data, "label"), images, strict=True))


def test_a_folder_that_was_written_holds_the_same_rows(tmp_path: Path) -> None:
    data = hub_rows(["Außen", "in doors"], datasets.Value("string"), ["hund", "kočka"], images=3)
    assert export_folders(data, tmp_path / "new" / "root") == 12
    back = load_image_folder(tmp_path / "new" / "root")
    assert pixels(back) == pixels(data)
    # Written again it is the same folder, to the byte.
    export_folders(back, tmp_path / "again")
    assert pixels(load_image_folder(tmp_path / "again")) == pixels(data)


def test_files_are_written_as_they_are_and_pictures_as_png(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "JPEG")
    root = folders(tmp_path / "root", ["day"], ["cat"], images=1)
    (root / "day" / "cat" / "1.jpg").write_bytes(buffer.getvalue())
    export_folders(load_image_folder(root), tmp_path / "out")
    written = {file.name: file.read_bytes() for file in (tmp_path / "out" / "day" / "cat").iterdir()}
    assert written == {"0.png": png(0), "1.jpeg": buffer.getvalue()}


@pytest.mark.parametrize("name", EMBEDDED)
def test_each_scan_is_dealt_to_one_domain(name: str) -> None:
    data = datasets.concatenate_datasets(list(load_embedded(name).values()))
    once = each_scan_once(data)
    assert sorted(once["scan"][:]) == list(range(sum(SCANS.values())))
    every, dealt = (Counter(zip(row_domains(d), row_domains(d, "label"), strict=True)) for d in (data, once))
    # Every domain has its share of each class, up to one image.
    assert all(abs(dealt[place] - count / len(EMBEDDED_DOMAINS[name])) < 1 for place, count in every.items())


def test_at_most_so_many_of_each_class_in_each_domain() -> None:
    data = hub_rows(["a", "b"], datasets.Value("string"), ["x", "y"], images=3)
    chosen = at_most(data.select(range(11)), 2)  # of the last class one image is missing
    assert set(Counter(zip(row_domains(chosen), row_domains(chosen, "label"), strict=True)).values()) == {2}
    assert at_most(data, 9).num_rows == 12


def test_command_exports_checks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    assert main(["export", "colored_digits", str(out), "--images", "2"]) == 0
    assert f"{out}: 12 images" in capsys.readouterr().out
    assert main(["check", str(out)]) == 0
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="is there already"):
        main(["export", "colored_digits", str(out)])
    with pytest.raises(ValueError, match="--images"):
        main(["export", "colored_digits", str(tmp_path / "none"), "--images", "0"])
    assert sorted(out.rglob("*")) == before
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["a/b", ".hidden", ""])
def test_names_that_no_folder_can_have_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    data = hub_rows([name, "b"], datasets.Value("string"), ["x"])
    with pytest.raises(ValueError, match="rename"):
        export_folders(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path / "root", ["day"], ["cat"])
    (root / "day" / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png"):
        export_folders(load_image_folder(root), tmp_path / "out")


def test_embedded_folder_is_the_set_itself(tmp_path: Path) -> None:
    data = at_most(each_scan_once(load_embedded("style_digits")["validation"]), 1)
    export_folders(data, tmp_path / "out")
    back = load_image_folder(tmp_path / "out")
    assert pixels(back) == pixels(data)
    assert np.asarray(decode_image(back[0]["image"])).shape == (16, 16, 3)
