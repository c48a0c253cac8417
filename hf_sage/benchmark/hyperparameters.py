"""The hyperparameters of a benchmark's methods: one flat list of names, as configurations, jobs and cards have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hf_sage.benchmark.entrants import SWAD_HYPERPARAMETERS, is_averaged, method_of
from hf_sage.methods import METHODS
from hf_sage.trainer import SAGEArguments, SAGEConfig

STEP = frozenset(item.name for item in fields(SAGEArguments))
"""The fields of `SAGEConfig` that are hyperparameters of methods, or choose one."""

OPTIMIZER = frozenset(item.name for item in fields(SAGEConfig) if item.init) - STEP
"""Its other fields."""


def takes(entrant: str) -> dict[str, Any]:
    """The hyperparameters of a method, with SWAD's where it averages, and their defaults."""
    parameters = inspect.signature(METHODS[method_of(entrant)]).parameters
    own = {name: parameter.default for name, parameter in parameters.items()}
    return own | (SWAD_HYPERPARAMETERS if is_averaged(entrant) else {})


def as_fields(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as fields of `SAGEConfig`: those that are none of its fields are ``method_options``.

    SWAD's are for its callback, see `for_swad`.
    """
    trained = {name: value for name, value in hyperparameters.items() if name not in SWAD_HYPERPARAMETERS}
    own = {name: value for name, value in trained.items() if name in STEP | OPTIMIZER}
    options = {name: value for name, value in trained.items() if name not in own}
    return own | ({"method_options": options} if options else {})


def for_swad(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the hyperparameters that are SWAD's, as arguments of its callback."""
    own = SWAD_HYPERPARAMETERS.keys() & hyperparameters.keys()
    return {name.removeprefix("swad_"): hyperparameters[name] for name in own}
