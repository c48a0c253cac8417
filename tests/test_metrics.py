"""Accuracy by domain through `evaluate`, without a network."""

from __future__ import annotations

import pytest

from hf_sage.metrics import DomainAccuracy, accuracy_by_domain

PREDICTIONS = [0, 1, 1, 2, 2, 2]
REFERENCES = [0, 1, 0, 2, 0, 0]
DOMAINS = ["photo", "photo", "sketch", "sketch", "sketch", "art"]
EXPECTED = {
    "accuracy": 3 / 6,
    "accuracy/art": 0.0,
    "accuracy/photo": 1.0,
    "accuracy/sketch": 1 / 3,
    "avg_accuracy": (0 + 1 + 1 / 3) / 3,
    "worst_accuracy": 0.0,
    "gap": 1.0,
}


def test_closed_form() -> None:
    assert accuracy_by_domain(PREDICTIONS, REFERENCES, DOMAINS) == pytest.approx(EXPECTED, abs=1e-15)


def test_metric_equals_its_arithmetic_at_once_and_in_batches() -> None:
    metric = DomainAccuracy()
    at_once = metric.compute(predictions=PREDICTIONS, references=REFERENCES, domains=DOMAINS)
    assert at_once == pytest.approx(EXPECTED, abs=1e-15)
    assert all(type(value) is float for value in at_once.values())
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        metric.add_batch(predictions=PREDICTIONS[rows], references=REFERENCES[rows], domains=DOMAINS[rows])
    assert metric.compute() == at_once


def test_order_of_rows_and_names_of_domains_do_not_matter() -> None:
    order = [5, 3, 1, 0, 2, 4]
    shuffled = accuracy_by_domain(*([column[i] for i in order] for column in (PREDICTIONS, REFERENCES, DOMAINS)))
    assert shuffled == accuracy_by_domain(PREDICTIONS, REFERENCES, DOMAINS)
    renamed = accuracy_by_domain(PREDICTIONS, REFERENCES, [{"art": "z"}.get(d, d) for d in DOMAINS])
    assert renamed["avg_accuracy"] == shuffled["avg_accuracy"]
    assert renamed["accuracy/z"] == shuffled["accuracy/art"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], [], []), "no rows"),
        (([0], [0, 1], ["a", "a"]), "same rows"),
        (([[0.1, 0.9]], [1], ["a"]), "argmax"),
        (([0], [0], [3]), "strings"),
    ],
)
def test_bad_input_says_what_to_do(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        accuracy_by_domain(*arguments)
