"""Sets that are made from local files of another layout: MNIST's four, and Camelyon17-WILDS' metadata."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import hub_folder, hub_rows, png
from PIL import Image
from test_domainbed import intercept

from hf_sage.data import CAMELYON17, DATASETS, decode_image, domain_counts, load_domains
from hf_sage.data import camelyon as camelyon_module

# ---- MNIST ----

TRAIN, TEST = 360, 60


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder as torchvision lays it out, half of it gzipped, with the images and digits of both parts."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, TRAIN + TEST).astype(np.uint8)
    images = rng.integers(1, 256, (TRAIN + TEST, 28, 28)).astype(np.uint8)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(images[:TRAIN]))
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(digits[:TRAIN])))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[TRAIN:])))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(digits[TRAIN:]))
    return root, images, digits


def pixels(data: datasets.Dataset, domain: int) -> np.ndarray:
    return np.stack([np.asarray(decode_image(row["image"])) for row in data if row["domain"] == domain])


def labels(data: datasets.Dataset, domain: int) -> np.ndarray:
    return np.array([row["label"] for row in data if row["domain"] == domain])


def test_rotated_mnist_deals_shuffled_images_out_and_turns_them(mnist: tuple) -> None:
    root, images, digits = mnist
    data = load_domains("RotatedMNIST", root=root, seed=3)
    assert data.features["domain"].names == ["0", "15", "30", "45", "60", "75"]
    torch.manual_seed(3)  # DomainBed draws from torch's own generator
    order = torch.randperm(len(images)).numpy()
    for i, angle in enumerate((0, 15, 30, 45, 60, 75)):
        own = order[i::6]
        assert (labels(data, i) == digits[own]).all()
        turned = Image.fromarray(images[own[0]]).rotate(angle, resample=Image.Resampling.BILINEAR)
        assert (pixels(data, i)[0] == np.asarray(turned)[..., None]).all()
    assert (pixels(data, 0)[..., 1] == images[order[0::6]]).all()


def test_colored_mnist_is_drawn_as_domainbed_draws(mnist: tuple) -> None:
    root, images, digits = mnist
    data = load_domains("ColoredMNIST", root=root, seed=1)
    torch.manual_seed(1)
    order = torch.randperm(len(images))
    for i, flip in enumerate((0.1, 0.2, 0.9)):
        own = order[i::3].numpy()
        label = (digits[own] < 5) ^ (torch.rand(len(own)) < 0.25).numpy()
        color = label ^ (torch.rand(len(own)) < flip).numpy()
        assert (labels(data, i) == label).all()
        found = pixels(data, i)
        assert (found[np.arange(len(own)), :, :, color.astype(int)] == images[own]).all()
        assert found.sum(-1).max() <= 255  # the other channels are black
    assert data.features["label"].names == ["5-9", "0-4"]


def test_mnist_is_a_function_of_its_seed(mnist: tuple) -> None:
    once, again, other = (load_domains("ColoredMNIST", root=mnist[0], seed=seed).to_dict() for seed in (0, 0, 1))
    assert once == again
    assert once["label"] != other["label"]


def test_mnist_files_that_are_missing_or_cut_are_named(mnist: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by root"):
        load_domains("RotatedMNIST")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load_domains("RotatedMNIST", root=tmp_path)
    for file in (mnist[0] / "MNIST" / "raw").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*cut short"):
        load_domains("RotatedMNIST", root=tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match="not a file of MNIST"):
        load_domains("RotatedMNIST", root=tmp_path)


# ---- Camelyon17-WILDS ----


@pytest.fixture
def small_camelyon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declares two patches a hospital."""
    small = dataclasses.replace(CAMELYON17, counts=dict.fromkeys(CAMELYON17.domains, 2), total=10)
    for module in (camelyon_module, load_domains.__globals__):
        target = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(target, "CAMELYON17", small)
    monkeypatch.setitem(load_domains.__globals__["DECLARED"], CAMELYON17.name, small)


@pytest.fixture
def camelyon_folder(tmp_path: Path) -> Path:
    """Two patches of each hospital, as WILDS lays them out; the hospitals are not in order."""
    folder = tmp_path / "camelyon17_v1.0"
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for row, center in enumerate([3, 0, 4, 1, 2] * 2):
        case = f"patient_{row:03d}_node_4"
        (folder / "patches" / case).mkdir(parents=True)
        (folder / "patches" / case / f"patch_{case}_x_{row}_y_7.png").write_bytes(png(row))
        lines.append(f"{row},{row:03d},4,{row},7,{row % 2},0,{center},0")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.usefixtures("small_camelyon")
@pytest.mark.parametrize("inside", [False, True], ids=["above", "the folder itself"])
def test_camelyon_is_read_from_its_metadata(camelyon_folder: Path, inside: bool) -> None:
    root = camelyon_folder / "camelyon17_v1.0" if inside else camelyon_folder
    data = load_domains("Camelyon17-WILDS", root=root)
    assert domain_counts(data) == {f"hospital_{i}": 2 for i in range(5)}
    assert data["domain"][:] == [3, 0, 4, 1, 2] * 2
    assert data["label"][:] == [0, 1] * 5
    assert decode_image(data[4]["image"]).tobytes() == decode_image({"bytes": png(4), "path": None}).tobytes()


@pytest.mark.usefixtures("small_camelyon")
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_camelyon_on_the_hub_keeps_the_numbers_of_its_hospitals(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy's names are of splits; its numbers are WILDS'."""
    names = datasets.ClassLabel(names=["train-1", "validation", "test", "train-2", "train-3"])
    parts = {
        split: hub_rows(centers, names, ["normal", "tumor"], images=1, domain="center")
        for split, centers in (("train", [4, 0, 3]), ("validation", [1]), ("test", [2]))
    }
    asked = intercept(monkeypatch, hub_folder(tmp_path / "copy", parts))
    data = load_domains("Camelyon17-WILDS", streaming=streaming, on_bad_image="skip")
    revision = "d784d5344ba6c967f83f9f3d9b2f1e2a4d6eb78f"
    assert asked == [
        ("wltjr1007/Camelyon17-WILDS", {"split": split, "streaming": streaming, "revision": revision})
        for split in parts
    ]
    assert [row["domain"] for row in data] == [4, 4, 0, 0, 3, 3, 1, 1, 2, 2]
    assert data.features["domain"].names[4] == "hospital_4"
    assert data.features["label"].names == ["normal", "tumor"]


def test_camelyon_that_is_incomplete_or_elsewhere_is_explained(camelyon_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 images in 'hospital_0' instead of 59,436"):
        load_domains("Camelyon17-WILDS", root=camelyon_folder)
    with pytest.raises(ValueError, match=r"No metadata\.csv"):
        load_domains("Camelyon17-WILDS", root=tmp_path / "patches")
    (camelyon_folder / "camelyon17_v1.0" / "metadata.csv").write_text("patient,node\n1,2\n")
    with pytest.raises(ValueError, match="'center'"):
        load_domains("Camelyon17-WILDS", root=camelyon_folder)


def test_every_declared_name_is_known_to_load_domains() -> None:
    for name in (*DATASETS, "Camelyon17-WILDS", "RotatedMNIST"):
        with pytest.raises(ValueError, match="root"):
            load_domains(name)
