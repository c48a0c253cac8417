"""Times of several contestants in one run, so that their ratios mean something on any machine."""

from __future__ import annotations

import gc
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

import torch

Phases = Sequence[Callable[[], object]]
"""What a contestant does once, in phases that are timed one by one."""


class Clock(Protocol):
    """Something that times phases."""

    def laps(self, phases: Phases) -> list[float]:
        """Runs the phases in order and returns the seconds that each took."""


class ProcessClock:
    """CPU time of this process, all its threads: what the machine does besides does not count."""

    def laps(self, phases: Phases) -> list[float]:
        """See `Clock`."""
        return _laps(phases, time.process_time)


class ChildClock:
    """CPU time of the processes that a phase starts and waits for."""

    def laps(self, phases: Phases) -> list[float]:
        """See `Clock`."""
        return _laps(phases, self._now)

    @staticmethod
    def _now() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime


def _laps(phases: Phases, now: Callable[[], float]) -> list[float]:
    marks = [now()]
    for phase in phases:
        phase()
        marks.append(now())
    return [b - a for a, b in pairwise(marks)]


class DeviceClock:
    """Time between events on the GPU's own stream."""

    def laps(self, phases: Phases) -> list[float]:
        """See `Clock`."""
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(len(phases) + 1)
        ]
        torch.cuda.synchronize()
        events[0].record()
        for phase, event in zip(phases, events[1:], strict=True):
            phase()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return DeviceClock() if device.type == "cuda" else ProcessClock()


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the lowest and highest ratio within one repetition."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant, by repetition and phase."""

    seconds: dict[str, list[list[float]]]

    def total(self, name: str, phase: int | None = None) -> list[float]:
        """Seconds of one phase (all of them by default) in each repetition."""
        return [sum(laps) if phase is None else laps[phase] for laps in self.seconds[name]]

    def ratio(self, over: str, under: str, phase: int | None = None) -> Ratio:
        """The time of one contestant divided by that of another."""
        above, below = self.total(over, phase), self.total(under, phase)
        each = [a / b for a, b in zip(above, below, strict=True)]
        return Ratio(median(above) / median(below), min(each), max(each))

    def mixed_ratio(self, over: Mapping[str, int], under: str) -> Ratio:
        """The mean time of contestants, each counted so many times, divided by that of another."""
        count = sum(over.values())
        rounds = zip(*([times * n for times in self.total(name)] for name, n in over.items()), strict=True)
        above, below = [sum(own) / count for own in rounds], self.total(under)
        each = [a / b for a, b in zip(above, below, strict=True)]
        return Ratio(median(above) / median(below), min(each), max(each))


def interleaved(contestants: Mapping[str, Phases], clock: Clock, repetitions: int, seed: int) -> Times:
    """Times every contestant once a repetition, in an order shuffled anew each time, after one round of warm-up.

    Args:
        contestants: Phases by name.
        clock: What to time by.
        repetitions: How many rounds count.
        seed: Seed of the orders.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    for repetition in range(repetitions + 1):
        shuffle(order)
        gc.collect()
        for name in order:
            laps = clock.laps(contestants[name])
            if repetition > 0:
                seconds[name].append(laps)
    return Times(seconds)
