"""Metrics by domain from one evaluation loop: compute_metrics on each domain's rows, their average and their worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

Metrics = dict[str, float]

NOT_A_SCORE = ("runtime", "per_second", "preparation_time")
"""Endings of entries that `Trainer.evaluate` adds and that have no best or worst."""


def metrics_by_domain(
    compute_metrics: Callable[[EvalPrediction], Metrics],
    prediction: EvalPrediction,
    domains: Sequence[str],
) -> Metrics:
    """Applies ``compute_metrics`` to all rows and to those of each domain.

    Args:
        compute_metrics: The user's function.
        prediction: Predictions, labels and what else it was asked to hold, each with a row for each example.
        domains: The domain of each row.

    Returns:
        The pooled metrics under their own names, ``<domain>_<metric>`` for each domain, ``avg_<metric>`` (each domain
        counts the same) and ``worst_<metric>``.
    """
    rows = {name: np.flatnonzero([own == name for own in domains]) for name in sorted(set(domains))}
    by_domain = {name: compute_metrics(_rows_of(prediction, own, len(domains))) for name, own in rows.items()}
    metrics = dict(compute_metrics(prediction))
    for name, own in by_domain.items():
        metrics |= {f"{name}_{metric}": value for metric, value in own.items()}
    return metrics | average_and_worst(by_domain)


def average_and_worst(by_domain: Mapping[str, Metrics]) -> Metrics:
    """``avg_<metric>`` and ``worst_<metric>`` over the domains, for every number that all of them have.

    The worst is the smallest, or the largest for names that end in ``loss``: the rule by which Trainer itself sets
    ``greater_is_better``.
    """
    shared = set.intersection(*(set(own) for own in by_domain.values())) if by_domain else set()
    summary: Metrics = {}
    for metric in sorted(shared):
        values = [own[metric] for own in by_domain.values()]
        if (
            metric.endswith(NOT_A_SCORE)
            or metric.startswith(("avg_", "worst_"))
            or not all(np.isscalar(v) and np.isreal(v) for v in values)
        ):
            continue
        summary[f"avg_{metric}"] = float(np.mean(values))
        summary[f"worst_{metric}"] = float(max(values) if metric.endswith("loss") else min(values))
    return summary


def _rows_of(prediction: EvalPrediction, rows: np.ndarray, total: int) -> EvalPrediction:
    fields = {
        name: _take(getattr(prediction, name), rows, total) for name in ("predictions", "label_ids", "inputs", "losses")
    }
    return EvalPrediction(**fields)


def _take(value: Any, rows: np.ndarray, total: int) -> Any:
    """The given rows at any depth; what has no row for each example (a loss among the outputs) as it is."""
    if isinstance(value, Mapping):
        return {name: _take(v, rows, total) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(v, rows, total) for v in value)
    return value[rows] if np.ndim(value) > 0 and len(value) == total else value
