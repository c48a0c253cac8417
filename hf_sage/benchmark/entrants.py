"""Who takes part in a benchmark: a method, or a method whose weights SWAD averages, ``<method>+swad``."""

from __future__ import annotations

import inspect

from hf_sage.methods import METHODS
from hf_sage.trainer.swad import SWADCallback

AVERAGED = "+swad"
SWAD = "swad"
"""Short for ``erm+swad``, as the method is known."""

ENTRANTS = (*METHODS, SWAD)
"""What ``methods: all`` stands for."""

SWAD_HYPERPARAMETERS = {
    f"swad_{name}": own.default for name, own in inspect.signature(SWADCallback).parameters.items() if name != "metric"
}
"""Those of SWAD and their defaults: prefixed, because methods may have some of the same names."""


def method_of(entrant: str) -> str:
    """The name of the method that an entrant trains with."""
    return "erm" if entrant == SWAD else entrant.removesuffix(AVERAGED)


def is_averaged(entrant: str) -> bool:
    """Whether what counts is SWAD's average of its weights."""
    return entrant == SWAD or entrant.endswith(AVERAGED)


def is_entrant(name: str) -> bool:
    """Whether there is one of this name."""
    return method_of(name) in METHODS
