"""Kinds of datasets, loaders and evaluation options: the same rows are the same training, however they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from assertions import assert_same_bits
from test_features_model import NOTHING, ROUND_OFF, Plain, assert_is_stock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from training import (
    DOMAINS,
    SAGE,
    Rows,
    accuracy,
    build,
    entries,
    hub_dataset,
    image_rows,
    language_model,
    max_difference,
    relative_differences,
    text_rows,
    train,
    vit,
    weights,
    without,
)
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_sage import SAGETrainer

IN_ORDER = {"domain_sampling": "natural", "train_sampling_strategy": "sequential"}
METHODS = {"sage": SAGE, "sam": {"method": "sam"}, "erm": {"method": "erm"}}


def names_of(trainer: Any) -> set[str]:
    return {key.removeprefix("loss/") for key in entries(trainer)[0] if key.startswith("loss/")}


def in_order(rows: Sequence[dict[str, Any]], **options: Any) -> Any:
    """The reference of every stream: the same rows in the same order from a list."""
    return train(vit(), Rows(rows), **IN_ORDER, **options)


# ---- Streams ----

LABELS = sorted(set(DOMAINS))
KINDS = {"string": DOMAINS, "integer": (0, 1, 0, 2), "ClassLabel": DOMAINS}


def labelled(data: Any, names: Sequence[str] = LABELS) -> Any:
    return data.cast_column("domain", datasets.ClassLabel(names=list(names)))


def stream(kind: str = "string", shards: int = 1) -> datasets.IterableDataset:
    data = hub_dataset(image_rows(domains=KINDS[kind]))
    return (labelled(data) if kind == "ClassLabel" else data).to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("string", 2), ("ClassLabel", 2)])
def test_streams_are_lists(kind, workers):
    """With two workers the first half of the rows and the second come in turn: whole batches, so in order again."""
    data = stream(kind, shards=max(1, workers))
    trainer = train(vit(), data, dataloader_num_workers=workers, **SAGE)
    reference = in_order(image_rows(domains=KINDS[kind]), **SAGE)
    # The digits of labels sort as their names do; so the order of groups, and with it every bit, is the same.
    assert_same_bits(weights(trainer.model), weights(reference.model))
    assert all("agreement" in entry for entry in entries(trainer))


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_stock(workers):
    options = {"dataloader_num_workers": workers}
    ours = train(vit(dropout=0.2), stream(shards=2), **NOTHING, **options)
    stock = train(vit(dropout=0.2), stream(shards=2).remove_columns("domain"), trainer=Trainer, **options)
    assert_same_bits(weights(ours.model), weights(stock.model))
    assert entries(ours) == entries(stock)


def test_class_labels_of_a_stream_have_their_names():
    assert names_of(train(vit(), stream("ClassLabel"), **SAGE)) == set(DOMAINS)


def test_class_labels_of_a_stream_have_their_names_in_metrics():
    trainer = build(vit(), Rows(image_rows()), compute_metrics=accuracy)
    assert "eval_art_accuracy" in trainer.evaluate(stream("ClassLabel"))


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_formats_of_a_stream(form):
    trainer = train(vit(), stream("integer").with_format(form), **SAGE)
    assert_same_bits(weights(trainer.model), weights(in_order(image_rows(domains=KINDS["integer"]), **SAGE).model))


def test_streams_of_one_domain_each_can_be_interleaved():
    rows = image_rows()
    parts = [[row for row in rows if row["domain"] == name] for name in LABELS]
    streams = [hub_dataset(part[:6]).to_iterable_dataset() for part in parts]
    trainer = train(vit(), datasets.interleave_datasets(streams), max_steps=1, **SAGE)
    turns = [part[i] for i in range(6) for part in parts]
    assert_same_bits(weights(trainer.model), weights(in_order(turns, max_steps=1, **SAGE).model))
    assert names_of(trainer) == set(DOMAINS)


@pytest.mark.parametrize("method", ["sage", "sam"])
def test_a_stream_without_the_column_is_an_error(method):
    """At once where the stream knows its columns, with the first batch where it does not."""
    known = stream().remove_columns("domain")
    with pytest.raises(ValueError, match=r"'domain'.*'pixel_values'.*domain_column=None"):
        train(vit(), known, **METHODS[method])
    unknown = datasets.IterableDataset.from_generator(partial(iter, without("domain", image_rows())))
    assert unknown.column_names is None
    if method == "sage":  # SAM needs no groups, so a stream without them does for it
        with pytest.raises(ValueError, match=r"no domain column 'domain'.*domain_column=None"):
            train(vit(), unknown, **METHODS[method])
    else:
        train(vit(), unknown, **METHODS[method])


def test_a_batch_of_one_domain_has_no_agreement_and_no_noise():
    """As a stream that is sorted by domain has them."""
    rows = image_rows(12, domains=("a",)) + image_rows(12, domains=("b",), seed=2)
    data = hub_dataset(rows).to_iterable_dataset()
    trainer = train(vit(), data, max_steps=2, **SAGE)
    for entry in entries(trainer):
        assert entry["noise_scale"] == 0
        assert entry["perturbation_norm"] > 0
        assert "agreement" not in entry
    silent = train(vit(), data, max_steps=2, **(SAGE | {"gamma": 0.0}))
    assert max_difference(trainer.model, silent.model) == 0


class Stream(IterableDataset):
    """torch's own kind of stream, which each worker reads a part of."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        share = len(self.rows) // (worker.num_workers if worker else 1)
        first = share * worker.id if worker else 0
        return (dict(row) for row in self.rows[first : first + share])


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize(("kind", "workers"), [(Stream, 0), (Stream, 2), (StreamWithLength, 0)])
def test_streams_of_torch_are_lists(kind, workers):
    trainer = train(vit(), kind(image_rows()), dataloader_num_workers=workers, **SAGE)
    assert_same_bits(weights(trainer.model), weights(in_order(image_rows(), **SAGE).model))
    assert names_of(trainer) == set(DOMAINS)


def test_streams_of_torch_are_stock():
    ours = train(vit(), Stream(image_rows()), **NOTHING)
    stock = train(vit(), Stream(without("domain", image_rows())), trainer=Trainer)
    assert_same_bits(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize(
    "make", [lambda: stream("ClassLabel"), lambda: Stream(image_rows())], ids=["datasets", "torch"]
)
def test_metrics_by_domain_of_a_stream(make):
    trainer = build(vit(), Rows(image_rows()), compute_metrics=accuracy, per_device_eval_batch_size=5)
    ours, expected = trainer.evaluate(make()), trainer.evaluate(Rows(image_rows()))
    same = {key for key in expected if "accuracy" in key}
    assert {"eval_art_accuracy", "eval_worst_accuracy"} <= same
    assert {key: ours[key] for key in same} == {key: expected[key] for key in same}


# ---- Transforms on the fly ----


def raw() -> datasets.Dataset:
    """What the transform below makes the rows of `image_rows` of."""
    rows = [{"raw": (2 * row["pixel_values"]).tolist()} | without("pixel_values", [row])[0] for row in image_rows()]
    return datasets.Dataset.from_list(rows)


def transform(rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "pixel_values": [torch.tensor(image) / 2 for image in rows["raw"]],
        "labels": rows["labels"],
        "domain": rows["domain"],
    }


@pytest.mark.parametrize(("method", "workers"), [*((method, 0) for method in METHODS), ("sage", 2)])
def test_transformed_rows_are_the_rows(method, workers):
    options = {"remove_unused_columns": False, "dataloader_num_workers": workers} | METHODS[method]
    trainer = train(vit(), raw().with_transform(transform), **options)
    assert_same_bits(weights(trainer.model), weights(train(vit(), Rows(image_rows()), **METHODS[method]).model))
    if method == "sage":
        assert names_of(trainer) == set(DOMAINS)


def test_transforms_run_for_the_rows_of_the_batches_alone():
    """The domains are read from the column, not from the images."""
    seen = []

    def noting(rows: dict[str, Any]) -> dict[str, Any]:
        seen.extend(rows["labels"])
        return transform(rows)

    train(vit(), raw().with_transform(noting), remove_unused_columns=False, max_steps=1, **SAGE)
    assert len(seen) == 12 * 2  # accelerate reads one batch ahead


@pytest.mark.parametrize("trainer", [SAGETrainer, Trainer])
def test_removing_what_a_transform_reads_is_the_same_error_as_in_stock(trainer):
    """The default, remove_unused_columns=True, takes "raw" away before the transform sees it."""
    options = SAGE if trainer is SAGETrainer else {}
    with pytest.raises(KeyError, match="raw"):
        train(vit(), raw().with_transform(transform), trainer=trainer, **options)


def test_stocks_advice_on_removed_columns_survives():
    """No column is the model's: stock says remove_unused_columns=False."""

    def tokenise(rows: dict[str, Any]) -> dict[str, Any]:
        tokens = [torch.arange(10)] * len(rows["text"])
        return {"input_ids": tokens, "labels": tokens, "domain": rows["domain"]}

    rows = datasets.Dataset.from_list([{"text": "a", "domain": DOMAINS[i % 4]} for i in range(24)])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        train(language_model(), rows.remove_columns("domain").with_transform(tokenise), trainer=Trainer)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        train(language_model(), rows.with_transform(tokenise), **SAGE)


def test_a_format_without_the_column_is_an_error():
    data = hub_dataset(image_rows()).with_format("torch", columns=["pixel_values", "labels"])
    with pytest.raises(ValueError, match=r"no domain column 'domain'.*domain_column=None"):
        train(vit(), data, **SAGE)


# ---- Loaders ----


@pytest.mark.parametrize("method", METHODS)
def test_workers_change_nothing(method):
    two = train(vit(), Rows(image_rows()), dataloader_num_workers=2, **METHODS[method])
    none = train(vit(), Rows(image_rows()), **METHODS[method])
    assert_same_bits(weights(two.model), weights(none.model))
    assert entries(two) == entries(none)


def test_workers_are_stock():
    assert_is_stock(lambda: vit(dropout=0.2), image_rows(), dataloader_num_workers=2)


@pytest.mark.parametrize("drop", [False, True])
def test_an_incomplete_last_batch_is_stock(drop):
    """20 rows in batches of 12: the second holds 8, or is dropped."""
    options = {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": drop}
    ours = assert_is_stock(vit, image_rows(20), **options)
    assert ours.state.global_step == (2 if drop else 4)


def test_balanced_batches_are_whole_already():
    options = {"max_steps": -1, "num_train_epochs": 2} | SAGE
    kept, dropped = (train(vit(), Rows(image_rows(20)), dataloader_drop_last=drop, **options) for drop in (False, True))
    assert kept.state.global_step == dropped.state.global_step == 2
    assert_same_bits(weights(kept.model), weights(dropped.model))


def test_incomplete_batches_weigh_their_rows_alike():
    """An update of 8 rows is one of a batch of 8, cut into micro-batches or not."""
    options = {"max_steps": -1, "num_train_epochs": 1} | IN_ORDER | SAGE
    whole = train(vit(), Rows(image_rows(20)), **options)
    cut = train(vit(), Rows(image_rows(20)), per_device_train_batch_size=3, gradient_accumulation_steps=4, **options)
    assert whole.state.global_step == cut.state.global_step == 2
    assert max(relative_differences(cut.model, whole.model, start=vit())) <= ROUND_OFF


def sequences() -> list[dict[str, Any]]:
    """Of 3 to 10 tokens."""
    lengths = [3 + (5 * i) % 8 for i in range(24)]
    return [
        {"input_ids": row["input_ids"][:n], "labels": row["input_ids"][:n], "domain": row["domain"]}
        for row, n in zip(text_rows(), lengths, strict=True)
    ]


class Padding:
    """Pads, and notes the lengths of each batch."""

    def __init__(self) -> None:
        self.lengths: list[set[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.lengths.append({len(row["input_ids"]) for row in rows})
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "input_ids": pad([row["input_ids"] for row in rows]),
            "labels": pad([row["labels"] for row in rows], padding_value=-100),
        }


STRATEGIES = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["choices"][1:]
"""All but the random one: a release each adds to them."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_strategies_are_stock(strategy):
    options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 6, "data_collator": Padding()}
    assert_is_stock(language_model, sequences(), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_strategies_hold_for_natural_sampling(strategy):
    seen = {}
    for method, options in {"sage": SAGE | {"domain_sampling": "natural"}, "stock": {"trainer": Trainer}}.items():
        padding = Padding()
        options = options | {"train_sampling_strategy": strategy, "per_device_train_batch_size": 6}
        rows = sequences() if method == "sage" else without("domain", sequences())
        train(language_model(), Rows(rows), data_collator=padding, **options)
        seen[method] = padding.lengths
    assert seen["sage"] == seen["stock"]


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_a_strategy_that_balanced_sampling_overrides_is_told(strategy):
    with pytest.warns(UserWarning, match="train_sampling_strategy.*domain_sampling"):
        train(language_model(), Rows(sequences()), data_collator=Padding(), train_sampling_strategy=strategy, **SAGE)


def test_evaluation_grouped_by_length_tells_domains_apart():
    """The rows come in another order there; their domains come with them."""

    def score(prediction: EvalPrediction) -> dict[str, float]:
        return {"length": float((prediction.label_ids != -100).sum())}

    options = {"data_collator": Padding(), "compute_metrics": score, "per_device_eval_batch_size": 5}
    rows = sequences()
    trainer = build(language_model(), Rows(rows), train_sampling_strategy="group_by_length", **options)
    metrics = trainer.evaluate(Rows(rows))
    for name in LABELS:
        expected = sum(len(row["input_ids"]) for row in rows if row["domain"] == name)
        assert metrics[f"eval_{name}_length"] == expected


# ---- Parts and sums of datasets ----


def pieces(rows: list[dict[str, Any]], wrap: Any = Rows) -> dict[str, Any]:
    """The first 24 rows of 32 in several forms."""
    return {
        "Subset": Subset(wrap(rows), list(range(24))),
        "Subset of a tensor": Subset(wrap(rows), torch.arange(24)),
        "ConcatDataset": ConcatDataset([wrap(rows[:10]), wrap(rows[10:24])]),
        "Subset of ConcatDataset": Subset(ConcatDataset([wrap(rows[:10]), wrap(rows[10:])]), range(24)),
    }


PIECES = list(pieces(image_rows(32)))


@pytest.mark.parametrize("wrap", [Rows, hub_dataset])
@pytest.mark.parametrize("form", PIECES)
def test_parts_and_sums_are_their_rows(form, wrap):
    data = pieces(image_rows(32), wrap)[form]
    trainer = train(vit(), data, compute_metrics=accuracy, **SAGE)
    reference = train(vit(), Rows(image_rows(32)[:24]), compute_metrics=accuracy, **SAGE)
    assert_same_bits(weights(trainer.model), weights(reference.model))
    assert entries(trainer) == entries(reference)
    assert {"eval_art_accuracy", "eval_worst_accuracy"} <= set(trainer.evaluate(data))


@pytest.mark.parametrize("form", PIECES)
def test_class_labels_in_parts_and_sums_have_their_names(form):
    data = pieces(image_rows(32), lambda rows: labelled(hub_dataset(rows)))[form]
    trainer = train(vit(), data, compute_metrics=accuracy, **SAGE)
    assert names_of(trainer) == set(DOMAINS)
    assert "eval_art_accuracy" in trainer.evaluate(data)


class Counting(datasets.Dataset):
    """Counts the rows that are read whole."""

    reads = 0

    def __getitem__(self, key: Any) -> Any:
        Counting.reads += isinstance(key, int)
        return super().__getitem__(key)


def test_domains_of_a_sum_are_read_from_the_column():
    """As those of a part are: an image that is decoded for its domain alone is decoded in vain."""
    data = hub_dataset(image_rows())
    data.__class__ = Counting
    for form in (Subset(data, range(24)), ConcatDataset([data])):
        Counting.reads = 0
        build(vit(), form, **SAGE)._get_train_sampler()
        assert Counting.reads <= 2, type(form)  # the first row's columns are looked at


# ---- Evaluation ----


def held_out(rows: int = 21, **options: Any) -> list[dict[str, Any]]:
    return image_rows(rows, seed=2, **options)


def scores(prediction: EvalPrediction) -> dict[str, float]:
    return accuracy(prediction) | {"score": float(prediction.predictions[:, 0].mean())}


def metrics_of(data: Any, **options: Any) -> dict[str, float]:
    options = {"compute_metrics": scores, "per_device_eval_batch_size": 4} | options
    return build(vit(), Rows(image_rows()), **options).evaluate(data)


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """What depends neither on the clock nor on the trainer's place in time."""
    clock = ("runtime", "per_second", "preparation_time", "epoch", "step")
    return {k: v for k, v in metrics.items() if not k.endswith(clock)}


@pytest.mark.parametrize(
    "options", [{"eval_accumulation_steps": 1}, {"dataloader_num_workers": 2}, {"dataloader_drop_last": False}]
)
def test_options_of_the_evaluation_loop_change_nothing(options):
    assert comparable(metrics_of(Rows(held_out()), **options)) == comparable(metrics_of(Rows(held_out())))


def test_dropped_rows_of_an_evaluation_have_no_domain_left_over():
    """21 rows in batches of 4, the last one dropped."""
    dropped = metrics_of(Rows(held_out()), dataloader_drop_last=True)
    assert comparable(dropped) == comparable(metrics_of(Rows(held_out()[:20])))


class Summing:
    """``compute_metrics`` for batch_eval_metrics: adds up, and tells with the last batch."""

    def __init__(self) -> None:
        self.right = self.total = 0
        self.inputs: set[str] = set()

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        self.total += len(prediction.label_ids)
        self.inputs |= set(prediction.inputs or ())
        return {"accuracy": self.right / self.total} if compute_result else {}


@pytest.mark.parametrize("trainer", [SAGETrainer, Trainer])
def test_metrics_batch_by_batch_are_stock(trainer):
    rows = held_out() if trainer is SAGETrainer else without("domain", held_out())
    metrics = metrics_of(Rows(rows), trainer=trainer, compute_metrics=Summing(), batch_eval_metrics=True)
    pooled = metrics_of(Rows(held_out()))
    assert set(comparable(metrics)) == {"eval_loss", "eval_accuracy"}
    assert {k: metrics[k] for k in comparable(metrics)} == {k: pooled[k] for k in comparable(metrics)}


def test_inputs_of_metrics_batch_by_batch_are_stock():
    compute = Summing()
    options = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"], "compute_metrics": compute}
    metrics_of(Rows(held_out()), **options)
    assert compute.inputs == {"pixel_values", "labels"}


def test_inputs_and_losses_for_metrics_are_those_of_the_domain():
    rows = held_out()

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        assert len(prediction.inputs) == len(prediction.losses) == len(prediction.label_ids)
        return {"brightness": float(prediction.inputs.mean()), "rows": len(prediction.inputs)}

    metrics = metrics_of(Rows(rows), compute_metrics=measure, include_for_metrics=["inputs", "loss"])
    for name in LABELS:
        own = [row["pixel_values"] for row in rows if row["domain"] == name]
        assert metrics[f"eval_{name}_rows"] == len(own)
        assert metrics[f"eval_{name}_brightness"] == pytest.approx(float(torch.stack(own).mean()), abs=1e-6)  # fp32
    assert metrics["eval_rows"] == len(rows)


def test_metrics_of_batches_left_apart_are_pooled():
    def measure(prediction: EvalPrediction) -> dict[str, float]:
        return {"batches": len(prediction.predictions)}

    metrics = metrics_of(Rows(held_out()), compute_metrics=measure, eval_do_concat_batches=False)
    assert set(comparable(metrics)) == {"eval_loss", "eval_batches"}
    assert metrics["eval_batches"] == 6


def sets(*, domains: bool = True) -> dict[str, Any]:
    rows = {"one": held_out(9), "two": image_rows(12, seed=3, domains=("clipart", "photo"))}
    return {name: Rows(own if domains else without("domain", own)) for name, own in rows.items()}


def test_several_sets_have_their_domains_each():
    metrics = metrics_of(sets())
    for name, own in sets().items():
        alone = metrics_of(own)
        for key in comparable(alone):
            assert metrics[key.replace("eval_", f"eval_{name}_", 1)] == alone[key]
    assert metrics["eval_avg_accuracy"] == pytest.approx(
        (metrics["eval_one_accuracy"] + metrics["eval_two_accuracy"]) / 2
    )


@pytest.mark.parametrize("domains", [True, False])
def test_several_sets_hold_stocks_metrics(domains):
    stock = comparable(metrics_of(sets(domains=False), trainer=Trainer))
    ours = metrics_of(sets(domains=domains))
    assert {key: ours[key] for key in stock} == stock


def test_a_set_with_domains_and_one_without():
    mixed = {"one": sets()["one"], "two": sets(domains=False)["two"]}
    metrics = metrics_of(mixed)
    assert "eval_one_art_accuracy" in metrics
    assert not any(key.startswith(("eval_two_clipart", "eval_two_worst")) for key in metrics)
    assert {"eval_two_accuracy", "eval_worst_accuracy"} <= set(metrics)


def test_names_of_sets_that_begin_alike():
    alike = {"a": sets()["one"], "a_b": sets()["two"]}
    metrics = metrics_of(alike)
    assert metrics["eval_worst_accuracy"] == min(metrics["eval_a_accuracy"], metrics["eval_a_b_accuracy"])
    assert metrics["eval_avg_loss"] == pytest.approx((metrics["eval_a_loss"] + metrics["eval_a_b_loss"]) / 2)
    assert not any(key.startswith(("eval_avg_b_", "eval_worst_b_")) for key in metrics)


class Evaluations(TrainerCallback):
    """Notes how often each metric is announced."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.seen.extend(comparable(metrics))


def test_every_metric_is_announced_once():
    callback = Evaluations()
    metrics_of(sets(), callbacks=[callback])
    assert len(callback.seen) == len(set(callback.seen))


@pytest.mark.parametrize("metric", ["eval_one_loss", "eval_worst_loss"])
def test_patience_counts_evaluations(metric):
    """At a learning rate of zero nothing improves on the first evaluation, so a patience of 2 ends with the third."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "learning_rate": 0.0}
    options |= {"metric_for_best_model": metric, "eval_dataset": sets(domains=False)}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    assert train(vit(), Rows(image_rows()), callbacks=[stop], **options).state.global_step == 3


@pytest.mark.parametrize("data", [Rows, hub_dataset, lambda rows: hub_dataset(rows).to_iterable_dataset()])
def test_training_with_domains_and_evaluation_without(data):
    options = {"eval_strategy": "steps", "eval_steps": 1, "compute_metrics": scores}
    trainer = train(vit(), Rows(image_rows()), eval_dataset=data(without("domain", held_out())), **options, **SAGE)
    assert len(entries(trainer, "eval_loss")) == 3
    assert set(comparable(entries(trainer, "eval_loss")[0])) == {"eval_loss", "eval_accuracy", "eval_score"}


# ---- Collators of another kind ----


def pairs(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def unpacked(base: type[Trainer]) -> type[Trainer]:
    class OwnInputs(base):  # type: ignore[misc,valid-type]
        """Batches of tensors without names, as loops written for torch alone have them."""

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            images, labels = inputs
            loss = cross_entropy(model(images, labels)[1], labels)
            return loss

    return OwnInputs


@pytest.mark.parametrize("method", ["erm", "sam"])
def test_batches_without_names(method):
    options = {"data_collator": pairs, "train_sampling_strategy": "sequential"}
    rows = Rows(without("domain", image_rows()))
    stock = train(Plain("tuple"), rows, trainer=unpacked(Trainer), **options)
    ours = train(Plain("tuple"), rows, trainer=unpacked(SAGETrainer), domain_column=None, method=method, **options)
    if method == "erm":
        assert_same_bits(weights(ours.model), weights(stock.model))
    assert len(entries(ours)) == len(entries(stock)) == 3


class WithAttributes:
    """A collator that its trainer or its callbacks ask for what it is."""

    valid_label_columns = ("label",)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return default_data_collator(rows)


def test_attributes_of_the_users_collator_are_there():
    trainer = build(vit(), Rows(image_rows()), data_collator=WithAttributes())
    assert trainer.data_collator.valid_label_columns == ("label",)


def test_metrics_are_numbers_of_python():
    """So that they can be written as JSON, whatever the evaluation returns."""
    metrics = metrics_of(Rows(held_out()), compute_metrics=lambda p: {"score": np.float32(p.predictions.mean())})
    assert all(type(value) in (float, int) for value in metrics.values())
