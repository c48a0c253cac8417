"""SWAD: the average over the valley of the validation loss, worked out by hand, and the same after a restart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from torch import nn
from training import Rows, image_rows, train, vit, weights

from hf_sage.trainer.swad import SWADCallback


def lived(losses: list[float], updates: int = 2, **options: int | float) -> tuple[SWADCallback, nn.Linear]:
    """A training whose weight after update t is t, evaluated after every so many updates."""
    model = nn.Linear(1, 1, bias=False)
    callback = SWADCallback(**options)
    args: Any = SimpleNamespace(output_dir="nowhere", eval_strategy="steps")
    state: Any = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for loss in losses:
        for _ in range(updates):
            state.global_step += 1
            nn.init.constant_(model.weight, float(state.global_step))
            callback.on_step_end(args, state, None, model=model)
        callback.on_evaluate(args, state, None, metrics={"eval_loss": loss})
    callback.on_train_end(args, state, None, model=model)
    return callback, model


def mean(first: int, last: int) -> float:
    """Of the updates of segments ``first`` to ``last``, counted from 1, two updates each."""
    steps = range(2 * first - 1, 2 * last + 1)
    return sum(steps) / len(steps)


def test_weights_in_fp64_are_averaged_in_fp64():
    callback, model = SWADCallback(), nn.Linear(1, 1, bias=False).double()
    state: Any = SimpleNamespace(global_step=1)
    for value in (1.0, 1.0 + 2.0**-40):
        nn.init.constant_(model.weight, value)
        callback.on_step_end(None, state, None, model=model)
    assert callback._running is not None
    assert callback._running[0].item() == 1.0 + 2.0**-41


VALLEYS = {
    # Falls until segment 3, which 4 and 5 do not go below; all later ones stay below 1.3 times their mean.
    "to the end": ([9, 5, 3, 3.1, 3.2, 3.3, 3.1], (3, 7)),
    # 3.1 × 1.3 = 4.03 is exceeded from segment 6 on: after two such in a row it is over, before them.
    "until it overfits": ([9, 5, 3, 3.1, 3.2, 5, 6, 3], (3, 5)),
    # One bad segment alone does not end it.
    "over a bump": ([9, 5, 3, 3.1, 3.2, 6, 3, 3], (3, 8)),
    # The training ends on a bad one, which is left out.
    "bad at the end": ([9, 5, 3, 3.1, 3.2, 6], (3, 5)),
    "never": ([9, 8, 7, 6, 5], (5, 5)),
}


@pytest.mark.parametrize("case", VALLEYS)
def test_the_valley_by_hand(case):
    losses, (first, last) = VALLEYS[case]
    _, model = lived(losses, patience=3, overfit_patience=2)
    assert model.weight.item() == pytest.approx(mean(first, last), rel=1e-6)


def test_without_an_evaluation_the_weights_are_the_last(caplog):
    _, model = lived([], patience=3)
    last = model.weight.item()
    model_, callback = nn.Linear(1, 1, bias=False), SWADCallback(metric="eval_other")
    nn.init.constant_(model_.weight, last)
    state: Any = SimpleNamespace(global_step=1, is_world_process_zero=True)
    callback.on_train_end(None, state, None, model=model_)
    assert model_.weight.item() == last
    assert "eval_other" in caplog.text


RUN: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
}


@pytest.mark.parametrize("method", ["erm", "sage"])
def test_resumed_is_as_if_never_stopped(method, tmp_path):
    options = RUN | {"method": method, "eval_dataset": Rows(image_rows(8, seed=3)), "output_dir": str(tmp_path)}
    whole = train(vit(), Rows(image_rows()), callbacks=[SWADCallback(patience=2)], **options)
    again = [SWADCallback(patience=2)]
    resumed = train(vit(), Rows(image_rows()), callbacks=again, resume=str(tmp_path / "checkpoint-4"), **options)
    assert_same_bits(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_without_averages_is_an_error_with_the_cure(tmp_path):
    options = RUN | {"eval_dataset": Rows(image_rows(8, seed=3)), "output_dir": str(tmp_path)}
    train(vit(), Rows(image_rows()), **options)
    with pytest.raises(ValueError, match="no averages"):
        train(vit(), Rows(image_rows()), callbacks=[SWADCallback()], resume=str(tmp_path / "checkpoint-4"), **options)


def test_it_changes_nothing_before_the_end(tmp_path):
    """The last checkpoint holds the weights of a training without it."""
    options = RUN | {"eval_dataset": Rows(image_rows(8, seed=3)), "method": "sam"}
    plain = train(vit(), Rows(image_rows()), output_dir=str(tmp_path / "plain"), **options)
    averaged = train(
        vit(), Rows(image_rows()), output_dir=str(tmp_path / "swad"), callbacks=[SWADCallback(patience=2)], **options
    )
    last = vit()
    last.load_state_dict(type(last).from_pretrained(tmp_path / "swad" / "checkpoint-6").state_dict())
    assert_same_bits(weights(last), weights(plain.model))
    assert not all(torch.equal(a, b) for a, b in zip(weights(averaged.model), weights(plain.model), strict=True))


def test_it_needs_evaluations():
    with pytest.raises(ValueError, match="eval_strategy"):
        train(vit(), Rows(image_rows()), callbacks=[SWADCallback()])
