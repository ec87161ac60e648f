"""One trace in plain words: what a policy saw at each point, and what its halting came to."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from envs.reward import halt_costs, reward
from evaluation.outcome import halt_outcome, never_outcome
from haltwise import Explanation, HaltHead, explain
from haltwise.policy.features import features_of
from haltwise.policy.signals import Float
from traces import Traces, Words

_WIDTH = 110
_ANSWER_WIDTH = 12
_NUM_MOVERS = 3
# Contributions to the log-odds below this are not told: they move P(halt) by 2.5 points at most.
_SMALL = 0.1

_LEGEND = """\
One line a decision point, up to the halt:
  tokens    thought so far
  answer    if it is halted there, and whether that answer is right
  sure %    the LM's confidence in that answer
  halt %    how likely the policy is to halt; it does from {threshold:.0f}
  worth     exact match that the policy expects of 1,000 more tokens; below the price it halts
            (< and >: less or more than any price that it was trained for)
  moved by  what spoke for halting (+) and for going on (-) since the line before, the strongest
            first; on the first line against an average point

 no   tokens  answer        is     sure %  halt %   worth  moved by"""


@dataclass(frozen=True, eq=False)
class _Path:
    """A head's decisions on one trace."""

    trace: Traces
    """The trace, and no other one."""
    head: HaltHead
    """The head that decides."""
    price: float
    """The price at which it decides, in exact match per 1,000 tokens."""
    features: Float
    """(P, F) what the head is fed at each point."""
    halts: NDArray[np.bool_]
    """(P,) whether the head would halt at each point."""
    words: Words | None
    """What was recorded of the trace for a person to read."""

    @property
    def num_seen(self) -> int:
        """How many points the policy comes to."""
        return int(self.halts.argmax()) + 1 if self.halts.any() else self.trace.num_points

    @property
    def average(self) -> Float:
        """(F,) the features of an average point of the training traces."""
        return np.array(self.head.config.observing.mean, dtype=np.float32)

    def before(self, i: int) -> Float:
        """Returns the features (F,) that the i-th point is compared with.

        They are those of the last point before that is known, or else of an average point.
        """
        known = np.flatnonzero(np.isfinite(self.features[:i]).all(axis=1))
        return self.features[known[-1]] if len(known) else self.average


def decision_path(trace: Traces, head: HaltHead, price: float, words: Words | None = None) -> str:
    """Tells what a head does on one trace, in lines of about 110 characters.

    Args:
        trace: Exactly one trace.
        head: The head that decides.
        price: The price at which it decides, in exact match per 1,000 tokens, above 0.
        words: What was recorded of the trace for a person to read, if anything.

    Raises:
        InputError: If the trace lacks a signal that the head needs.
    """
    features = observed_features(trace, head.config.observing, head.config.halting)
    path = _Path(trace, head, price, features, head.halts(features, price), words)
    blocks = [_heading(path), _points(path), _after(path), _verdict(path)]
    if not trace.num_points:
        blocks[1:] = [["It has no decision point: there is nothing to decide."]]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _heading(path: _Path) -> list[str]:
    """Says which trace it is, and what it would have come to without a policy."""
    trace = path.trace
    segment = f", {trace.segment[0]}" if trace.segment[0] not in ("", trace.task[0]) else ""
    end = "ends by itself" if trace.finished[0] else "is cut off"
    return [
        f"Trace {trace.trace_id[0]}",
        f"Question {trace.question_id[0]} ({trace.task[0]}{segment}), answered by {trace.model[0]}",
        f"Never halted, the LM {end} after {trace.num_tokens[0]:,} tokens with a "
        f"{_right(trace.final_correct[0]) if trace.labelled[0] else 'final'} answer.",
        *_in_words(path),
        *textwrap.wrap(trace.target, _WIDTH),
        f"The price is {path.price:.3g} exact match per 1,000 tokens: one right answer is worth "
        f"{1000 / path.price:,.0f} tokens.",
    ]


def _in_words(path: _Path) -> list[str]:
    """Returns the question, the answers, and where the thought was halted, as far as recorded."""
    words, trace = path.words, path.trace
    if words is None:
        return []
    lines = [f"It asks: {' '.join(words.question.split())}"] if words.question else []
    expected = f"Expected is {words.gold!r}, and the" if words.gold else "The"
    lines.append(f"{expected} LM ends with {words.final_answer!r}.")
    if words.text and path.halts.any():
        share = trace.position[path.num_seen - 1] / trace.num_tokens[0]
        lines.append(f"It is halted about here: ... {words.thought_before(float(share))}")
    return [line for text in lines for line in textwrap.wrap(text, _WIDTH)]


def _points(path: _Path) -> list[str]:
    """Returns a line for each point that the policy comes to, below what the columns mean."""
    lines = [_LEGEND.format(threshold=100 * path.head.config.threshold)]
    for i in range(path.num_seen):
        if not np.isfinite(path.features[i]).all():
            lines.append(f"{_seen(path, i)}{'?':>6}  {'?':>6}  a signal is unknown: it goes on")
            continue
        explanation = explain(path.head, path.features[i], path.price, path.before(i))
        movers = _movers(path, explanation, path.features[i] > path.before(i))
        lines.append(_fill(_columns(path, i, explanation), movers))
    return lines


def _seen(path: _Path, i: int) -> str:
    """Returns the line of the i-th point up to the LM's confidence in its answer."""
    trace = path.trace
    answer = " ".join(trace.answer[i].split()) or "(none)"
    if len(answer) > _ANSWER_WIDTH:
        answer = answer[: _ANSWER_WIDTH - 2] + ".."
    confidence = trace.confidence[i]
    sure = "?" if np.isnan(confidence) else f"{100 * confidence:.2f}"
    return (
        f"{i + 1:3}  {trace.position[i]:7,}  {answer:{_ANSWER_WIDTH}}  "
        f"{_right(trace.correct[i])}  {sure:>6}  "
    )


def _columns(path: _Path, i: int, explanation: Explanation) -> str:
    """Returns the line of the i-th point up to the words about what moved the policy."""
    lowest, highest = path.head.config.observing.price_range
    worth = f"{explanation.indifference_price:.3g}"
    if explanation.indifference_price == 0:
        worth = f"<{lowest:.2g}"
    elif np.isinf(explanation.indifference_price):
        worth = f">{highest:.2g}"
    return f"{_seen(path, i)}{100 * explanation.prob_halt:6.1f}  {worth:>6}  "


def _movers(path: _Path, explanation: Explanation, higher: NDArray[np.bool_]) -> list[str]:
    """Says in words what moved the policy most.

    Args:
        path: The head's decisions.
        explanation: The decision at one point, against a reference.
        higher: (F,) which features are above those of the reference.
    """
    moved: dict[str, float] = {}
    for i, feature in enumerate(features_of(path.head.config.observing.groups)):
        phrase = feature.higher if higher[i] else feature.lower
        moved[phrase] = moved.get(phrase, 0.0) + float(explanation.contributions[i])
    strongest = sorted(moved, key=lambda phrase: -abs(moved[phrase]))[:_NUM_MOVERS]
    return [
        f"{'+' if moved[phrase] > 0 else '-'} {phrase}"
        for phrase in strongest
        if abs(moved[phrase]) >= _SMALL
    ]


def _fill(start: str, movers: list[str]) -> str:
    """Returns a line that ends with as many movers as fit; one always does."""
    while len(start + ", ".join(movers)) > _WIDTH:
        movers = movers[:-1]
    return start + (", ".join(movers) or "little")


def _after(path: _Path) -> list[str]:
    """Says where the trace is halted and why, and what other points would have come to."""
    num_points, num_seen = path.trace.num_points, path.num_seen
    if not path.halts.any():
        return ["It is not halted.", _passed(path, "Points", range(num_points))]
    at = path.features[num_seen - 1]
    movers = _movers(path, explain(path.head, at, path.price), at > path.average)
    return [
        f"It is halted at point {num_seen} of {num_points} with a "
        f"{_right(path.trace.correct[num_seen - 1])} answer.",
        _fill("What weighed most, against an average point: ", movers),
        _passed(path, "Points before", range(num_seen - 1)),
        _passed(path, "Points after", range(num_seen, num_points)),
    ]


def _passed(path: _Path, name: str, points: range) -> str:
    """Counts the right answers at some points where the policy did not halt.

    It also says what halting at the first right one would have cost.
    """
    right = [i for i in points if path.trace.correct[i]]
    line = f"{name}: {len(points)}, with a right answer: {len(right)}"
    if right:
        costs = halt_costs(path.trace, path.head.config.halting.probing)
        line += f"; the first, point {right[0] + 1}, would have cost {costs[right[0]]:,} tokens"
    return line + "."


def _verdict(path: _Path) -> list[str]:
    """Compares what the policy came to with what no policy would have come to."""
    trace, probing = path.trace, path.head.config.halting.probing
    outcome, never = halt_outcome(trace, path.halts, probing), never_outcome(trace)
    cost, num_tokens = int(outcome.cost[0]), int(trace.num_tokens[0])
    thought = int(trace.position[path.num_seen - 1]) if outcome.halted[0] else num_tokens
    returns = [float(reward(o.em, o.cost, path.price)[0]) for o in (outcome, never)]
    change = f"{abs(1 - cost / num_tokens):.1%} {'saved' if cost <= num_tokens else 'more'}"
    looks = "forced answers" if probing == "always" else "the answer"
    spent = f", with {cost - thought:,} spent on {looks}" * (cost > thought)
    return [
        f"Tokens:       {cost:7,} instead of {num_tokens:,}: {change}{spent}",
        f"Exact match:  {int(outcome.em[0]):7} instead of {int(never.em[0])}",
        f"Return:       {returns[0]:7.3f} instead of {returns[1]:.3f} "
        "(exact match - price * tokens / 1,000)",
    ]


def _right(is_right: bool) -> str:
    """Returns the word for a right or a wrong answer."""
    return "right" if is_right else "wrong"
