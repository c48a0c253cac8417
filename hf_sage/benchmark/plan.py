"""From a configuration to jobs."""

from __future__ import annotations

import inspect
from itertools import combinations

from hf_sage.benchmark.config import Config, MethodSettings, Setup
from hf_sage.benchmark.hyperparameters import STEP, takes
from hf_sage.benchmark.inputs import check_held_out, domains_of
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.search import draw
from hf_sage.data import EMBEDDED
from hf_sage.methods import METHODS


def jobs_of(config: Config) -> list[Job]:
    """Every job of a benchmark: datasets outermost, then seeds, trials, held-out domains, and methods innermost.

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
            for seed in config.seeds
            for trial in range(config.trials)
            for domains in held_out[dataset]
            for method, settings in config.methods.items()
        ]
    return jobs


def hyperparameters(
    method: str, settings: MethodSettings, trial: int, setup: Setup, config: Config
) -> dict[str, float]:
    """What a method is trained with in a trial: as drawn, else as set, else by the preset, else by default."""
    parameters = inspect.signature(METHODS[method]).parameters
    defaults = {name: parameters[name].default for name in takes(method) if name in STEP}  # ρ and γ; others where set
    own = {name: value for name, value in defaults.items() if isinstance(value, float)}
    values = {"learning_rate": setup.learning_rate} | own | setup.hyperparameters.get(method, {})
    values |= settings.hyperparameters
    if trial:
        common = {name: ends for name, ends in config.search.items() if name in values or name in takes(method)}
        for name, (low, high) in (common | settings.search).items():
            values[name] = draw(name, low, high, trial, config.search_seed)
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
