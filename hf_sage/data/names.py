"""Names of classes and domains that are written in more than one way."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping


def composed(name: str) -> str:
    """One spelling for what looks the same: archives made on macOS hold "é" as two letters (NFC instead of NFD)."""
    return unicodedata.normalize("NFC", name)


def loosely(name: str) -> str:
    """A name without case, spaces, underscores and hyphens: "Alarm_Clock" and "alarm clock" are the same."""
    return "".join(letter for letter in composed(name).casefold() if letter not in " _-")


def by_loose_name(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Each name -> the known name it stands for, or itself where there is none."""
    spelled = {loosely(name): name for name in known}
    return {name: spelled.get(loosely(name), name) for name in names}


def look_alikes(classes: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """Pairs of classes that differ in case, spaces, underscores or hyphens alone and are in no domain together.

    Args:
        classes: Domain -> the names of its classes.
    """
    spellings: dict[str, list[str]] = {}
    for name in sorted(set().union(*classes.values())):
        spellings.setdefault(loosely(name), []).append(name)
    return [
        (a, b)
        for same in spellings.values()
        for i, a in enumerate(same)
        for b in same[i + 1 :]
        if not any(a in own and b in own for own in classes.values())
    ]
