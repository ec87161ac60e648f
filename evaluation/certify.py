"""Finds the most saving price whose loss is bounded with a stated confidence.

The method is Learn then Test (Angelopoulos et al., 2021, arXiv 2110.01052), with a betting test for
the mean of bounded variables. Every price is a hypothesis, "a question loses more than
`max_em_drop` in the mean". They are tested in an order that is fixed before any data is seen, until
the first that is not rejected. All rejections are right at once with probability 1 - `delta` at
least, whatever the losses look like, if questions are drawn independently from those that the price
will meet.

Shapes: N traces, Q questions, K prices, the strictest first.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome, saving
from evaluation.segments import segment_of
from haltwise.policy.certificate import Risk
from traces import Traces

Float = NDArray[np.float64]

# A stake of the whole capital could leave none, which has no logarithm. And means are taken as if
# so many more questions had been seen before, so that one early loss or gain does not stand for all
# that follow.
_MAX_STAKE, _SEEN = 1 - 1e-9, 10.0
# Planned numbers of questions certify with about this chance.
_POWER = 0.8
# Drops are told apart in hundredths of a point.
_STEPS = 10_000


@dataclass(frozen=True, eq=False)
class Measured:
    """What K prices, the strictest first, lose and save on Q questions."""

    losses: Float
    """(Q, K) the loss of each question, which is the mean over its traces and at most 1. The
    questions are in random order."""
    savings: Float
    """(K,) the share of the tokens that is not spent."""


def measure(traces: Traces, outcomes: Sequence[Outcome], risk: Risk) -> Measured:
    """Measures the losses of questions and the savings at some prices.

    Args:
        traces: N traces.
        outcomes: The outcomes at K prices, the strictest first, on those traces.
        risk: What counts as a loss.
    """
    never = traces.final_correct.astype(np.float64)
    ems = np.stack([outcome.em for outcome in outcomes], axis=1).astype(np.float64)
    lost = never[:, None] - ems if risk == "net-em-loss" else never[:, None] * (1 - ems)
    _, question = np.unique(traces.question_id, return_inverse=True)
    sums = np.stack([np.bincount(question, column) for column in lost.T], axis=1)
    means = sums / np.bincount(question)[:, None]
    # The test reads questions in turn, and ids are often ordered by what they ask.
    order = np.random.default_rng(0).permutation(len(means))
    return Measured(means[order], np.array([saving(traces, outcome) for outcome in outcomes]))


def measure_segments(
    traces: Traces, outcomes: Sequence[Outcome], risk: Risk
) -> dict[str, Measured]:
    """Measures losses and savings on each segment by itself.

    A trace without a segment is in one that is named like its task, together with the traces of a
    segment that has that name.

    Args:
        traces: N traces.
        outcomes: The outcomes at K prices, the strictest first, on those traces.
        risk: What counts as a loss.

    Returns:
        By name of the segment, what was measured.
    """
    segment = segment_of(traces)
    measured = {}
    for name in np.unique(segment).tolist():
        rows = segment == name
        of_segment = [outcome.select(rows) for outcome in outcomes]
        measured[name] = measure(traces.select(rows), of_segment, risk)
    return measured


def p_values(losses: Float, max_em_drop: float, delta: float) -> Float:
    """Returns p-values of "the mean loss is at least `max_em_drop`", to be compared with `delta`.

    A gambler with a capital of 1 bets on small losses, a question at a time, at odds that are fair
    or worse under the hypothesis: capital *= 1 - bet (loss - max_em_drop), and 1 / capital is a
    p-value for any bets that do not look ahead (Waudby-Smith and Ramdas, 2024, Estimating means of
    bounded random variables by betting, section 4). These bets aim at a capital of 1 / delta after
    the last question, anew before each one (Voráček and Orabona, 2025, arXiv 2505.22422):

        pace = sqrt(2 log(1 / (delta capital)) / (questions left * spread))

    where the spread is the mean square of the losses so far, if as many more of size 1 are added
    as the hypothesis lacks. Large paces are damped, since losses hurt them more than the square
    root knows. Without a loss the p-value is (1 - max_em_drop)^Q where that just suffices.

    Args:
        losses: (Q, ...) losses of at most 1, in an order that has nothing to do with their size;
            each of the trailing places is a test of its own.
        max_em_drop: The mean loss of the hypothesis, in (0, 1).
        delta: The level that the tests are made for, in (0, 1). At another one they have less
            power.

    Returns:
        P-values (...) in (0, 1]; they are 1 also where the losses seen are above `max_em_drop` in
        the mean.
    """
    goal = math.log(1 / delta)
    log_capital, total, squares = (np.zeros(losses.shape[1:]) for _ in range(3))
    for n, loss in enumerate(losses):
        lacking = np.maximum(max_em_drop - total / (n + _SEEN), 0)
        spread = squares / (n + _SEEN) + lacking
        missing = np.maximum(goal - log_capital, 0)
        pace = np.sqrt(2 * missing / ((len(losses) - n) * spread))
        bet = np.minimum(pace / (1 + pace / 4), _MAX_STAKE) / (1 - max_em_drop)
        log_capital += np.log1p(-bet * (loss - max_em_drop))
        total += loss
        squares += loss**2
    log_p = np.where(total <= len(losses) * max_em_drop, np.minimum(-log_capital, 0), 0)
    p: Float = np.exp(log_p)
    return p


def most_saving(p: Float, savings: Float, delta: float) -> int | None:
    """Finds the certified price with the largest saving.

    Args:
        p: (K,) the p-values of K prices, in the order of testing.
        savings: (K,) what the prices save.
        delta: The probability that any rejection is wrong, at most.

    Returns:
        The index of the price; None (never halt) if no certified price saves anything.
    """
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer

    certified = control_fwer(p, delta, fwer_method=FWERFixedSequenceTesting(n_starts=1))
    paying: list[int] = [k for k in certified.tolist() if savings[k] > 0]
    return max(paying, key=lambda k: savings[k], default=None)


def certify(measured: Measured, max_em_drop: float, delta: float) -> int | None:
    """Finds the most saving price that is certified to lose at most `max_em_drop` in the mean.

    Args:
        measured: What K prices lose and save.
        max_em_drop: The bound on the mean loss, in (0, 1).
        delta: The probability that the certificate is wrong, at most.

    Returns:
        The index of the price; None (never halt) if no certified price saves anything.
    """
    p = p_values(measured.losses, max_em_drop, delta)
    return most_saving(p, measured.savings, delta)


def certify_segments(
    measured: Mapping[str, Measured], max_em_drop: float, delta: float
) -> dict[str, int | None]:
    """Finds the most saving certified price of each segment, such that all statements hold at once.

    The segments with enough questions share `delta` equally (Bonferroni).

    Args:
        measured: By name of a segment, what K prices lose and save on it.
        max_em_drop: The bound on the mean loss of a segment, in (0, 1).
        delta: The probability that any of the statements is wrong, at most.

    Returns:
        By name, the index of the price; None (never halt) also where the questions are too few.
    """
    num_questions = {name: len(of.losses) for name, of in measured.items()}
    tested = segments_to_test(num_questions, max_em_drop, delta)
    return {
        name: certify(of, max_em_drop, delta / len(tested)) if name in tested else None
        for name, of in measured.items()
    }


def segments_to_test(
    num_questions: Mapping[str, int], max_em_drop: float, delta: float
) -> list[str]:
    """Returns the names of as many segments as can be certified at an equal share of `delta`.

    Those with the most questions come first. The questions of each suffice at its share if none of
    them has a loss.
    """
    names = sorted(num_questions, key=lambda name: -num_questions[name])
    fits = [
        k
        for k, name in enumerate(names, start=1)
        if num_questions[name] >= fewest_questions(max_em_drop, delta / k)
    ]
    return names[: max(fits, default=0)]


def fewest_questions(max_em_drop: float, delta: float) -> int:
    """Returns the fewest questions Q that can suffice, which they do if none of them has a loss.

    That is the least Q with (1 - max_em_drop)^Q <= delta.
    """
    return math.ceil(math.log(delta) / math.log1p(-max_em_drop))


def questions_needed(measured: Measured, max_em_drop: float, delta: float) -> int | None:
    """Estimates how many questions certify some saving in 4 of 5 draws, if losses stay as observed.

    The estimate is the normal approximation with the spread that `p_values` ends up with. It is
    for planning only.

    Returns:
        The number of questions; None if no number would do.
    """
    mean, square = measured.losses.mean(axis=0), (measured.losses**2).mean(axis=0)
    gap = max_em_drop - mean
    variance = np.maximum(square + gap - max_em_drop**2, 0)
    quantiles = NormalDist().inv_cdf(1 - delta) + NormalDist().inv_cdf(_POWER)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(gap > 0, quantiles**2 * variance / gap**2, np.inf)
    # The stricter prices come first and must be certified too.
    some = float(np.maximum.accumulate(needed)[measured.savings > 0].min(initial=np.inf))
    if some == math.inf:
        return None
    return max(math.ceil(some), fewest_questions(max_em_drop, delta))


def smallest_drop(measured: Measured, asked: float, delta: float) -> float | None:
    """Finds about the smallest drop with which some saving would be certified, for planning only.

    Args:
        measured: What K prices lose and save on Q questions.
        asked: A drop that was asked for; what is returned is above it exactly if nothing is
            certified with it.
        delta: The probability that a certificate is wrong, at most.

    Returns:
        The drop, which is `asked` or a multiple of a hundredth of a point; None if there is none
        below 1.
    """
    enough = certify(measured, asked, delta) is not None
    at = asked * _STEPS
    steps = range(1, math.ceil(at)) if enough else range(math.floor(at) + 1, _STEPS)
    found = bisect.bisect_left(
        steps, True, key=lambda step: certify(measured, step / _STEPS, delta) is not None
    )
    if found < len(steps):
        return steps[found] / _STEPS
    return asked if enough else None
