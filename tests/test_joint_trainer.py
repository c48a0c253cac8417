"""The trainer hands each update's one micro-batch to the step as one batch, wherever its groups can share a pass."""

from __future__ import annotations

import pytest
import torch
from problems import batch
from training import SAGE, clip, entries, image_rows, language_model, relative_differences, resnet, text_rows, train

from hf_sage.trainer import two_passes
from hf_sage.trainer.collator import join_rows, take_rows

SINGLE = 1e-5
"""fp32, three steps: the same sums in another order."""


@pytest.mark.parametrize(
    ("model", "rows", "shares"),
    [(clip, image_rows, True), (language_model, text_rows, True), (resnet, image_rows, False)],
    ids=["clip", "language model", "batch norm"],
)
def test_training_is_the_same_however_the_group_gradients_are_computed(model, rows, shares, monkeypatch):
    trained = train(model(), rows(), **SAGE)
    assert bool(trained._verdict.proven) == shares
    assert (trained._verdict.obstacle is None) == shares
    monkeypatch.setattr(two_passes, "as_joint", lambda *_, **__: None)
    other = train(model(), rows(), **SAGE)
    worst, mean = relative_differences(trained.model, other.model, model())
    assert worst < SINGLE
    assert mean < SINGLE
    assert shares or worst == 0  # as if nothing had been tried
    for a, b in zip(entries(trained), entries(other), strict=True):
        for name in ("loss", "agreement", "perturbed_loss", "loss/art", "loss/photo", "loss/sketch"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_several_micro_batches_go_through_the_network_group_by_group():
    trained = train(clip(), image_rows(), **SAGE, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    assert not trained._verdict.proven
    trained = train(
        clip(),
        image_rows(),
        **SAGE,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        perturbation_scope="local",
    )
    assert trained._verdict.proven


def test_rows_that_were_taken_join_again():
    x, names = batch().x, [str(i) for i in range(10)]
    inputs = {"x": x, "names": names, "inner": {"y": x[:, 0]}, "scale": 3, "zero": torch.tensor(1)}
    parts = [take_rows(inputs, rows, 10) for rows in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9])]
    joined = join_rows(parts, [3, 1, 6])
    assert torch.equal(joined["x"], x)
    assert torch.equal(joined["inner"]["y"], x[:, 0])
    assert (joined["names"], joined["scale"], joined["zero"]) == (names, 3, 1)
