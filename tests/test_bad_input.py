"""Images, folders and checkpoints that will not do, and a full disk: what each command makes of them.

Every case is one folder with one flaw. A command either says on one line what is wrong and ends with status 1, or does
its work with what is good; never a traceback, and nothing that was there is lost.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmark_worker import DOMAINS, paint
from checkpoints import save_text_model, save_vit
from pictures import png
from PIL import Image
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from hf_sage.benchmark.store import Store
from hf_sage.cli import main

TRAIN = ["--max_steps", "2", "--per_device_train_batch_size", "6", "--use_cpu", "--report_to", "none"]
TRAIN += ["--disable_tqdm", "true", "--save_strategy", "no", "--output_dir", "one"]
BENCHMARK = [
    "--methods",
    "erm",
    "--seeds",
    "1",
    "--steps",
    "2",
    "--rows-per-domain",
    "2",
    "--workers",
    "1",
    "-o",
    "many",
]

Spoil = Callable[[Path], None]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four domains of two classes, as a relative path."""
    monkeypatch.chdir(tmp_path)
    return paint(Path("pictures"))


class Said:
    """What a command printed, by stream, and in one line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        out, self.errors = capsys.readouterr()
        self.all = " ".join((out + self.errors).split())

    def is_one_line_of(self, command: str) -> bool:
        lines = [line for line in self.errors.splitlines() if line.startswith("hf-sage ")]
        return len(lines) == 1 and lines[0].startswith(f"hf-sage {command}: ") and "Traceback" not in self.errors


def train(*flags: str) -> int:
    return main(["train", "--dataset", "pictures", "--held_out", "night", *TRAIN, *flags])


def benchmark(*flags: str) -> int:
    return main(["benchmark", "--dataset", "pictures", "--held-out", "night", *BENCHMARK, *flags])


# ---- Images ----


def cut(root: Path) -> None:
    (root / "day" / "cat" / "0.png").write_bytes(png(size=(64, 64))[:60])


def no_image(root: Path) -> None:
    (root / "day" / "cat" / "0.png").write_text("<html>not found</html>")


@pytest.mark.parametrize("spoil", [cut, no_image])
def test_an_unreadable_image_is_named_by_every_command(
    spoil: Spoil, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(pictures)
    file = "pictures/day/cat/0.png"
    assert main(["data", "check", "pictures"]) == 1
    assert f"Cannot be read as an image: {file}" in Said(capsys).all
    assert train("--max_steps", "6") == 1  # of 30 rows, so that all are read
    said = Said(capsys)
    assert said.is_one_line_of("train")
    assert f"Cannot read the image {file}" in said.all
    assert benchmark() == 1
    assert f"Cannot read the image {file}" in Said(capsys).all
    assert "0.png" in next(Path("many").glob("jobs/*/error.txt")).read_text()


def test_an_unreadable_image_is_left_out_and_counted(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut(pictures)
    assert train("--on_bad_image", "skip") == 0
    assert "Left out 1 unreadable image(s) of 48: pictures/day/cat/0.png" in caplog.text
    Path("skip.yaml").write_text("on_bad_image: skip\n")
    assert main(["benchmark", "skip.yaml", "--dataset", "pictures", "--held-out", "night", *BENCHMARK]) == 0
    (result,) = Store.open("many").results()
    assert result.data.rows == dict.fromkeys(DOMAINS, 12) | {"day": 11}


def test_odd_images_are_trained_on(pictures: Path) -> None:
    folder, turned = pictures / "day" / "cat", Image.Exif()
    turned[0x0112] = 6  # Orientation: rotate by 90 degrees
    with Image.open(folder / "0.png") as image:
        image.convert("CMYK").save(folder / "cmyk.jpg")
        image.save(folder / "moves.gif", save_all=True, append_images=[image.rotate(90)])
        image.save(folder / "turned.jpeg", exif=turned)
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "16 bits.png")
    assert main(["data", "check", "pictures"]) == 0
    assert train() == 0
    assert benchmark() == 0
    (result,) = Store.open("many").results()
    assert result.data.rows["day"] == 16


# ---- Folders ----


def test_an_empty_class_is_told_and_is_no_class(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "day" / "bird").mkdir()
    assert main(["data", "check", "pictures"]) == 1
    assert "The class folder day/bird holds no image" in Said(capsys).all
    assert benchmark() == 0
    (result,) = Store.open("many").results()
    assert result.data.classes == ["cat", "dog"]


@pytest.mark.parametrize(("images", "kind"), [(1, "problem"), (4, "note")])
def test_a_domain_too_small_to_split_is_told_and_trained_on_where_that_is_possible(
    images: int, kind: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "fog" / "cat").mkdir(parents=True)
    for i in range(images):
        shutil.copy(pictures / "day" / "cat" / f"{i}.png", pictures / "fog" / "cat")
    main(["data", "check", "pictures"])
    assert f"{kind}: The domain 'fog' has {'one image' if images == 1 else '4 images'}" in Said(capsys).all
    assert train() == 0  # validated on the other domains
    assert benchmark("--seeds", "3") == 1
    said = Said(capsys).all
    assert f"The domain 'fog' has {images} image(s), of which 20% is none" in said
    assert said.count("Failed: ") == 1  # three jobs of one message
    assert "seed 0 and 2 more" in said


def test_any_names_go_the_whole_way(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "day").rename(pictures / "Außen früh")
    (pictures / "dusk").rename(pictures / "in  doors & [x] | 50%")
    for domain in pictures.iterdir():
        (domain / "cat").rename(domain / "kočka: (犬) #1")
    assert main(["data", "check", "pictures"]) == 0
    assert train("--held_out", "Außen früh") == 0
    assert benchmark("--held-out", "Außen früh", "in  doors & [x] | 50%", "--save-models") == 0
    assert main(["report", "many"]) == 0
    assert r"50\%" in Path("many/report/report.tex").read_text(encoding="utf-8")
    for folder in Store.open("many").jobs():
        capsys.readouterr()
        assert main(["card", str(folder.path)]) == 0
        assert "Außen früh" in capsys.readouterr().out
        assert main(["push", str(folder.path), "--repo-id", "me/x", "--dry-run"]) == 0
        assert json.loads((folder.model / "config.json").read_text())["id2label"]["1"] == "kočka: (犬) #1"


def test_labels_that_differ_are_told_and_those_written_in_two_ways_refused(
    pictures: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "dusk" / "cat").rename(pictures / "dusk" / "bird")
    assert main(["data", "check", "pictures"]) == 1
    assert "Labels differ between domains: 'dusk' has no image of 'cat'" in Said(capsys).all
    assert train() == 0
    assert benchmark() == 0
    assert "'dusk' has no cat" in caplog.text
    (pictures / "dusk" / "bird").rename(pictures / "dusk" / "Cat")
    for name, command in (("train", train), ("benchmark", benchmark)):
        capsys.readouterr()
        assert command() == 1
        said = Said(capsys)
        assert said.is_one_line_of(name)
        assert "'Cat' and 'cat'" in said.all


# ---- Checkpoints ----


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def other_architecture(folder: Path) -> None:
    shutil.rmtree(folder)
    save_text_model(folder)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_weights, "whole weights"),
        (no_processor, "preprocessor_config.json"),
        (other_architecture, "no image classifier in transformers. Use a whole CLIP"),
        (shutil.rmtree, "'start'"),
    ],
)
def test_a_checkpoint_that_will_not_do_is_told_once(
    spoil: Spoil, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_vit(Path("start"))
    spoil(Path("start"))
    assert train("--model", "start") == 1
    said = Said(capsys)
    assert said.is_one_line_of("train")
    assert says in said.all
    assert not any(Path("one").iterdir())
    assert benchmark("--model", "start", "--methods", "erm", "sam") == 1
    said = Said(capsys)
    assert "'start'" in said.all
    assert said.all.count("Failed: ") == 1  # two jobs, one message


# ---- A full disk ----


def disk_is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def says_no_space(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.usefixtures("pictures")
def test_a_disk_that_fills_while_training_costs_no_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    saved: list[object] = []
    save = safetensors_torch.save_file

    def until_full(*args: object, **kwargs: object) -> None:
        (says_no_space if saved else save)(*args, **kwargs)  # type: ignore[operator]
        saved.append(args)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", until_full)
        assert train(*saving) == 1
    said = Said(capsys)
    assert said.is_one_line_of("train")
    assert "The disk that holds one is full" in said.all
    assert "--resume_from_checkpoint true" in said.all
    assert (Path("one") / "checkpoint-1" / "trainer_state.json").exists()
    assert train(*saving, "--resume_from_checkpoint", "true") == 0  # as it says
    assert json.loads(Path("one/checkpoint-2/trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("command", ["report", "card"])
def test_a_disk_that_is_full_leaves_the_old_file(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert benchmark() == 0
    (folder,) = Store.open("many").jobs()
    argv, file = {
        "report": (["report", "many"], Path("many/report/report.md")),
        "card": (["card", str(folder.path), "-o", "card.md"], Path("card.md")),
    }[command]
    assert main(argv) == 0
    before = file.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("hf_sage.benchmark.records.os.fsync", disk_is_full)
    assert main(argv) == 1
    said = Said(capsys)
    assert said.is_one_line_of(command)
    assert "No space left on device" in said.all
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*.tmp"))
