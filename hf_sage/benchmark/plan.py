"""From a configuration to jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from hf_sage.benchmark.config import Config, MethodSettings, Setup
from hf_sage.benchmark.entrants import method_of
from hf_sage.benchmark.hyperparameters import OPTIMIZER, STEP, takes
from hf_sage.benchmark.inputs import check_held_out, domains_of
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.results import Result
from hf_sage.benchmark.search import draw
from hf_sage.benchmark.selection import best_trial
from hf_sage.data import EMBEDDED


def jobs_of(config: Config) -> list[Job]:
    """The jobs that are known beforehand: datasets outermost, then seeds, trials, held-out domains, methods innermost.

    Where trials are searched with the first seeds only, the jobs of the other seeds follow from their results, see
    `repeats_of`.

    Raises:
        ValueError: If the data cannot be had, or does not have the domains to hold out.
    """
    jobs = []
    domains_by_dataset = {dataset: domains_of(dataset, config.options) for dataset in config.datasets}
    known = [domain for domains in domains_by_dataset.values() for domain in domains]
    if unknown := [name for name in config.held_out or () if name not in known]:
        raise ValueError(
            f"No domain {', '.join(map(repr, unknown))} to hold out in {', '.join(config.datasets)}: "
            f"use some of {', '.join(map(repr, known))}, or 'all'."
        )
    held_out = {dataset: _held_out(dataset, domains, config) for dataset, domains in domains_by_dataset.items()}
    for dataset in config.datasets:
        setup = config.setup_of(dataset)
        if dataset in EMBEDDED and setup.test_convention != "in_split":
            raise ValueError(f"{dataset} comes with the rows it is tested on: leave test_convention at 'in_split'.")
        jobs += [
            Job(
                dataset=dataset,
                method=method,
                held_out=domains,
                seed=seed,
                steps=setup.steps,
                trial=trial,
                model=setup.model,
                head=setup.head,
                prompt=setup.prompt,
                rows_per_domain=setup.rows_per_domain,
                evaluate_every=min(setup.evaluate_every, setup.steps),
                transform=setup.transform,
                test_convention=setup.test_convention,
                hyperparameters=hyperparameters(method, settings, trial, setup, config),
                training=setup.training,
            )
            for seed in config.all_seeds
            for trial in range(config.trials)
            for domains in held_out[dataset]
            for method, settings in config.methods.items()
            if seed in config.searched_seeds(method)
        ]
    return jobs


class Repeats(NamedTuple):
    """Jobs that repeat chosen trials with other seeds.

    Attributes:
        jobs: Those whose trial has been chosen.
        unchosen: For how many methods and held-out domains there is nothing to choose from yet: a trial is not done.
    """

    jobs: list[Job]
    unchosen: int


def repeats_of(config: Config, results: Sequence[Result]) -> Repeats:
    """The jobs that repeat a chosen trial: of each method and held-out domain, with the seeds not searched with.

    Args:
        config: The benchmark.
        results: Those of `jobs_of` that there are, and any others.
    """
    found = {result.job.digest: result for result in results}
    searched: dict[tuple[str, str, tuple[str, ...]], list[Job]] = {}
    for job in jobs_of(config):
        if config.repeating_seeds(job.method):
            searched.setdefault((job.dataset, job.method, job.held_out), []).append(job)
    whole = [jobs for jobs in searched.values() if all(job.digest in found for job in jobs)]
    chosen = [best_trial([found[job.digest] for job in jobs]) for jobs in whole]
    repeats = [replace(job, seed=seed) for job in chosen for seed in config.repeating_seeds(job.method)]
    return Repeats(repeats, unchosen=len(searched) - len(whole))


def hyperparameters(
    method: str, settings: MethodSettings, trial: int, setup: Setup, config: Config
) -> dict[str, float]:
    """What a method is trained with in a trial: as drawn, else as set, else by the preset, else by default."""
    defaults = takes(method)
    own = {name: value for name, value in defaults.items() if name in STEP and isinstance(value, float)}  # ρ and γ
    values = {"learning_rate": setup.learning_rate} | own | setup.hyperparameters.get(method_of(method), {})
    values |= settings.hyperparameters
    if trial:
        common = {name: ends for name, ends in config.search.items() if name in defaults or name in OPTIMIZER}
        for name, (low, high) in (common | settings.search).items():
            drawn = draw(name, low, high, trial, config.search_seed)
            values[name] = round(drawn) if isinstance(defaults.get(name), int) else drawn
    return values


def _held_out(dataset: str, domains: list[str], config: Config) -> list[tuple[str, ...]]:
    """What is held out of a dataset: each of its domains that the configuration names, and every pair with one of them.

    Leave-one-domain-out validation of a domain asks for its pairs with all others.
    """
    named = [name for name in domains if config.held_out is None or name in config.held_out]
    if not named:
        raise ValueError(f"{dataset} has none of the domains to hold out; it has {', '.join(map(repr, domains))}.")
    pairs = [pair for pair in combinations(domains, 2) if set(pair) & set(named)] if config.held_out_pairs else []
    held_out = [*((name,) for name in named), *pairs]
    check_held_out(dataset, domains, held_out[-1])
    return held_out
