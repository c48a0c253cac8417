"""Metrics by domain from one evaluation loop: compute_metrics on each domain's rows, their average and their worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import EvalPrediction

from hf_sage.trainer.groups import class_names, decode_groups
from hf_sage.trainer.settings import Settings

Metrics = dict[str, float]

NOT_A_SCORE = ("runtime", "per_second", "preparation_time")
"""Endings of entries that `Trainer.evaluate` adds and that have no best or worst."""


class DomainEvaluation(Settings):
    """Metrics by domain, and their average and worst, in every evaluation."""

    compute_metrics: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._evaluated_domains: list[Tensor] = []

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """As the base evaluates, and for a dictionary of datasets also the average and the worst over them."""
        metrics: Metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        sets = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(sets, dict):
            own = {name: _with_prefix(metrics, f"{metric_key_prefix}_{name}_") for name in sets}
            summary = {f"{metric_key_prefix}_{key}": value for key, value in average_and_worst(own).items()}
            self.log(dict(summary))
            # The sets' own metrics were announced with each of them: once more, and patience would count them twice.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(summary))
            metrics |= summary
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base's, with ``compute_metrics`` applied by domain too where the rows have one."""
        compute, self._evaluated_domains = self.compute_metrics, []
        names = class_names(getattr(dataloader, "dataset", None), self._column) if self._column else {}

        def by_domain(prediction: EvalPrediction) -> Metrics:
            if not self._evaluated_domains:
                return dict(compute(prediction))
            domains = [names.get(name, name) for d in self._evaluated_domains for name in decode_groups(d)]
            return metrics_by_domain(compute, prediction, domains)

        # Metrics made batch by batch, and batches left apart, have no rows that could be told by domain.
        if compute is not None and not self.args.batch_eval_metrics and self.args.eval_do_concat_batches:
            self.compute_metrics = by_domain
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = compute

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base's, with the domains of the rows gathered in the order of the predictions."""
        domains = inputs.pop(self._column, None) if self._column else None  # metrics made by batch see the inputs
        if domains is not None and self.compute_metrics is not None:
            self._evaluated_domains.append(self.gather_function(self._prepare_input(domains)))
        return super().prediction_step(model, inputs, *args, **kwargs)


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


def _with_prefix(metrics: Metrics, prefix: str) -> Metrics:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
