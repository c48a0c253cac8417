"""DomainBed's split of every environment into 80 % and 20 %."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_sage.data import domain_names


@dataclass(frozen=True)
class Environment:
    """One domain: its in-split (80 %) and its out-split (20 %)."""

    inside: Any
    outside: Any


def seed_hash(*args: Any) -> int:
    """DomainBed's seed from any arguments."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % (2**31)


def domainbed_split(
    n: int, trial_seed: int, env_index: int, holdout_fraction: float = 0.2
) -> tuple[list[int], list[int]]:
    """Indices of the in-split and of the out-split."""
    keys = list(range(n))
    np.random.RandomState(seed_hash(trial_seed, env_index)).shuffle(keys)
    cut = int(n * holdout_fraction)
    return keys[cut:], keys[:cut]


def environments(
    data: Any, trial_seed: int, holdout_fraction: float = 0.2, domain_column: str = "domain"
) -> dict[str, Environment]:
    """Every domain of a dataset, split."""
    feature = data.features[domain_column]
    values = data.with_format(None)[domain_column][:]
    names = [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]
    found = {}
    for index, domain in enumerate(domain_names(data, domain_column)):
        own = data.select([i for i, name in enumerate(names) if name == domain])
        inside, outside = domainbed_split(len(own), trial_seed, index, holdout_fraction)
        found[domain] = Environment(own.select(inside), own.select(outside))
    return found
