"""Under which rules the numbers of a table were made, so that every table can say so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hf_sage.benchmark.domainbed import TestConvention
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.selection import SELECTION, best_trial
from hf_sage.data import EMBEDDED

CONVENTIONS: dict[TestConvention, str] = {
    "in_split": "the 80 % in-split of the held-out domain (DomainBed's convention, `in_split`)",
    "full": "all images of the held-out domain (`full`), of which the oracles have seen 20 %",
    "official": "the images of the held-out domain that its publisher's test list names (`official`)",
}
OWN_SPLITS = "the test rows that the dataset comes with (its scans are split before they are styled)"


@dataclass(frozen=True)
class Rules:
    """Selection and test convention of the runs of one dataset, and what they have in common.

    Attributes:
        dataset: Its name.
        selection: Name of the selection rule.
        convention: Name of the test convention.
        trials: Number of hyperparameter trials.
        model: Name of the model.
        head: Its head.
        steps: Number of updates.
        transform: Name of the augmentation.
        rows_per_domain: Rows of each source domain in a batch.
        searched_seeds: The seeds that every trial was run with, where the others repeat the trial that was chosen so;
            empty where every trial was run with every seed.
    """

    dataset: str
    selection: str
    convention: TestConvention
    trials: int
    model: str
    head: str
    steps: int
    transform: str
    rows_per_domain: int
    searched_seeds: tuple[int, ...] = ()

    def sentences(self) -> list[str]:
        """For people."""
        rule = SELECTION[self.selection]
        tested = OWN_SPLITS if self.dataset in EMBEDDED else CONVENTIONS[self.convention]
        trials = f"{self.trials} hyperparameter trial{'s' * (self.trials > 1)} a method"
        tuning = []
        if self.searched_seeds:
            seeds = f"seed{'s' * (len(self.searched_seeds) > 1)} {' and '.join(map(str, self.searched_seeds))}"
            tuning = [
                f"All trials were run with {seeds} only. The other seeds repeat, for each method and held-out domain, "
                "the one trial that training-domain validation chose there."
            ]
        return [
            f"Selection: {rule.title} ({rule.description}), {trials}. Tested on: {tested}. Model {self.model}, head "
            f"{self.head}, {self.steps:,} steps of {self.rows_per_domain} images a domain, transform {self.transform}.",
            *tuning,
        ]

    def facts(self) -> dict[str, str]:
        """For programs."""
        convention = "own_test_rows" if self.dataset in EMBEDDED else self.convention
        return {"selection": self.selection, "test_convention": convention}


def rules_of(dataset: str, results: Sequence[Result], selection: str) -> Rules:
    """What the runs of a dataset have in common.

    Raises:
        ValueError: If they differ in what must be the same for all methods of a table.
    """
    jobs = [result.job for result in results if result.job.dataset == dataset]
    common = ("test_convention", "model", "head", "steps", "transform", "rows_per_domain")
    for name in common:
        if len(values := sorted({getattr(job, name) for job in jobs})) > 1:
            raise ValueError(
                f"The runs of {dataset} differ in {name} ({', '.join(map(repr, values))}), so they are of different "
                "benchmarks and cannot share a table. Give each configuration a folder of its own by --output-dir."
            )
    first = jobs[0]
    return Rules(
        dataset=dataset,
        selection=selection,
        convention=first.test_convention,
        trials=len({job.trial for job in jobs}),
        model=first.model,
        head=first.head,
        steps=first.steps,
        transform=first.transform,
        rows_per_domain=first.rows_per_domain,
        searched_seeds=searched_seeds([result for result in results if result.job.dataset == dataset]),
    )


def searched_seeds(results: Sequence[Result]) -> tuple[int, ...]:
    """The seeds that every trial was run with, if the runs of all others repeat the trial that was chosen with these.

    Args:
        results: Those of one dataset.

    Returns:
        The seeds; none if every trial was run with every seed, or the other runs are not such repetitions.
    """
    runs: dict[tuple[str, tuple[str, ...]], dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        runs[result.job.method, result.job.held_out][result.job.seed].append(result)
    searched: set[int] = set()
    repeating: set[int] = set()
    for by_seed in runs.values():
        most = max(map(len, by_seed.values()))
        if most == 1:
            continue
        whole = [own for own in by_seed.values() if len(own) == most]
        chosen = best_trial([result for own in whole for result in own]).trial
        others = {seed: own for seed, own in by_seed.items() if len(own) < most}
        if any([result.job.trial for result in own] != [chosen] for own in others.values()):
            return ()
        searched |= by_seed.keys() - others.keys()
        repeating |= others.keys()
    return tuple(sorted(searched)) if repeating and not searched & repeating else ()
