"""What a training run returned at its evaluations, and how far two of them can be apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.control.betting import half_width, log_wealth
from haltwise.errors import InputError

Float = NDArray[np.float64]


@dataclass(frozen=True)
class MeanReturn:
    """A mean return where those of the single questions are not known."""

    mean: float
    standard_error: float = 0.0


#: How a mean change is bounded: "bounded" holds for any number of questions whose returns change by
#: at most a span, "normal" is Student's interval.
Interval = Literal["bounded", "normal"]
#: What an evaluation found: the return of each held-out question, or their mean.
Returns = ArrayLike | MeanReturn


class Curve:
    """The evaluations of a run, all on the same held-out questions in the same order."""

    def __init__(self, span: float, interval: Interval = "bounded") -> None:
        """Begins before the first evaluation.

        Args:
            span: The most that the return of a question can change.
            interval: How changes are bounded; means without their questions are always "normal".
        """
        self.steps: list[int] = []
        self.means: list[float] = []
        self._span, self._interval = span, interval
        self._found: list[Float | MeanReturn] = []

    def __len__(self) -> int:
        """Returns the number of evaluations."""
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yields the step and the mean return of each evaluation."""
        return zip(self.steps, self.means, strict=True)

    def add(self, step: int, returns: Returns) -> None:
        """Takes in an evaluation.

        Raises:
            InputError: If a return is no number, there is none, the questions are others than
                before, or the step is not behind that of the evaluation before.
        """
        if self.steps and step <= self.steps[-1]:
            raise InputError(f"evaluation at step {step}, expected one after {self.steps[-1]}")
        found = checked(returns)
        if self._found:
            self._check_like_the_first(found)
        self.steps.append(step)
        self.means.append(mean_of(found))
        self._found.append(found)

    def state(self) -> list[tuple[int, Any]]:
        """Returns all evaluations, as JSON can hold them, for `add`."""
        told = [
            asdict(found) if isinstance(found, MeanReturn) else found.tolist()
            for found in self._found
        ]
        return list(zip(self.steps, told, strict=True))

    def without_gain(self, first: int, least_gain: float, level: float) -> int | None:
        """Returns an evaluation since which the run has surely gained too little.

        It has gained enough for all that with a probability of at most `level` for each evaluation.

        Args:
            first: The index of the first evaluation to compare the last one with.
            least_gain: The gain in the true mean return that is asked of each evaluation.
            level: In (0, 1).

        Returns:
            The index of such an evaluation, the one with the best mean; None if there is none.

        Raises:
            InputError: If a return has changed by more than the span.
        """
        last = len(self) - 1
        asked = least_gain * (last - np.arange(first, last))
        if self._is_normal:
            lacks = self._normal_bounds(first, level) < asked
        else:
            change = self._changes(first) / self._span
            excess = change.shape[1] * asked / self._span - change.sum(axis=1)
            lacks = log_wealth(excess, (change**2).sum(axis=1)) >= -math.log(level)
        # What is more than can be gained at all is not gained.
        lacks |= asked > self._span
        lacking = first + np.flatnonzero(lacks)
        return max(lacking.tolist(), key=self.means.__getitem__, default=None)

    def most_gained(self, since: int, level: float) -> float:
        """Returns the bound on what the last evaluation has gained that `without_gain` goes by.

        Args:
            since: The index of the evaluation to compare with.
            level: In (0, 1).
        """
        if self._is_normal:
            most = float(self._normal_bounds(since, level)[0])
        else:
            change = self._changes(since)[0] / self._span
            width = float(half_width((change**2).sum(), level))
            most = (change.sum() + width) * self._span / len(change)
        return min(most, self._span)

    @property
    def _is_normal(self) -> bool:
        return self._interval == "normal" or isinstance(self._found[-1], MeanReturn)

    def _normal_bounds(self, first: int, level: float) -> Float:
        """Returns bounds on the gain since some evaluations, as far as means are normal."""
        if isinstance(self._found[-1], MeanReturn):
            each = [one for one in self._found[first:] if isinstance(one, MeanReturn)]
            errors = np.array([one.standard_error for one in each])
            gained = self.means[-1] - np.array(self.means[first:-1])
            self._check_span(gained)
            most: Float = gained + _quantile(level, math.inf) * np.hypot(errors[-1], errors[:-1])
            return most
        change = self._changes(first)
        num = change.shape[1]
        if num < 2:
            raise InputError("returns of 1 held-out question, expected at least 2 for an interval")
        error = change.std(axis=1, ddof=1) / math.sqrt(num)
        bounds: Float = change.mean(axis=1) + _quantile(level, num - 1) * error
        return bounds

    def _changes(self, first: int) -> Float:
        """Returns what each return changed since some evaluations (.., questions)."""
        change: Float = np.array(self._found[-1]) - np.array(self._found[first:-1])
        self._check_span(change)
        return change

    def _check_span(self, change: Float) -> None:
        """Refuses changes that are larger than any can be.

        Raises:
            InputError: If one is.
        """
        most = float(np.abs(change).max())
        if most > self._span * (1 + 1e-9):
            raise InputError(
                f"a return changed by {most:g}, expected at most the span, {self._span:g}"
            )

    def _check_like_the_first(self, found: Float | MeanReturn) -> None:
        """Refuses an evaluation of other questions than the first one.

        Raises:
            InputError: If it is one.
        """
        first, now = (
            "a mean" if isinstance(one, MeanReturn) else f"{len(one)} held-out questions"
            for one in (self._found[0], found)
        )
        if first != now:
            raise InputError(f"returns of {now}, expected {first} as in the first evaluation")


def checked(returns: Returns) -> Float | MeanReturn:
    """Returns what an evaluation found, the returns of questions as an array.

    Raises:
        InputError: If a return is no number, or there is none.
    """
    if isinstance(returns, MeanReturn):
        if not math.isfinite(returns.mean) or not 0 <= returns.standard_error < math.inf:
            raise InputError(f"found {returns}, expected a finite mean and an error of 0 or more")
        return returns
    found = np.array(returns, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise InputError(
            f"returns of shape {found.shape}, expected one of each held-out question, at least one"
        )
    if not np.isfinite(found).all():
        num = int((~np.isfinite(found)).sum())
        raise InputError(f"{num} of {len(found)} returns are no finite number, expected none")
    return found


def mean_of(found: Float | MeanReturn) -> float:
    """Returns the mean of what an evaluation found."""
    return found.mean if isinstance(found, MeanReturn) else float(found.mean())


def _quantile(level: float, num_free: float) -> float:
    """Returns what Student's t with some degrees of freedom exceeds with a probability.

    By the first terms of Abramowitz and Stegun (1964), 26.7.5.
    """
    z = NormalDist().inv_cdf(1 - level)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / num_free + second / num_free**2 + third / num_free**3
