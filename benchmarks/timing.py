"""Measurements side by side: contestants take turns in one process, and rounds are paired.

Time is CPU time of the process unless another clock is named. Contestants that run on one thread
and wait for nothing take as much of it as of the wall clock's on an idle machine; on a busy one it
is disturbed less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Work = Callable[[], int]
"""Does some work and returns how many units it was."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    part: str
    name: str
    unit: str
    values: tuple[float, ...]
    """One a round."""

    @property
    def median(self) -> float:
        """Of all rounds."""
        return median(self.values)

    def over(self, other: Result, name: str | None = None) -> Result:
        """This result as a multiple of another one, round by round."""
        pairs = zip(self.values, other.values, strict=True)
        values = tuple(mine / theirs for mine, theirs in pairs)
        return Result(self.part, name or f"{self.name} / {other.name}", "x", values)


def rate(work: Work, seconds: float = 0.0, clock: Callable[[], float] = time.process_time) -> float:
    """Units of work a second.

    Args:
        work: Done at least once.
        seconds: Done again until so much time has passed.
        clock: Seconds; the wall clock's where something is waited for, such as a GPU.
    """
    num, passed, start = 0, 0.0, clock()
    while not num or passed < seconds:
        num += work()
        passed = clock() - start
    return num / passed


def take_turns(
    part: str, unit: str, contestants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, Result]:
    """Measures all contestants once a round, every other round backwards.

    A machine that slows down for a while slows down all of them.

    Args:
        part: Of the table.
        unit: Of what they return.
        contestants: What to measure, by name.
        repeats: Rounds.
    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(repeats):
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            values[name].append(contestants[name]())
    return {name: Result(part, name, unit, tuple(found)) for name, found in values.items()}
