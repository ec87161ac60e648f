"""What a policy does inside a thought: where it halts, how far its probabilities hold, its errors.

The policy may be several trainings, S of them: a report of all is of their decisions thrown
together, so that its shares are means over trainings. N traces, P points, F features. What comes
back goes into JSON as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from envs.reward import halt_costs, never_costs, reward
from evaluation.outcome import first_halts
from haltwise import HaltHead, HeadConfig, explain
from haltwise.policy.halting import Probing
from haltwise.policy.head import prob_of
from haltwise.policy.signals import Float
from traces import Traces

Bools = NDArray[np.bool_]
Report = dict[str, Any]

_NUM_PLACES = 20
_NUM_BINS = 10
_NUM_DRIVERS = 4


def behaviour(
    traces: Traces,
    log_odds: Sequence[Float],
    head_of: Callable[[str], HaltHead],
    price: float,
    config: HeadConfig,
) -> Report:
    """All of this module about a policy at one price: price, where, reliability and cases.

    Args:
        traces: N traces.
        log_odds: S times (P,) log-odds of halting at that price.
        head_of: See `cases`.
        price: In exact match per 1,000 tokens.
        config: The heads' threshold and conditions.
    """
    probs = [prob_of(each) for each in log_odds]
    threshold, probing = config.threshold, config.halting.probing
    return {
        "price": price,
        "where": where_halted(traces, [prob >= threshold for prob in probs]),
        "reliability": reliability(traces, probs, probing, price, threshold),
        "cases": cases(traces, log_odds, head_of, price, threshold),
    }


def where_halted(traces: Traces, halts: Sequence[Bools]) -> Report:
    """How far into their thoughts traces are halted, and how often at a right answer.

    Args:
        traces: N traces.
        halts: S times (P,) whether the policy would halt at each point.

    Returns:
        edges: 21 of position / num_tokens; right, wrong: shares of all traces halted in each of
        the 20 bins; never: share of those never halted; median_share: of position / num_tokens,
        median_position: in tokens, both None if nothing is halted.
    """
    first = np.concatenate([first_halts(traces, each) for each in halts])
    at = first[first >= 0]
    place = traces.position[at] / traces.num_tokens[traces.trace_of_point[at]]
    edges = np.linspace(0, 1, _NUM_PLACES + 1)
    right, wrong = (
        np.histogram(place[traces.correct[at] == is_right], edges)[0] / len(first)
        for is_right in (True, False)
    )
    return {
        "edges": edges.tolist(),
        "right": right.tolist(),
        "wrong": wrong.tolist(),
        "never": float((first < 0).mean()),
        "median_share": float(np.median(place)) if len(at) else None,
        "median_position": float(np.median(traces.position[at])) if len(at) else None,
    }


def reliability(
    traces: Traces,
    prob_halt: Sequence[Float],
    probing: Probing,
    price: float,
    threshold: float,
) -> Report:
    """What halting is worth by probability of halting, at the points that the policy reaches.

    Halting is the better choice where it returns at least as much as going on with the policy's
    own later decisions. A trace holds every outcome, so that this is known and not estimated.
    A policy that maximises its return halts where halting gains in the mean. That can differ from
    where halting is mostly better: a few tokens are often saved, and EM is lost seldom but dearly.

    Args:
        traces: N traces.
        prob_halt: S times (P,) probabilities of halting.
        probing: See `haltwise.Halting`.
        price: Of those probabilities, in exact match per 1,000 tokens.
        threshold: The policy halts at this probability.

    Returns:
        bins: 10 of equal width, each with low, high, num (points), mean_prob, better (share of
        points where halting is), correct (share of right forced answers) and gain (mean return of
        halting less that of going on), None where num is 0;
        error: the expected calibration error, the mean of |mean_prob - better| over points (Guo
        et al., "On Calibration of Modern Neural Networks", 2017, equation 3), None without points.
    """
    columns = []
    for prob in prob_halt:
        halts = prob >= threshold
        gain = _gains(traces, halts, probing, price)
        reached = _reached(traces, halts)
        columns.append(np.stack([prob, gain >= 0, traces.correct, gain])[:, reached])
    seen = np.concatenate(columns, axis=1)
    which = np.minimum((seen[0] * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    bins = [_bin(k, seen[:, which == k]) for k in range(_NUM_BINS)]
    gaps = [row["num"] * abs(row["mean_prob"] - row["better"]) for row in bins if row["num"]]
    return {"bins": bins, "error": sum(gaps) / len(which) if len(which) else None}


def _bin(k: int, seen: NDArray[np.float64]) -> Report:
    """The k-th bin of `reliability`: what was seen (4, num) are the columns of its means."""
    num = seen.shape[1]
    means = seen.mean(axis=1).tolist() if num else [None] * len(seen)
    edges = {"low": k / _NUM_BINS, "high": (k + 1) / _NUM_BINS, "num": num}
    return edges | dict(zip(("mean_prob", "better", "correct", "gain"), means, strict=True))


def cases(
    traces: Traces,
    log_odds: Sequence[Float],
    head_of: Callable[[str], HaltHead],
    price: float,
    threshold: float,
    num: int = 10,
) -> list[Report]:
    """The worst errors: traces halted at a wrong answer that would have ended with a right one.

    They are errors of the first training, whose heads explain them. First come those that the
    most trainings make, then those that the first training was surest of.

    Args:
        traces: N traces.
        log_odds: S times (P,) log-odds of halting.
        head_of: By question id, the head that judged it in the first training.
        price: Of those log-odds, in exact match per 1,000 tokens.
        threshold: The policy halts at this probability.
        num: The most to return.

    Returns:
        Of each case: trace_id, question_id, task, segment, model; position, num_tokens, answer,
        prob_halt; trainings: share of the trainings that make this error; right_again: position
        of the first later point with a right answer, None if only the LM's own end is right;
        drivers: the 4 largest contributions against a mean point, see `haltwise.explain`;
        indifference_price: None if infinite.
    """
    firsts = [first_halts(traces, prob_of(each) >= threshold) for each in log_odds]
    lost = np.array([_lost(traces, first) for first in firsts])
    share = lost.mean(axis=0)
    candidates = np.flatnonzero(lost[0])
    surest = log_odds[0][firsts[0][candidates]]
    worst = candidates[np.lexsort([-surest, -share[candidates]])][:num]
    return [
        _case(traces, int(firsts[0][n]), head_of(str(traces.question_id[n])), price)
        | {"trainings": float(share[n])}
        for n in worst
    ]


def _reached(traces: Traces, halts: Bools) -> Bools:
    """Which points (P,) the policy comes to; the one that it halts at is the last."""
    first = first_halts(traces, halts)
    last = np.where(first >= 0, first, traces.num_points)[traces.trace_of_point]
    reached: Bools = np.arange(traces.num_points) <= last
    return reached


def _gains(traces: Traces, halts: Bools, probing: Probing, price: float) -> NDArray[np.float64]:
    """Return (P,) of halting at each point, less that of going on to the policy's next halt."""
    now = reward(traces.correct, halt_costs(traces, probing), price)
    never = reward(traces.final_correct, never_costs(traces, probing), price)
    points, halting = np.arange(traces.num_points), np.flatnonzero(halts)
    following = np.append(halting, -1)[np.searchsorted(halting, points, side="right")]
    halted = (following > points) & (following < traces.offsets[1:][traces.trace_of_point])
    gains: NDArray[np.float64] = now - np.where(
        halted, now[following], never[traces.trace_of_point]
    )
    return gains


def _lost(traces: Traces, first: NDArray[np.int64]) -> Bools:
    """Which traces (N,) are halted at a wrong answer and would have ended right."""
    lost: Bools = traces.final_correct & (first >= 0)
    lost[lost] = ~traces.correct[first[lost]]
    return lost


def _case(traces: Traces, point: int, head: HaltHead, price: float) -> Report:
    """What `cases` says of a trace that is halted at a point, all but the trainings."""
    n = int(traces.trace_of_point[point])
    index = point - int(traces.offsets[n])
    trace = traces.select(np.array([n]))
    features = observed_features(trace, head.config.observing, head.config.halting)[index]
    explanation = explain(head, features, price)
    value = dict(zip(explanation.names, features.tolist(), strict=True))
    later = trace.position[index + 1 :][trace.correct[index + 1 :]]
    names = ("trace_id", "question_id", "task", "segment", "model")
    indifference = explanation.indifference_price
    return {name: str(getattr(trace, name)[0]) for name in names} | {
        "position": int(trace.position[index]),
        "num_tokens": int(trace.num_tokens[0]),
        "answer": str(trace.answer[index]),
        "prob_halt": explanation.prob_halt,
        "right_again": int(later[0]) if len(later) else None,
        "drivers": [
            {"feature": name, "value": value[name], "contribution": contribution}
            for name, contribution in explanation.drivers(_NUM_DRIVERS)
        ],
        "indifference_price": indifference if np.isfinite(indifference) else None,
    }
