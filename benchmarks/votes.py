"""Several thoughts of one question, halted jointly, beside plain self-consistency.

Self-consistency lets several thoughts of a question run to their ends and takes the answer that
most of them give. Two other rules spend less. Thoughts may run in turn, each halted alone, on
evidence or by a head, until those to come cannot outvote the answer: that is `num_thoughts` of
`generate_all`. Or what all
thoughts have answered so far is one vote: each gives its newest answer the log-odds that it is
right, and all of them are halted where the best answer is ahead of the next one by a threshold. If
thoughts are independent given the right answer (naive Bayes), that is the log-odds of the best
answer against the next. How probable it is that an answer is right follows from the rule
"evidence", logit(confidence) + 1.5 ln(times in a row), by isotonic regression on other questions: a
sure thought is often wrong all the same, and two are not. There, thoughts run side by side, or in
turn.

Numbers are chosen, and what is learned is learned, on other questions than those that are judged:
on train and dev where there are test questions, which then are judged alone, else out of fold.

All is net of every token: those of all thoughts until then, and of all looks at answers. Answers
are equal if both are right by the task's scorer, else if they are spelt alike.

Shapes: Q questions (of one LM), P points of all traces, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from benchmarks.synthetic import final_answers
from benchmarks.timing import BenchResult
from evaluation.intervals import Resamples, interval
from evaluation.protocol import folds
from haltwise import InputError
from haltwise.policy.votes import elected, is_settled
from policies.baselines import Evidence
from policies.head import judging_heads
from runs import Run
from traces import TraceFiles, Traces, check_recorded

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PART = "votes"
# No answer is held to be more or less probable.
_BOUNDS = (0.02, 0.995)
# Evidence, by its quantiles, on which a thought is halted alone.
_SURE = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
# Every so many-th price of a head is one that thoughts are halted at alone.
_EVERY = 4


@dataclass(frozen=True)
class VotesConfig:
    """Several thoughts of one question, halted jointly."""

    num_thoughts: int = 3
    """The thoughts of a question."""
    num_thresholds: int = 300
    """The thresholds that are tried."""
    drops: tuple[float, ...] = (1e-9, 0.002, 0.005)
    """The exact match that may be lost on the other questions, each in turn."""
    run: Path | None = None
    """A run whose heads halt thoughts alone, those of its folds the questions that it learned from.
    Default: they are halted on evidence."""


@dataclass(frozen=True)
class Said:
    """What a thought has answered at one place; an empty answer could not be read."""

    tokens: int
    """Of the thought until then."""
    spent: int
    """The same with all looks at its answers."""
    answer: str
    weight: float
    """Of that answer in the vote: the log-odds that it is right, 0 at least."""
    right: bool


@dataclass(frozen=True, eq=False)
class Voting:
    """How the vote of one question goes, at every place where something is said."""

    lead: Float
    """The weight of the best answer, less that of the next one."""
    right: Bools
    """Whether the best answer is right."""
    cost: Float
    """Tokens of all thoughts until then, looks included."""

    def at(self, thresholds: Float) -> tuple[Bools, Float]:
        """Returns whether the answer is right, and what it costs (T,), halted at thresholds (T,).

        Where no lead is above one, all thoughts run to their ends.
        """
        place = np.searchsorted(np.maximum.accumulate(self.lead), thresholds, side="right")
        place = np.minimum(place, len(self.lead) - 1)
        return self.right[place], self.cost[place]


@dataclass(frozen=True, eq=False)
class Calibration:
    """How probable it is that an answer is right, by the evidence for it.

    Args:
        at_points: Of forced answers.
        at_ends: Of the answers that thoughts end with, by the evidence at their last points.
    """

    at_points: IsotonicRegression
    at_ends: IsotonicRegression

    @classmethod
    def fit(cls, traces: Traces, evidence: Float, rows: Sequence[int]) -> Calibration:
        """Learns from some traces.

        Args:
            traces: N traces with P points.
            evidence: (P,) for the answer at each point; minus infinity where there is none.
            rows: The traces to learn from.
        """
        at_end, asked = _evidence_at_end(traces, evidence), np.isin(np.arange(len(traces)), rows)
        known = asked[traces.trace_of_point] & np.isfinite(evidence)
        return cls(
            _isotonic(evidence[known], traces.correct[known]),
            _isotonic(at_end[asked], traces.final_correct[asked]),
        )

    def weights(self, traces: Traces, evidence: Float) -> tuple[Float, Float]:
        """Returns the weights of the answers at all points (P,), and of those at the ends (N,)."""
        known = np.isfinite(evidence)
        at_points = np.zeros(len(evidence))
        at_points[known] = _log_odds(self.at_points.predict(evidence[known]))
        return at_points, _log_odds(self.at_ends.predict(_evidence_at_end(traces, evidence)))


def _isotonic(evidence: Float, right: Bools) -> IsotonicRegression:
    low, high = _BOUNDS
    return IsotonicRegression(y_min=low, y_max=high, out_of_bounds="clip").fit(evidence, right)


def _evidence_at_end(traces: Traces, evidence: Float) -> Float:
    """Returns the evidence (N,) at each last point, 0 where the trace ends with another answer."""
    some = np.diff(traces.offsets) > 0
    last = np.where(some, traces.offsets[1:] - 1, 0)
    alike = traces.answer[last] == traces.full_answer
    same = some & (alike | traces.correct[last] & traces.final_correct)
    return np.where(same & np.isfinite(evidence[last]), evidence[last], 0.0)


def _log_odds(probability: Float) -> Float:
    """Returns log-odds, 0 at least."""
    log_odds: Float = np.maximum(np.log(probability) - np.log1p(-probability), 0.0)
    return log_odds


def said_by(
    traces: Traces, row: int, at_points: Float, at_ends: Float, halts: Bools | None = None
) -> list[Said]:
    """Returns what one thought says, up to where it is halted alone, or its own end.

    Args:
        traces: N traces with P points.
        row: The thought's trace.
        at_points: (P,) the weight of the answer at each point.
        at_ends: (N,) the weight of the answer that each trace ends with.
        halts: (P,) whether the thought would be halted alone at each point; by default nowhere.
    """
    said, spent = [], 0
    for p in range(traces.offsets[row], traces.offsets[row + 1]):
        spent += int(traces.probe_tokens[p])
        position, right = int(traces.position[p]), bool(traces.correct[p])
        answer = _name(traces.answer[p], right)
        said.append(Said(position, position + spent, answer, float(at_points[p]), right))
        if halts is not None and halts[p]:
            return said
    end, right = int(traces.num_tokens[row]), bool(traces.final_correct[row])
    answer = _name(traces.full_answer[row], right)
    return [*said, Said(end, end + spent, answer, float(at_ends[row]), right)]


def _name(answer: str, right: bool) -> str:
    """Returns what is the same for equal answers."""
    return "right" if right else f"wrong {answer}" if answer else ""


def voting(thoughts: Sequence[Sequence[Said]], in_turn: bool) -> Voting:
    """Returns how the vote of one question goes.

    Args:
        thoughts: What each of them says, in order.
        in_turn: Whether each begins where the one before has ended; else all run side by side.
    """
    events = [(k, one) for k, said in enumerate(thoughts) for one in said]
    if not in_turn:
        events.sort(key=lambda event: event[1].tokens)
    newest: dict[int, Said] = {}
    leads, rights, costs = [], [], []
    for k, one in events:
        newest[k] = one
        votes: dict[str, float] = {}
        for each in newest.values():
            if each.answer:
                votes[each.answer] = votes.get(each.answer, 0.0) + each.weight
        ranked = sorted(votes.values(), reverse=True)
        best = max(votes, key=votes.__getitem__, default="")
        by_best = [each.right for each in newest.values() if each.answer == best]
        leads.append(ranked[0] - (ranked[1] if len(ranked) > 1 else 0.0) if ranked else -np.inf)
        rights.append(any(by_best))
        costs.append(_cost(thoughts, newest, None if in_turn else one.tokens))
    return Voting(np.array(leads), np.array(rights), np.array(costs, dtype=np.float64))


def _cost(thoughts: Sequence[Sequence[Said]], newest: dict[int, Said], reached: int | None) -> int:
    """Returns the tokens of all thoughts, and of all looks at their answers, until some place.

    Args:
        thoughts: What each of them says.
        newest: By thought, what it said last.
        reached: The tokens that each has come to, if it has not ended; None if they run in turn.
    """
    total = sum(one.spent for one in newest.values())
    if reached is not None:
        for k, said in enumerate(thoughts):
            begun = newest[k].tokens if k in newest else 0
            total += max(min(reached, said[-1].tokens) - begun, 0)
    return total


def self_consistency(traces: Traces, rows: Sequence[int]) -> tuple[bool, int]:
    """Returns whether the answer that most thoughts end with is right, and what they all cost.

    Of several such answers it is that of the earliest thought.
    """
    answers = [_name(traces.full_answer[row], bool(traces.final_correct[row])) for row in rows]
    right = bool(traces.final_correct[rows[elected(answers)]])
    return right, int(traces.num_tokens[list(rows)].sum())


def until_settled(thoughts: Sequence[Sequence[Said]]) -> tuple[bool, int]:
    """Returns whether the answer of most thoughts is right, and what they cost, run in turn.

    No thought begins that could not change the answer any more.

    Args:
        thoughts: What each of them says; their last answers count.
    """
    last: list[Said] = []
    for said in thoughts:
        last.append(said[-1])
        answers = [one.answer for one in last]
        if is_settled(answers, len(thoughts)):
            break
    return last[elected(answers)].right, sum(one.spent for one in last)


def measure(traces: Traces, path: Path | None, config: VotesConfig) -> list[BenchResult]:
    """Measures thoughts that are halted jointly against plain self-consistency of as many.

    Args:
        traces: The traces.
        path: The file or folder that they were read from; None if they are synthetic.
        config: The settings.

    Raises:
        InputError: If no question has so many traces of one LM, no confidence is known, or the
            run does not fit the traces.
    """
    traces = replace(traces, full_answer=_final_answers(traces, path))
    if config.run is not None:
        traces = _fresh(traces, Run(config.run))
    evidence = Evidence().signal(traces)
    groups = _groups(traces, config.num_thoughts)
    if evidence is None or not groups:
        raise InputError(
            f"expected traces with confidences, and {config.num_thoughts} of each question and LM"
        )
    plain = np.array([self_consistency(traces, rows) for rows in groups], dtype=np.float64)
    alone = np.array(
        [[traces.final_correct[r].mean(), traces.num_tokens[r].mean()] for r in groups]
    )
    asked = np.array([traces.question_id[rows[0]] for rows in groups])
    judged = np.logical_or.reduce([rows for _, rows in _parts(traces, groups)])
    told = partial(_row, judged, asked, plain)
    results = told("one thought to its end", alone)
    agree = _until_settled(traces, groups, _alone(traces, evidence, path, config.run))
    results += told("in turn to their ends, until settled", agree[:, :, -1])
    chosen = np.zeros((len(config.drops), *plain.shape))
    for learned, rows in _parts(traces, groups):
        chosen[:, rows] = _chosen(agree, plain, learned, config)[:, rows]
    joint = {"in turn, each halted alone, until settled": chosen}
    for in_turn, name in ((False, "side by side"), (True, "in turn")):
        what = f"{name}, halted by their lead"
        joint[what] = _by_lead(traces, evidence, groups, plain, config, in_turn)
    for name, of_drops in joint.items():
        for drop, found in zip(config.drops, of_drops, strict=True):
            what = f"{name}, {100 * drop:.1f} points may be lost"
            results += told(what, found)
    return results


def _fresh(traces: Traces, run: Run) -> Traces:
    """Returns the traces of questions that a run's heads, or those of its folds, never saw."""
    learned = run.learned()
    known = learned.among(traces.question_id)
    return traces if run.kept_back(learned) else traces.select(~known)


def _parts(traces: Traces, groups: Sequence[Sequence[int]]) -> list[tuple[Bools, Bools]]:
    """Returns which questions (Q,) are learned and chosen on, and which are judged then."""
    first = [rows[0] for rows in groups]
    is_test = traces.split[first] == "test"
    if is_test.any() and not is_test.all():
        return [(~is_test, is_test)]
    fold = folds(traces.question_id[first])
    return [(fold != k, fold == k) for k in np.unique(fold)]


def _final_answers(traces: Traces, path: Path | None) -> NDArray[np.object_]:
    """Returns what all traces end with (N,): who is labelled keeps only whether it is right."""
    if path is None:
        return final_answers(traces)
    words = TraceFiles.open(path).words(traces.trace_id.tolist())
    return np.array([words[name].final_answer for name in traces.trace_id.tolist()], dtype=object)


def _groups(traces: Traces, num: int) -> list[list[int]]:
    """Returns the rows of each question and LM that has so many traces."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(traces.model, traces.question_id, strict=True)):
        rows.setdefault((str(key[0]), str(key[1])), []).append(row)
    return [found[:num] for found in rows.values() if len(found) >= num]


def _alone(traces: Traces, evidence: Float, path: Path | None, run: Path | None) -> list[Bools]:
    """Returns the ways (P,) to halt thoughts alone that are tried, never last.

    Raises:
        InputError: If the traces were recorded under other conditions than the run's.
    """
    never = np.zeros(traces.num_points, dtype=bool)
    if run is None:
        levels = np.quantile(evidence[np.isfinite(evidence)], _SURE)
        return [*(evidence >= level for level in levels), never]
    opened = Run(run)
    learned = opened.learned()
    head = judging_heads(opened.head(), opened.kept_back(learned), learned.folds)[0]
    check_recorded(head.head.config, traces.recorder, path or "synthetic traces")
    signal = head.signal(traces)
    return [*(head.halts(signal, price) for price in head.grid(signal)[::-_EVERY]), never]


def _until_settled(
    traces: Traces, groups: Sequence[Sequence[int]], alone: Sequence[Bools]
) -> Float:
    """Returns what thoughts in turn come to (Q, 2, T), halted alone in each of T ways.

    Where nothing can be halted, nobody looks at answers.
    """
    ones, ends = np.ones(traces.num_points), np.ones(len(traces))
    found = []
    for halts in alone:
        said = {row: said_by(traces, row, ones, ends, halts) for rows in groups for row in rows}
        if not halts.any():
            said = {row: [replace(of[-1], spent=of[-1].tokens)] for row, of in said.items()}
        found.append([until_settled([said[row] for row in rows]) for rows in groups])
    return np.array(found, dtype=np.float64).transpose(1, 2, 0)


def _chosen(tried: Float, plain: Float, learned: Bools, config: VotesConfig) -> Float:
    """Returns what the cheapest of what is tried comes to (drops, Q, 2).

    Args:
        tried: (Q, 2, T) exact match and tokens of T ways, of which the last loses nothing.
        plain: (Q, 2) those of self-consistency.
        learned: (Q,) the questions to choose on.
        config: What may be lost there.
    """
    em, cost = tried[learned].mean(axis=0)
    least = [plain[learned, 0].mean() - drop for drop in config.drops]
    kept = [np.flatnonzero(em >= bar) for bar in least]
    best = [of[np.argmin(cost[of])] if len(of) else len(em) - 1 for of in kept]
    return tried[:, :, best].transpose(2, 0, 1)


def _by_lead(
    traces: Traces,
    evidence: Float,
    groups: Sequence[Sequence[int]],
    plain: Float,
    config: VotesConfig,
    in_turn: bool,
) -> Float:
    """Returns what halting by the lead comes to (drops, Q, 2)."""
    found = np.zeros((len(config.drops), *plain.shape))
    for learned, judged in _parts(traces, groups):
        known = [row for rows, own in zip(groups, learned, strict=True) if own for row in rows]
        weights = Calibration.fit(traces, evidence, known).weights(traces, evidence)
        said = [[said_by(traces, row, *weights) for row in rows] for rows in groups]
        votes = [voting(thoughts, in_turn) for thoughts in said]
        leads = np.concatenate([one.lead[np.isfinite(one.lead)] for one in votes])
        grid = np.unique(np.quantile(leads, np.linspace(0, 1, config.num_thresholds)))
        joint = np.array([one.at(grid) for one in votes])  # (Q, 2, T)
        found[:, judged] = _chosen(joint, plain, learned, config)[:, judged]
    return found


def _row(
    judged: Bools, asked: NDArray[np.str_], plain: Float, name: str, found: Float
) -> list[BenchResult]:
    """Returns the EM change and the saving against self-consistency, with their intervals.

    Args:
        judged: (Q,) the questions that count.
        asked: (Q,) their ids.
        plain: (Q, 2) exact match and tokens of self-consistency.
        name: What is told of.
        found: (Q, 2) its exact match and tokens.
    """
    asked, plain, found = asked[judged], plain[judged], found[judged]
    resamples = Resamples.draw(asked, 2_000)
    ones, gained = np.ones(len(plain)), found[:, 0] - plain[:, 0]
    num, change, cost, full = resamples.sums([ones, gained, found[:, 1], plain[:, 1]])
    change_of, saving_of = interval(100 * change / num), interval(100 * (1 - cost / full))
    mean_change = 100 * float(gained.mean())
    mean_saving = 100 * float(1 - found[:, 1].sum() / plain[:, 1].sum())
    return [
        BenchResult(
            _PART, f"{name}: EM change", "points", (change_of[0], mean_change, change_of[1])
        ),
        BenchResult(_PART, f"{name}: saving", "%", (saving_of[0], mean_saving, saving_of[1])),
    ]
