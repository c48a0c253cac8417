"""The domain column's way from the dataset to the step: sampler, collator, and what is refused."""

from __future__ import annotations

from collections import Counter
from copy import copy
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import BatchSampler
from training import (
    DOMAINS,
    SAGE,
    Rows,
    accuracy,
    build,
    entries,
    hub_dataset,
    image_rows,
    max_difference,
    relative_differences,
    train,
    vit,
    without,
)

from hf_sage import SAGETrainer
from hf_sage.trainer import DomainBalancedSampler
from hf_sage.trainer.collator import take_rows

UNEQUAL = ["a"] * 11 + ["b"] * 2 + ["c"] * 6 + ["d"] * 5
EPOCHS = 7


def epoch(sampler: DomainBalancedSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


def balanced(domains: list[Any]) -> bool:
    """Whether all four domains come equally often, give or take one."""
    counts = [domains.count(d) for d in "abcd"]
    return max(counts) - min(counts) <= 1


# ---- Sampler ----


@pytest.mark.parametrize("batch", [4, 6, 10])
def test_every_window_is_balanced_across_epochs_too(batch):
    sampler = DomainBalancedSampler(UNEQUAL, batch)
    domains = [UNEQUAL[i] for number in range(EPOCHS) for i in epoch(sampler, number)]
    assert all(
        balanced(domains[start : start + width]) for start in range(len(domains)) for width in range(1, len(domains))
    )


@pytest.mark.parametrize(("batch", "length"), [(4, 24), (10, 20), (24, 24), (60, 60)])
def test_an_epoch_is_as_long_as_the_data_in_whole_batches(batch, length):
    sampler = DomainBalancedSampler(UNEQUAL, batch)
    assert len(sampler) == length
    assert all(len(epoch(sampler, number)) == length for number in range(3))


def test_order_depends_on_seed_and_epoch_alone():
    a, b, other = (DomainBalancedSampler(UNEQUAL, 4, seed) for seed in (3, 3, 4))
    orders = [epoch(a, number) for number in range(EPOCHS)]
    torch.manual_seed(99)
    assert [epoch(b, number) for number in reversed(range(EPOCHS))] == orders[::-1]
    assert all(x != y for x, y in pairwise(orders))
    assert epoch(other, 0) != orders[0]


@pytest.mark.parametrize("batch", [4, 10])
def test_no_row_returns_before_its_domain_is_through(batch):
    sampler = DomainBalancedSampler(UNEQUAL, batch)
    seen = [i for number in range(EPOCHS) for i in epoch(sampler, number)]
    for domain in "abcd":
        rows = [i for i, d in enumerate(UNEQUAL) if d == domain]
        stream = [i for i in seen if UNEQUAL[i] == domain]
        rounds = [stream[at : at + len(rows)] for at in range(0, len(stream), len(rows))]
        assert len(rounds) > 2
        assert all(sorted(one) == rows for one in rounds[:-1])
        assert len(set(rounds[-1])) == len(rounds[-1])
    assert Counter(UNEQUAL[i] for i in epoch(sampler, 0)) == {d: len(sampler) // 4 for d in "abcd"}


def test_names_of_domains_do_not_matter_to_the_sampler():
    renamed = [{"a": "z", "b": 7, "c": "c", "d": -1}[d] for d in UNEQUAL]
    for number in range(3):
        assert epoch(DomainBalancedSampler(renamed, 6), number) == epoch(DomainBalancedSampler(UNEQUAL, 6), number)


def test_sampler_refuses_a_batch_smaller_than_the_domains():
    with pytest.raises(ValueError, match=r"3 rows cannot hold one of each of 4 domains.*natural"):
        DomainBalancedSampler(UNEQUAL, 3)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_is_balanced(ranks, split):
    """A global batch of 24 over 2 or 4 ranks, cut as accelerate cuts it."""
    size = 24 // ranks
    sampler = DomainBalancedSampler(UNEQUAL * 3, 24)
    sampler.set_epoch(1)
    loaders = [BatchSampler(sampler, 24 if split else size, drop_last=False) for _ in range(ranks)]
    shards = [list(BatchSamplerShard(loader, ranks, rank, split)) for rank, loader in enumerate(loaders)]
    assert {len(shard) for shard in shards} == {len(sampler) // 24}  # as many updates on each rank, or they would hang
    for update in zip(*shards, strict=True):
        assert all(len(batch) == size and balanced([(UNEQUAL * 3)[i] for i in batch]) for batch in update)
    assert sorted(i for shard in shards for batch in shard for i in batch) == sorted(sampler)


def test_epochs_reach_the_sampler_through_the_trainer():
    seen: list[int] = []

    def recording(features: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(feature["row"] for feature in features)
        return {name: torch.stack([torch.as_tensor(f[name]) for f in features]) for name in ("pixel_values", "labels")}

    rows = [row | {"row": i} for i, row in enumerate(image_rows())]
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 6, "data_seed": 5}
    train(vit(), Rows(rows), data_collator=recording, remove_unused_columns=False, **options, **SAGE)
    sampler = DomainBalancedSampler([row["domain"] for row in rows], 6, seed=5)
    assert seen == epoch(sampler, 0) + epoch(sampler, 1)
    assert seen[:24] != seen[24:]


# ---- Kinds of domains ----

TYPES = {
    "string": DOMAINS,
    "integer": (0, 1, 0, 2),
    "large and negative": (2**62, -(2**62), 2**62, -7),
    "NumPy": tuple(np.int64(i) for i in (0, 1, 0, 2)),
    "tensor": tuple(torch.tensor(i) for i in (0, 1, 0, 2)),
}


def names_of(trainer: Any) -> set[str]:
    return {key.removeprefix("loss/") for key in entries(trainer)[0] if key.startswith("loss/")}


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_domain_is_the_same_training(kind):
    domains = TYPES[kind]
    rows = [row | {"domain": copy(row["domain"])} for row in image_rows(domains=domains)]  # each row its own tensor
    trainer = train(vit(), Rows(rows), **SAGE)
    reference = train(vit(), Rows(image_rows()), **SAGE)
    assert names_of(trainer) == {str(d.item() if isinstance(d, torch.Tensor) else d) for d in domains}
    # Another kind is another order of groups: sums are rounded otherwise, relative 1e-5.
    assert max(relative_differences(trainer.model, reference.model, start=vit())) < 1e-5


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("remove", [True, False])
def test_class_labels_have_their_names(form, remove):
    data = hub_dataset(image_rows()).cast_column("domain", datasets.ClassLabel(names=sorted(set(DOMAINS))))
    trainer = train(vit(), data.with_format(form), remove_unused_columns=remove, **SAGE)
    assert names_of(trainer) == set(DOMAINS)


def test_without_groups_no_domain_is_named_in_the_log():
    """SAM sees one group of all rows, whatever integers the domains are."""
    trainer = train(vit(), Rows(image_rows(domains=(-1, 0, 1))), method="sam")
    assert not names_of(trainer)


@pytest.mark.parametrize("value", [1.5, None, float("nan"), torch.tensor(0.5)])
def test_domains_that_cannot_be(value):
    with pytest.raises(ValueError, match=r"string, a ClassLabel or an integer.*domain_column=None"):
        train(vit(), Rows(image_rows(domains=(value, "a"))), **SAGE)


# ---- The model never sees the column ----


class Strict(nn.Module):
    """Takes what it knows and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layer(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OwnLoss(SAGETrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


@pytest.mark.parametrize("trainer", [SAGETrainer, OwnLoss])
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("method", ["sage", "sam", "erm"])
@pytest.mark.parametrize("domains", [DOMAINS, (0, 1)])
def test_column_never_reaches_the_model(method, remove, domains, trainer):
    data = hub_dataset(image_rows(domains=domains)).with_format("torch")
    options = {"remove_unused_columns": remove, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 6}
    done = train(Strict(), data, method=method, trainer=trainer, compute_metrics=accuracy, **options)
    assert done.evaluate(data)["eval_accuracy"] == done.predict(data).metrics["test_accuracy"]


# ---- No column, too few groups, too small a batch ----


@pytest.mark.parametrize("wrap", [Rows, hub_dataset])
@pytest.mark.parametrize("method", ["sage", "sam"])
def test_missing_column_is_an_error_with_both_cures(wrap, method):
    with pytest.raises(ValueError, match=r"'domain'.*'pixel_values', 'labels'.*domain_column=None"):
        build(vit(), wrap(without("domain", image_rows())), method=method)


def test_column_that_a_transform_drops_is_an_error():
    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        return {name: [torch.tensor(v) for v in rows[name]] for name in ("pixel_values", "labels")}

    data = hub_dataset(image_rows()).with_transform(transform)
    with pytest.raises(ValueError, match=r"no domain column 'domain'.*transform.*domain_column=None"):
        train(vit(), data, remove_unused_columns=False, **SAGE)


@pytest.mark.parametrize("rows", [image_rows(), without("domain", image_rows())])
def test_one_group_is_ascent_only(rows):
    trainer = train(vit(), Rows(rows), domain_column=None, **SAGE)
    for entry in entries(trainer):
        assert entry["perturbation_norm"] > 0
        assert "agreement" not in entry
        assert entry.get("noise_scale", 0) == 0
    assert not names_of(trainer)
    silent = train(vit(), Rows(rows), domain_column=None, **(SAGE | {"gamma": 0.0}))
    assert max_difference(trainer.model, silent.model) == 0


def test_fewer_than_two_domains_is_an_error():
    for options in ({}, {"domain_sampling": "natural"}):
        with pytest.raises(ValueError, match=r"at least two domains.*has 1.*domain_column=None"):
            train(vit(), Rows(image_rows(domains=("photo",))), **options, **SAGE)


def test_batch_must_hold_every_domain():
    data = Rows(image_rows())
    train(vit(), data, per_device_train_batch_size=1, gradient_accumulation_steps=3, **SAGE)
    with pytest.raises(ValueError, match=r"2 rows cannot hold one of each of 3 domains"):
        train(vit(), data, per_device_train_batch_size=1, gradient_accumulation_steps=2, **SAGE)
    with pytest.raises(ValueError, match=r"perturbation_scope='local'.*per_device_train_batch_size to 3"):
        train(vit(), data, per_device_train_batch_size=2, perturbation_scope="local", **SAGE)


def test_inputs_that_cannot_be_cut_by_example():
    batch = {
        "x": torch.arange(8).view(4, 2),
        "scale": torch.tensor(2.0),
        "ids": list("abcd"),
        "more": {"y": torch.ones(4)},
    }
    taken = take_rows(batch, [1, 3], 4)
    assert taken["x"].tolist() == [[2, 3], [6, 7]]
    assert (taken["scale"], taken["ids"], len(taken["more"]["y"])) == (2, ["b", "d"], 2)
    with pytest.raises(ValueError, match=r"'packed' has 1 rows in a batch of 4.*domain_column=None"):
        take_rows(batch | {"packed": torch.ones(1, 9)}, [1, 3], 4)
