"""Measurements side by side: contestants take turns in one process, and rounds are paired.

Time is the CPU time of the process unless another clock is named. A contestant that runs on one
thread and waits for nothing takes as much CPU time as it takes by the wall clock on an idle
machine; on a busy one CPU time is disturbed less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

TimedWork = Callable[[], int]
"""Does some work and returns how many units of work it was."""


@dataclass(frozen=True)
class BenchResult:
    """One line of the table of measurements."""

    part: str
    """The part of the table that it belongs to."""
    name: str
    """The name of what was measured."""
    unit: str
    """The unit of the values."""
    values: tuple[float, ...]
    """The measurements, one a round."""

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return median(self.values)

    def over(self, other: BenchResult, name: str | None = None) -> BenchResult:
        """Returns this result as a multiple of another one, round by round.

        Args:
            other: The other result, of as many rounds.
            name: The name of the ratio; None for one made of both names.
        """
        pairs = zip(self.values, other.values, strict=True)
        values = tuple(mine / theirs for mine, theirs in pairs)
        return BenchResult(self.part, name or f"{self.name} / {other.name}", "x", values)


def rate(
    work: TimedWork, seconds: float = 0.0, clock: Callable[[], float] = time.process_time
) -> float:
    """Measures units of work a second.

    Args:
        work: The work; it is done at least once.
        seconds: The work is done again until so much time has passed.
        clock: Tells the time in seconds; the wall clock if something is waited for, such as a GPU.
    """
    num, passed, start = 0, 0.0, clock()
    while not num or passed < seconds:
        num += work()
        passed = clock() - start
    return num / passed


def take_turns(
    part: str, unit: str, contestants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, BenchResult]:
    """Measures all contestants once a round, every other round backwards.

    A machine that slows down for a while slows down all of them.

    Args:
        part: The part of the table.
        unit: The unit of what the contestants return.
        contestants: The functions that measure once, by name.
        repeats: The number of rounds.
    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(repeats):
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            values[name].append(contestants[name]())
    return {name: BenchResult(part, name, unit, tuple(found)) for name, found in values.items()}
