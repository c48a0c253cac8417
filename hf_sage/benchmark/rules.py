"""Under which rules the numbers of a table were made, so that every table can say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_sage.benchmark.domainbed import TestConvention
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.selection import SELECTION
from hf_sage.benchmark.store import Store
from hf_sage.data import EMBEDDED

CONVENTIONS: dict[TestConvention, str] = {
    "in_split": "the 80 % in-split of the held-out domain (DomainBed's convention, `in_split`)",
    "full": "all images of the held-out domain (`full`), of which the oracles have seen 20 %",
    "official": "the images of the held-out domain that its publisher's test list names (`official`)",
}
COMMON = ("test_convention", "model", "head", "steps", "transform", "rows_per_domain")
"""What all runs of a dataset in a table have in common."""
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

    def sentences(self) -> list[str]:
        """For people."""
        rule = SELECTION[self.selection]
        tested = OWN_SPLITS if self.dataset in EMBEDDED else CONVENTIONS[self.convention]
        trials = f"{self.trials} hyperparameter trial{'s' * (self.trials > 1)} a method"
        return [
            f"Selection: {rule.title} ({rule.description}), {trials}. Tested on: {tested}. Model {self.model}, head "
            f"{self.head}, {self.steps:,} steps of {self.rows_per_domain} images a domain, transform {self.transform}.",
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
    for name in COMMON:
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
    )


def refuse_other_benchmarks(store: Store, jobs: Sequence[Job]) -> None:
    """Refuses jobs that could not share a table with those that a folder has.

    Raises:
        ValueError: If there are such; the message says in what they differ.
    """
    held = {folder.job.dataset: folder.job for folder in store.jobs()}
    for job in jobs:
        there = held.get(job.dataset, job)
        if differ := [f"{n} {getattr(there, n)!r} there" for n in COMMON if getattr(there, n) != getattr(job, n)]:
            raise ValueError(
                f"{store.folder} has runs of {job.dataset} with {', '.join(differ)}: they could not share a table with "
                "what is to be run. Give this configuration a folder of its own by --output-dir."
            )
