"""Which hyperparameter trial and which checkpoint of a run count: decided after the runs, by rules under their names.

The rules are DomainBed's (Gulrajani & Lopez-Paz 2021, "In Search of Lost Domain Generalization", §3), and SWAD's
variant of the oracle (Cha et al. 2021). Accuracies that rules look at are means over domains; of equal ones the
earliest trial and checkpoint win.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.records import Record
from hf_sage.benchmark.results import Evaluation, Result, source_summary


class Choice(NamedTuple):
    """One checkpoint of one trial, and how the rule values it."""

    value: float
    result: Result
    evaluation: Evaluation


Trials = list[Result]
"""The runs of one dataset, method, held-out domain and seed: one a trial, in order."""
Pairs = dict[tuple[int, str], Result]
"""Those with a second domain held out as well, by trial and that domain."""


@dataclass(frozen=True)
class SelectionRule:
    """A rule.

    Attributes:
        title: What tables call it.
        description: What it looks at, in a sentence.
        choices: The candidates of a run, in order; the one of the highest value is chosen.
    """

    title: str
    description: str
    choices: Callable[[Trials, Pairs], Iterable[Choice]]


def select(results: Iterable[Result], rule: str) -> list[Record]:
    """Chooses trial and checkpoint of every run.

    Args:
        results: Of one benchmark or several.
        rule: Name of the rule, see `SELECTION`.

    Returns:
        A record for every dataset, method, held-out domain and seed, in order of first appearance.

    Raises:
        ValueError: If the rule is unknown, or needs runs that are not there.
    """
    if rule not in SELECTION:
        raise ValueError(f"Unknown selection rule {rule!r}: use one of {', '.join(map(repr, SELECTION))}.")
    runs: dict[tuple[str, str, str, int], Trials] = defaultdict(list)
    pairs: dict[tuple[str, str, str, int], Pairs] = defaultdict(dict)
    for result in results:
        job = result.job
        for target in job.held_out:
            key = (job.dataset, job.method, target, job.seed)
            if len(job.held_out) == 1:
                runs[key].append(result)
            elif len(job.held_out) == 2:
                (other,) = set(job.held_out) - {target}
                pairs[key][job.trial, other] = result
    records = []
    for key, own in runs.items():
        trials = sorted(own, key=lambda result: result.job.trial)
        _refuse_mixtures(trials)
        best = max(SELECTION[rule].choices(trials, pairs[key]), key=lambda choice: choice.value)
        records.append(best.result.record(best.evaluation))
    return records


def best_trial(results: Sequence[Result]) -> Job:
    """The job of the trial that training-domain validation prefers, on average over the seeds it was run with.

    Args:
        results: The runs of one dataset, method and held-out domain.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for result in results:
        values[result.job.trial].append(max(choice.value for choice in _training_domain([result], {})))
    trial = max(sorted(values), key=lambda number: fmean(values[number]))
    return next(result.job for result in results if result.job.trial == trial)


def _training_domain(trials: Trials, _: Pairs) -> Iterable[Choice]:
    for result in trials:
        for evaluation in result.evaluations:
            yield Choice(source_summary(evaluation.accuracy, result.sources)["avg_accuracy"], result, evaluation)


def _leave_one_domain_out(trials: Trials, pairs: Pairs) -> Iterable[Choice]:
    for result in trials:
        others = {domain: pairs.get((result.job.trial, domain)) for domain in result.sources}
        if missing := [domain for domain, other in others.items() if other is None]:
            raise ValueError(
                f"Leave-one-domain-out validation of {result.job.name} needs the runs that hold out "
                f"{result.job.held_out[0]!r} and one more domain; those with {', '.join(map(repr, missing))} are not "
                "there. Run the benchmark with `held_out_pairs: true` (--held-out-pairs), or choose another rule."
            )
        by_step = [
            {evaluation.step: evaluation.accuracy[domain]["in"] for evaluation in other.evaluations}
            for domain, other in others.items()
            if other is not None
        ]
        for evaluation in result.evaluations:
            if all(evaluation.step in steps for steps in by_step):
                yield Choice(fmean(steps[evaluation.step] for steps in by_step), result, evaluation)


def _oracle_last(trials: Trials, _: Pairs) -> Iterable[Choice]:
    for result in trials:
        evaluation = max(result.evaluations, key=lambda evaluation: evaluation.step)
        yield Choice(evaluation.accuracy[result.job.held_out[0]]["out"], result, evaluation)


def _oracle_best(trials: Trials, _: Pairs) -> Iterable[Choice]:
    for result in trials:
        for evaluation in result.evaluations:
            yield Choice(evaluation.accuracy[result.job.held_out[0]]["out"], result, evaluation)


SELECTION: dict[str, SelectionRule] = {
    "training_domain": SelectionRule(
        "training-domain validation",
        "trial and checkpoint by mean accuracy on the out-splits of the source domains",
        _training_domain,
    ),
    "leave_one_domain_out": SelectionRule(
        "leave-one-domain-out validation",
        "trial and checkpoint by mean accuracy on each source domain in a run that held it out too",
        _leave_one_domain_out,
    ),
    "oracle_last": SelectionRule(
        "oracle, last checkpoint",
        "trial by accuracy on the out-split of the held-out domain itself, at the last checkpoint (DomainBed's oracle)",
        _oracle_last,
    ),
    "oracle_best": SelectionRule(
        "oracle, best checkpoint",
        "trial and checkpoint by accuracy on the out-split of the held-out domain itself (SWAD's oracle)",
        _oracle_best,
    ),
}
"""The rules, by the names that ``--selection`` takes."""


def _refuse_mixtures(trials: Trials) -> None:
    """Trials of one run may differ in their hyperparameters and in nothing else."""
    first = trials[0].job
    numbers = [result.job.trial for result in trials]
    for result in trials:
        differ = [
            name
            for name, value in result.job.to_dict().items()
            if name not in ("trial", "hyperparameters") and value != first.to_dict()[name]
        ]
        if differ:
            raise ValueError(
                f"The runs of {first.name} differ in {', '.join(differ)}, so they are of different benchmarks and "
                "cannot share a table. Give each configuration a folder of its own by --output-dir."
            )
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"Two runs of {first.name} have other hyperparameters under the same trial, so they are of different "
            "benchmarks. Give each configuration a folder of its own by --output-dir."
        )
