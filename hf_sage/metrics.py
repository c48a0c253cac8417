"""Accuracy by domain: pooled, of each domain, their mean, the worst one and the gap between best and worst.

`accuracy_by_domain` is the arithmetic, on arrays. `DomainAccuracy` is the same behind the interface of an
`evaluate.Metric`; it lives in this package and is instantiated directly, because `evaluate.load` fetches a script from
the Hub even for "accuracy".
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import EvalPrediction

_DESCRIPTION = (
    "Classification accuracy pooled over all rows, in each domain, averaged over domains, and in the worst domain."
)

_INPUTS = """
Args:
    predictions: Predicted class indices, integers.
    references: True class indices, integers.
    domains: Name of the domain that each row comes from, strings.

Returns:
    accuracy: Share of right predictions over all rows.
    accuracy/<domain>: The same over the rows of one domain.
    avg_accuracy: Unweighted mean of the domains' accuracies.
    worst_accuracy: The lowest of them.
    gap: The highest minus the lowest.
"""


def accuracy_by_domain(predictions: ArrayLike, references: ArrayLike, domains: ArrayLike) -> dict[str, float]:
    """Accuracy over all rows and by domain, as fractions in [0, 1].

    Args:
        predictions: Predicted class indices, integers, shape `(n,)`.
        references: True class indices, integers, shape `(n,)`.
        domains: Name of the domain of each row, strings, shape `(n,)`.

    Returns:
        `accuracy` (pooled), `accuracy/<domain>` in alphabetical order, `avg_accuracy` (unweighted mean over domains),
        `worst_accuracy` and `gap` (best minus worst domain). Neither the order of the rows nor the domains' names
        change any number by a bit.

    Raises:
        ValueError: On no rows, unequal lengths, class scores in place of indices, or domains that are no strings.
    """
    predicted, true = _class_indices("predictions", predictions), _class_indices("references", references)
    names = np.asarray(domains)
    if not len(predicted) == len(true) == names.size:
        raise ValueError(
            "predictions, references and domains must have one entry a row, got "
            f"{len(predicted)}, {len(true)} and {names.size}: pass all three for the same rows, in the same order."
        )
    if names.size == 0:
        raise ValueError("accuracy of no rows is undefined: pass at least one prediction.")
    if not all(isinstance(name, str) for name in names.tolist()):
        raise ValueError(
            "domains must be strings, one a row: turn ids into names first, e.g. with `ClassLabel.int2str`."
        )

    right = predicted == true
    by_domain = {str(name): float(right[names == name].mean()) for name in np.unique(names)}
    best, worst = max(by_domain.values()), min(by_domain.values())
    return {
        "accuracy": float(right.mean()),
        **{f"accuracy/{name}": value for name, value in by_domain.items()},
        "avg_accuracy": fmean(by_domain.values()),  # correctly rounded, hence the same in every order of the domains
        "worst_accuracy": worst,
        "gap": best - worst,
    }


def _class_indices(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size > 0 and array.dtype.kind not in "biu"):
        raise ValueError(
            f"{name} must be class indices: integers of shape (n,), got {array.dtype} of shape {array.shape}. "
            "Turn class scores into indices first, e.g. with `scores.argmax(-1)`."
        )
    return array


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """A `compute_metrics` for Trainer: the share of rows whose largest logit is their label's."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class DomainAccuracy(evaluate.Metric):
    """`accuracy_by_domain` as an `evaluate` metric that needs no network, no script and no cache folder.

    ```python
    DomainAccuracy().compute(predictions=[0, 1], references=[0, 0], domains=["photo", "sketch"])
    ```

    `add_batch(predictions=..., references=..., domains=...)` as often as needed, then `compute()`, gives the same for
    all batches together.

    Args:
        keep_in_memory: Hold the rows in memory (default). `False` writes them to `cache_dir`, which several processes
            (`num_process > 1`) need.
        **kwargs: Those of `evaluate.Metric`: `cache_dir`, `num_process`, `process_id`, `experiment_id`, ...
    """

    def __init__(self, *, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add rows. Raises ValueError on class scores, which the Arrow writer would silently cut down to integers."""
        _class_indices("predictions", predictions)
        _class_indices("references", references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """Accuracies of the rows given here and of those added before; `None` on processes other than the first."""
        if self.writer is None and predictions is None and references is None:
            raise ValueError("nothing to compute: pass predictions, references and domains, or call `add_batch` first.")
        result: dict[str, float] | None = super().compute(predictions=predictions, references=references, **kwargs)
        return result

    def _info(self) -> evaluate.MetricInfo:
        index, name = datasets.Value("int64"), datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": index, "references": index, "domains": name}),
        )

    def _build_data_dir(self) -> str:
        # evaluate makes this folder even when it keeps all in memory, and dies where the home folder is read-only.
        return "" if self.keep_in_memory else str(super()._build_data_dir())

    def _compute(self, *, predictions: Any, references: Any, domains: Any) -> dict[str, float]:
        return accuracy_by_domain(predictions, references, domains)
