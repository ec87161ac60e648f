"""Operating points that keep what they promise on new questions too, as surely as they say.

The point that saves most among those that lost little enough on the questions at hand has been
lucky on them: on new questions of the same kind it loses more than it promised about as often as
not. An honest point is chosen by a test instead, which is passed only if the loss in the mean of
all such questions is small enough with a stated confidence, see `evaluation.certify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.certify import certify, fewest_questions, measure
from evaluation.intervals import Resamples, intervals
from evaluation.outcome import Outcome, outcome_row, saving
from evaluation.protocol import GATES, RATE_MATCHED
from evaluation.rows import HonestRow
from evaluation.wording import counted, gate_title, number, percent
from haltwise import InputError
from runs import Gates
from traces import Traces

#: The share of draws of the questions in which a point keeps its promise, at least.
CONFIDENCE = 0.9

# No number of questions shows that nothing at all is lost.
_GATES = [gate for gate in GATES if gate > 0]


def honest_point(traces: Traces, outcomes: Mapping[float, Outcome], gate: float) -> float | None:
    """Chooses the parameter with the largest saving that is sure to keep the gate.

    Parameters are tested from the strictest on, until the first that does not pass. The confidence
    is that of a certificate if the outcomes are the policy's own. Of a head they are those of the
    heads of folds, out of fold, which stand for the one that has learned from all questions: for
    that one it is an estimate.

    Args:
        traces: N traces to choose on, of questions that are drawn independently.
        outcomes: By parameter, the outcomes on those traces; parameters are in the order of their
            grid, so that the policy halts ever earlier, or ever later.
        gate: How much mean EM may be lost, in (0, 1).

    Returns:
        The parameter; None (never halt) if none that passes saves anything.
    """
    parameters = sorted(outcomes)
    savings = [saving(traces, outcomes[at]) for at in (parameters[0], parameters[-1])]
    if savings[0] > savings[1]:
        parameters.reverse()
    measured = measure(traces, [outcomes[at] for at in parameters], "net-em-loss")
    chosen = certify(measured, gate, 1 - CONFIDENCE)
    return None if chosen is None else parameters[chosen]


def honest_rows(
    traces: Traces, split: str, sweeps: Mapping[str, Mapping[float, Outcome] | None], never: Outcome
) -> list[HonestRow]:
    """Chooses the honest points of all policies but the control, at every gate above 0.

    Args:
        traces: N traces to choose on.
        split: The name of the split that they are of.
        sweeps: By policy, the outcomes over its grid; None for one that is not available.
        never: The outcome of never halting.
    """
    played = {name: swept for name, swept in sweeps.items() if swept and name != RATE_MATCHED}
    points = {
        gate: {name: honest_point(traces, swept, gate) for name, swept in played.items()}
        for gate in _GATES
    }
    at_points = {
        gate: {name: (at, never if at is None else played[name][at]) for name, at in chosen.items()}
        for gate, chosen in points.items()
    }
    return rows_at(traces, split, at_points)


def rows_at(
    traces: Traces,
    split: str,
    at_points: Mapping[float, Mapping[str, tuple[float | None, Outcome]]],
) -> list[HonestRow]:
    """Returns what policies come to at honest points, on the traces of any split.

    Args:
        traces: N traces.
        split: The name of the split that they are of.
        at_points: By gate and policy, the parameter, None for never halting, and its outcome.
    """
    resamples = Resamples.draw(traces.question_id)
    rows = []
    for gate, points in at_points.items():
        for name, (at, outcome) in points.items():
            found = resamples.of(traces, [outcome])
            ends = (intervals(found.em_delta)[0], intervals(found.saving)[0])
            row = outcome_row(traces, outcome, name, at, split, *ends)
            rows.append(HonestRow(**vars(row), gate=gate, confidence=CONFIDENCE))
    return rows


def chosen_points(rows: Iterable[Mapping[str, Any]]) -> Gates:
    """Returns, by gate and policy, the parameters of rows that were read from a run's results.

    Raises:
        InputError: If the rows lack something.
    """
    points: dict[float, dict[str, float | None]] = {}
    try:
        for row in rows:
            at = row["parameter"]
            of_gate = points.setdefault(float(row["gate"]), {})
            of_gate[str(row["policy"])] = None if at is None else float(at)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"honest points are not readable ({error!r})") from None
    return points


def price_words(
    own: float, segments: Iterable[str], rows: Sequence[HonestRow], traces: Traces, advice: str = ""
) -> str:
    """Says which price a head takes by itself, and which one to serve where a loss is bounded.

    Args:
        own: The head's own price; 0 never halts.
        segments: The names of those that have prices of their own.
        rows: The rows of `honest_rows`.
        traces: The traces that all of these prices were chosen on.
        advice: What follows from the verdict; empty where there is none.
    """
    num = len(np.unique(traces.question_id))
    promises = [_promise(row, own, num) for row in rows if row.policy == "head"]
    certify_it = (
        "That is an estimate and no certificate: these questions are those of the training, judged "
        "by heads that had not learned from them, and not by this one. calibrate.py --apply gives "
        "this one a price that is certified, on new questions: go by that one, be it "
        "higher, lower, or none at all, as such questions are few."
    )
    own_words = f"{_own_words(own, sorted(segments))} {advice}".rstrip()
    return "\n".join([own_words, *promises, certify_it])


def _own_words(own: float, segments: Sequence[str]) -> str:
    """Says what a request gets that names no price."""
    if not own:
        return "The head's own price is 0: of a request that names no price it halts nothing."
    by_segment = f"; one that names its segment ({', '.join(segments)}) takes that of the segment"
    return (
        f"The head's own price is {number(own)}, which lost nothing on the questions that it was "
        f"chosen on: a request that names no price takes it{by_segment if segments else ''}."
    )


def _promise(row: HonestRow, own: float, num_questions: int) -> str:
    """Says which price is estimated to keep one gate on new questions too.

    It says no confidence: that of the test is about other heads, see `honest_point`.
    """
    said = f"To lose {gate_title(row.gate)} on new questions of this kind too, by an estimate"
    if row.parameter is not None:
        price = number(row.parameter)
        told = (
            f"{said}: a price of {price}, which saves {percent(row.saving)} % on the "
            f"{num_questions:,} questions that it was chosen on"
        )
        if row.parameter == own:
            return f"{told}, and is the head's own."
        return (
            f"{told}, and is not the head's own: name it (price={price}, or haltwise serve --price "
            f"{price} for a head that servers take)."
        )
    fewest = fewest_questions(row.gate, 1 - row.confidence)
    if num_questions < fewest:
        return (
            f"{said}: no price; without a single loss that takes {fewest} questions, here are "
            f"{num_questions:,}."
        )
    return f"{said}: no price, of {counted(num_questions, 'question')}."
