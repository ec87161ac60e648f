"""A learning curve: what heads save that have learned from few questions and from many.

All questions are judged by heads that have not seen them: those of each fold by a head that has
learned from so many questions of the others. What heads of several draws come to is averaged, price
by price. Beside them stand the simplest policies, at the best of their numbers. Who learns from
nothing needs no fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.pathwise import PathwiseConfig
from benchmarks.started import started_head
from benchmarks.timing import BenchResult
from evaluation.compare import swept
from evaluation.frontier import savings_at_losses
from evaluation.intervals import Float, Resamples, interval
from evaluation.outcome import Outcome, average
from evaluation.protocol import folds
from haltwise import InputError
from haltwise.policy.features import FEATURE_GROUPS
from policies.baselines import Confidence, Evidence
from policies.head import HeadPolicy
from traces import Traces

_PART = "curve"
# The EM that may be lost, at which savings are read.
_LOSSES = (0.0, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class CurveConfig:
    """What heads save that have learned from few questions and from many."""

    num_questions: tuple[int, ...] = (30, 60, 120, 240)
    """The numbers of questions to learn from."""
    num_folds: int = 3
    """The number of folds: of two of three, a head learns at most."""
    num_draws: int = 4
    """The number of draws of folds and questions."""
    steps: int = 300
    """The gradient steps of a head."""
    groups: tuple[str, ...] = ()
    """The groups of features that heads see. Default: all that the traces have."""


def measure(traces: Traces, config: CurveConfig) -> list[BenchResult]:
    """Measures savings and leads, at each loss of EM and in the mean over them.

    Raises:
        InputError: If there are too few questions, a group is unknown, or the traces have no
            confidence.
    """
    if unknown := set(config.groups) - set(FEATURE_GROUPS):
        raise InputError(f"groups are {', '.join(sorted(unknown))}, expected feature groups")
    num = len(np.unique(traces.question_id))
    most = num - -(-num // config.num_folds)
    if max(config.num_questions) > most:
        raise InputError(
            f"curve.num_questions is {max(config.num_questions)}: {config.num_folds} folds of "
            f"{num} questions leave {most} to learn from"
        )
    drawn = Resamples.draw(traces.question_id)
    simple: dict[str, _Frontier] = {}
    for policy in (Evidence(), Confidence()):
        outcomes = swept([policy], traces, "always")
        if outcomes is None:
            raise InputError("the traces have no confidence, expected some")
        simple[policy.name] = _Frontier.of(traces, [*outcomes.values()], drawn)
    results = [line for name, one in simple.items() for line in _savings(name, one)]
    for number in config.num_questions:
        draws = [_out_of_fold(traces, number, config, draw) for draw in range(config.num_draws)]
        outcomes_of_all = [average(each) for each in zip(*draws, strict=True)]
        head = _Frontier.of(traces, outcomes_of_all, drawn)
        results += _compared(f"{number} questions", head, simple, num)
    return results


def _out_of_fold(traces: Traces, number: int, config: CurveConfig, draw: int) -> list[Outcome]:
    """What heads come to at each of their prices, on questions that they have not seen."""
    fold = folds(traces.question_id, config.num_folds, draw)
    parts = []
    for k in range(config.num_folds):
        known = np.unique(traces.question_id[fold != k])
        learned = np.random.default_rng([draw, k]).permutation(known)[:number]
        learns = traces.select(np.isin(traces.question_id, learned))
        pathwise = PathwiseConfig(steps=config.steps)
        head, _ = started_head(learns, pathwise, draw, config.groups)
        found = swept([HeadPolicy(head)], traces.select(fold == k), head.config.halting.probing)
        assert found is not None
        parts.append([*found.values()])
    rows = [np.flatnonzero(fold == k) for k in range(config.num_folds)]
    return [_joined(at, rows) for at in zip(*parts, strict=True)]


def _joined(parts: Sequence[Outcome], rows: Sequence[np.ndarray]) -> Outcome:
    """The outcome of all traces, of which each part has some rows."""
    order = np.argsort(np.concatenate(rows))
    em, cost, halted = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("em", "cost", "halted")
    )
    return Outcome(em, cost, halted)


@dataclass(frozen=True, eq=False)
class _Frontier:
    """What a policy saves at each of the losses, and in their mean."""

    savings: Float
    """(L + 1,)"""
    resampled: Float
    """(L + 1, R) in each resample of the questions."""

    @classmethod
    def of(cls, traces: Traces, outcomes: Sequence[Outcome], drawn: Resamples) -> _Frontier:
        savings, each = savings_at_losses(traces, outcomes, _LOSSES, drawn)
        return cls(np.array([*savings, savings.mean()]), np.array([*each, each.mean(axis=0)]))


def _names() -> list[str]:
    return [*(f"at a loss of {100 * loss:g}" for loss in _LOSSES), "in the mean"]


def _savings(name: str, frontier: _Frontier) -> Iterator[BenchResult]:
    for where, value in zip(_names(), frontier.savings.tolist(), strict=True):
        yield BenchResult(_PART, f"{name}: saving {where}", "%", (100 * value,))


def _compared(
    name: str, head: _Frontier, simple: Mapping[str, _Frontier], num: int
) -> Iterator[BenchResult]:
    """Savings and leads, with the ends of intervals, and how many questions would tell a lead.

    Args:
        name: Of the head.
        head: What it saves.
        simple: By name, the others.
        num: The number of questions that judge.
    """
    yield from _savings(name, head)
    for rival, other in simple.items():
        leads = head.savings - other.savings
        for k, where in enumerate(_names()):
            low, high = interval(head.resampled[k] - other.resampled[k])
            lead = f"{name}: lead over {rival} {where}"
            for end, value in (("", leads[k]), (", lower end", low), (", upper end", high)):
                yield BenchResult(_PART, lead + end, "%", (100 * float(value),))
        # An interval narrows with the root of the number of questions.
        half = (high - low) / 2
        needed = num * (half / abs(leads[-1])) ** 2 if leads[-1] else np.inf
        title = f"{name}: questions to tell its lead over {rival} in the mean"
        yield BenchResult(_PART, title, "", (float(needed),))
