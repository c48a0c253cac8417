"""The hyperparameters of a benchmark's methods: one flat list of names, as configurations, jobs and cards have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hf_sage.methods import METHODS
from hf_sage.trainer import SAGEArguments, SAGEConfig

STEP = frozenset(item.name for item in fields(SAGEArguments))
"""The fields of `SAGEConfig` that are hyperparameters of methods, or choose one."""

OPTIMIZER = frozenset(item.name for item in fields(SAGEConfig) if item.init) - STEP
"""Its other fields. What a method calls by such a name (DANN's ``learning_rate``) is not set in a benchmark."""


def takes(method: str) -> list[str]:
    """The hyperparameters of a method."""
    return [name for name in inspect.signature(METHODS[method]).parameters if name not in OPTIMIZER]


def as_fields(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as fields of `SAGEConfig`: those that are none of its fields are ``method_options``."""
    own = {name: value for name, value in hyperparameters.items() if name in STEP | OPTIMIZER}
    options = {name: value for name, value in hyperparameters.items() if name not in own}
    return own | ({"method_options": options} if options else {})
