"""Checkpoints that a kill left half-written are never resumed from, and renamed weights come back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from assertions import assert_same_bits
from training import Rows, build, image_rows, train, vit, weights

from hf_sage import SAGETrainer
from hf_sage.ascents import L2Ascent
from hf_sage.methods import Method
from hf_sage.trainer.checkpoints import complete_checkpoints, load_renamed

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[torch.Tensor]]:
    """A training with three checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, weights(train(vit(), Rows(image_rows()), output_dir=str(folder), **SAVED).model)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def names(folder: Path, **options: int) -> list[str]:
    return [Path(path).name for path in complete_checkpoints(folder, **options)]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_whole_checkpoints_come_in_the_order_of_their_updates(folder):
    (folder / "checkpoint-3").rename(folder / "checkpoint-10")
    (folder / "checkpoint-best").mkdir()
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-10"]


def test_what_another_method_remembered_under_the_same_name_is_forgotten(folder):
    torch.save({"objective": {"q": torch.ones(3)}}, folder / "checkpoint-3" / "method.pt")
    train(vit(), Rows(image_rows()), output_dir=str(folder), **SAVED)
    assert names(folder)[-1] == "checkpoint-3"
    assert not (folder / "checkpoint-3" / "method.pt").exists()


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
def test_a_checkpoint_without_its_trainer_state_is_not_whole(folder, damage):
    damage(folder / "checkpoint-3" / "trainer_state.json")
    assert names(folder) == ["checkpoint-1", "checkpoint-2"]


def test_every_rank_must_have_saved_its_random_state(folder):
    assert names(folder, world_size=2) == []
    for step in (1, 2):
        for rank in (0, 1):
            state = folder / f"checkpoint-{step}" / "rng_state.pth"
            shutil.copy(state, state.with_name(f"rng_state_{rank}.pth"))
    assert names(folder, world_size=2) == ["checkpoint-1", "checkpoint-2"]
    cut_short(folder / "checkpoint-2" / "rng_state_1.pth")
    assert names(folder, world_size=2) == ["checkpoint-1"]


def test_resuming_passes_over_a_half_written_checkpoint(folder, saved):
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    cut_short(folder / "checkpoint-3" / "model.safetensors")
    resumed = train(vit(), Rows(image_rows()), resume=True, output_dir=str(folder), **SAVED)
    assert_same_bits(weights(resumed.model), saved[1])


def test_nothing_whole_to_resume_from_is_an_error_with_the_cure(folder):
    for state in folder.glob("*/trainer_state.json"):
        state.unlink()
    with pytest.raises(ValueError, match=r"None of the checkpoints.*resume_from_checkpoint"):
        train(vit(), Rows(image_rows()), resume=True, output_dir=str(folder), **SAVED)


def test_no_checkpoint_at_all_is_stocks_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        train(vit(), Rows(image_rows()), resume=True, output_dir=str(tmp_path), **SAVED)


class Killed(SAGETrainer):
    """Stops where it would write a checkpoint's weights."""

    def save_model(self, *args, **kwargs) -> None:
        raise KeyboardInterrupt


def test_a_checkpoint_that_is_written_again_is_not_whole_until_it_is(folder):
    with pytest.raises(KeyboardInterrupt):
        train(
            vit(),
            Rows(image_rows()),
            resume=str(folder / "checkpoint-1"),
            trainer=Killed,
            output_dir=str(folder),
            **SAVED,
        )
    assert names(folder) == ["checkpoint-1", "checkpoint-3"]


def test_the_best_model_comes_back_where_its_weights_were_renamed(tmp_path):
    """transformers 5 saves ViT under other names than the model's, and stock Trainer keeps the last weights."""
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "eval_dataset": Rows(image_rows()),
    }
    worse = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 0.05}
    trainer = train(vit(), Rows(image_rows()), output_dir=str(tmp_path), **SAVED, **best, **worse)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    expected = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert_same_bits(weights(trainer.model), weights(expected))


def test_weights_of_the_same_names_are_left_to_the_base(tmp_path):
    model = torch.nn.Linear(2, 2)
    assert not load_renamed(model, str(tmp_path))


def test_a_method_that_no_checkpoint_can_hold_is_refused_at_once(tmp_path):
    class Nowhere(L2Ascent):
        """Defined where no unpickler finds it."""

    method = Method("own", ascent=Nowhere(0.1))
    options = {"method": method, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"'own' cannot be saved.*save_strategy=\"no\""):
        build(vit(), Rows(image_rows()), save_strategy="steps", **options)
    build(vit(), Rows(image_rows()), save_strategy="no", **options)
