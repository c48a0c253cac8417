"""What the runs do and do not show about one method against others: differences between pairs of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from hf_sage.benchmark.records import Record, by_run
from hf_sage.benchmark.student import t_quantile
from hf_sage.benchmark.tables import aggregate

LEVEL = 0.95
"""Of the intervals in reports."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method minus a baseline's, over the pairs of runs with one held-out domain and one seed in common.

    Attributes:
        method: The method compared with the baseline.
        mean: Mean difference, in [-1, 1]; NaN without a pair.
        stderr: Its standard error, sample standard deviation (ddof 1) / √n; NaN (undefined) with fewer than two pairs.
        pairs: Number of pairs, n.
    """

    method: str
    mean: float
    stderr: float
    pairs: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Student's t interval of the mean: mean ± t(n − 1) · stderr; NaN (undefined) with fewer than two pairs.

        It takes the pairs for independent. Those of one held-out domain share their test rows over seeds, so where
        there are few domains it is narrower than it should be.
        """
        if self.pairs < 2:
            return math.nan, math.nan
        reach = t_quantile((1 + level) / 2, self.pairs - 1) * self.stderr
        return self.mean - reach, self.mean + reach

    def __str__(self) -> str:
        spread = f" ± {100 * self.stderr:.1f}" if self.pairs > 1 else ""
        return f"{100 * self.mean:+.1f}{spread} points ({self.pairs} pair{'s' * (self.pairs != 1)})"


def paired_differences(records: Iterable[Record], baseline: str) -> list[Difference]:
    """Difference of every other method to `baseline`, in order of first appearance, paired over (held_out, seed).

    Raises:
        ValueError: If the baseline has no run, or as in `by_run`.
    """
    return pooled_differences([records], baseline)


def pooled_differences(datasets: Iterable[Iterable[Record]], baseline: str) -> list[Difference]:
    """As `paired_differences`, over the pairs of several datasets together.

    Args:
        datasets: The records of each dataset.
        baseline: The method that the others are compared with.

    Raises:
        ValueError: If the baseline has no run, or as in `by_run`.
    """
    runs = {(method, i, *rest): run for i, own in enumerate(datasets) for (method, *rest), run in by_run(own).items()}
    methods = list(dict.fromkeys(str(key[0]) for key in runs))
    if baseline not in methods:
        raise ValueError(f"no finished run of {baseline!r} to compare with: there are runs of {methods}.")

    def difference(method: str) -> Difference:
        shared = [key[1:] for key in runs if key[0] == method and (baseline, *key[1:]) in runs]
        pairs = [runs[method, *key].accuracy - runs[baseline, *key].accuracy for key in shared]
        mean = fmean(pairs) if pairs else math.nan
        stderr = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        return Difference(method, mean, stderr, len(pairs))

    return [difference(method) for method in methods if method != baseline]


def verdict(records: Iterable[Record], method: str = "sage") -> str:
    """Whether a method is above every other on average, and by more than two standard errors, in plain sentences.

    Raises:
        ValueError: If the method has no run, or as in `by_run`.
    """
    records = list(records)
    leads = [replace(other, mean=-other.mean) for other in paired_differences(records, method) if other.pairs]
    behind = [lead for lead in leads if lead.mean <= 0]
    told = behind or leads
    names = " and ".join(lead.method.upper() for lead in told)
    points = str(told[0]) if len(told) == 1 else ", ".join(f"{lead.method.upper()} {lead}" for lead in told)
    within = [lead for lead in told if lead.pairs > 1 and abs(lead.mean) <= 2 * lead.stderr]

    if behind:
        sentences = [f"{method.upper()} does not beat {names} here: {points}."]
    elif leads:
        sentences = [f"{method.upper()} is ahead of {names} here on average: {points}."]
    else:
        sentences = [f"{method.upper()} has no run of another method to be compared with."]
    if any(lead.pairs == 1 for lead in told):
        sentences.append("With one pair the standard error is undefined.")
    elif within:
        within_names = " and ".join(lead.method.upper() for lead in within)
        sentences.append(f"The difference to {within_names} does not exceed two standard errors.")
    elif told:
        sentences.append("The difference exceeds two standard errors.")
    table = aggregate(records)
    grid = len(table.rows) * (len(table.columns) - 1) * table.seeds
    if len(records) < grid:
        sentences.append(f"{grid - len(records)} of {grid} runs have not finished.")
    return " ".join(sentences)
