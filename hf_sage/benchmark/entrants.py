"""Who takes part in a benchmark: a method, perhaps with Muon for its optimizer or SWAD's average for its weights.

Such a one is called ``<method>+muon``, ``<method>+swad`` or ``<method>+muon+swad``.
"""

from __future__ import annotations

import inspect

from hf_sage.methods import METHODS
from hf_sage.trainer.swad import SWADCallback

SWAD, MUON = "swad", "muon"
"""Alone, as both are known, they are short for ``erm+swad`` and ``erm+muon``."""

LONG = {f"erm+{name}": name for name in (SWAD, MUON)}
"""What they are not called, so that nothing is run under two names."""

ADDITIONS = (MUON, SWAD)
"""What a method may have behind its name, in the order in which it has them."""

ENTRANTS = (*METHODS, SWAD, MUON)
"""What ``methods: all`` stands for."""

SWAD_HYPERPARAMETERS = {
    f"swad_{name}": own.default for name, own in inspect.signature(SWADCallback).parameters.items() if name != "metric"
}
"""Those of SWAD and their defaults: prefixed, because methods may have some of the same names."""


def method_of(entrant: str) -> str:
    """The name of the method that an entrant trains with."""
    return _parts(entrant)[0]


def is_averaged(entrant: str) -> bool:
    """Whether what counts is SWAD's average of its weights."""
    return SWAD in _parts(entrant)[1:]


def has_muon(entrant: str) -> bool:
    """Whether Muon is its optimizer."""
    return MUON in _parts(entrant)[1:]


def is_entrant(name: str) -> bool:
    """Whether there is one of this name."""
    method, *additions = _parts(name)
    return method in METHODS and additions == [addition for addition in ADDITIONS if addition in additions]


def _parts(entrant: str) -> list[str]:
    """The method, and what it has in addition."""
    return ["erm", entrant] if entrant in ADDITIONS else entrant.split("+")
