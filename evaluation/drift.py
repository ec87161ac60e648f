"""What has changed between two stretches of served questions: they, the LM, or its scorer.

Of every question three things are known: what is known before the LM says anything (task, segment,
length of the prompt), what is seen of its thought, and what is said of its answers. Where

- what is asked has another distribution, or thoughts have one for some kinds of question alone, the
  questions have changed;
- thoughts have another one for questions of one kind, whatever the kind, the LM has, or its
  template, quantisation or settings;
- verdicts have another one at thoughts that look alike, while these are as they were, what scores
  the answers has.

Each is asked by the energy distance of the two stretches (Szekely and Rizzo, Energy statistics, J.
Stat. Plan. Inference 143, 2013), with permutations of who belongs to which stretch among questions
of one kind: its level holds exactly if nothing has changed, whatever the distributions are.

Shapes: N questions of both stretches, K columns, R permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from haltwise import HeadConfig
from traces import Traces
from traces.arrays import concatenate

Float = NDArray[np.float64]
Index = NDArray[np.int64]

#: How probable it is at most that something is told to have changed if nothing has.
LEVEL = 0.05
# What is asked: of questions, thoughts and verdicts.
_NUM_TESTS = 3
# Where some thoughts are known to differ: below this, those that differ least do so too. It is no
# level, as they are those that differ least.
_LEVEL_OF_LEAST = 0.1
_NUM_PERMUTATIONS = 999
# The newest questions of a stretch that are compared: distances are kept between any two.
_MOST = 1_000
# Classes of prompts, by their length.
_NUM_LENGTHS = 4
# Weight of the prior in a regression, in questions.
_RIDGE = 1.0

_WORDS = {
    "questions": "the questions",
    "LM": "the LM, its template or its settings",
    "scorer": "what says which answers are right",
}


@dataclass(frozen=True)
class Drift:
    """What has changed between two stretches of questions."""

    num_before: int
    """Questions of the stretch before."""
    num_now: int
    facts: tuple[str, ...] = ()
    """What is certainly other than before."""
    p_questions: float = 1.0
    """How probable it is that what is asked differs as much by chance alone."""
    p_thoughts: float | None = None
    """The same of thoughts of questions of one kind; None if no kind is in both stretches."""
    p_least: float | None = None
    """The same of the kinds whose thoughts differ least, half of the questions or more; None if it
    is not asked."""
    p_verdicts: float | None = None
    """The same of verdicts at thoughts that look alike; None if it is not asked."""

    @property
    def changed(self) -> tuple[str, ...]:
        """What has changed, of "questions", "LM" and "scorer"."""
        level = LEVEL / _NUM_TESTS
        thoughts = _below(self.p_thoughts, level)
        lm = bool(self.facts) or (thoughts and _below(self.p_least, _LEVEL_OF_LEAST))
        found = {
            "questions": self.p_questions <= level or (thoughts and not lm),
            "LM": lm,
            "scorer": _below(self.p_verdicts, level) and not lm,
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return asdict(self) | {"facts": list(self.facts), "changed": list(self.changed)}

    def __str__(self) -> str:
        """Says it to a person."""
        compared = f"{self.num_now} questions beside {self.num_before} of before"
        told = " and ".join(_WORDS[name] for name in self.changed) or "nothing that could be seen"
        lines = [f"What has changed: {told} ({compared}; level {LEVEL:.0%}).", *self.facts]
        if self.p_thoughts is None and self.num_before and self.num_now:
            lines.append("No kind of question is in both, so that nothing is known of the LM.")
        return "\n".join(lines)


def _below(p: float | None, level: float) -> bool:
    return p is not None and p <= level


def drift_between(
    before: Traces,
    now: Traces,
    config: HeadConfig,
    asked: Mapping[str, tuple[str, int | None]],
    seed: int = 0,
) -> Drift:
    """Tells what has changed between two stretches of traces.

    Of each question the last trace of a stretch counts, as traces of one question are alike.

    Args:
        before: The earlier stretch, in order.
        now: The later one.
        config: The head's, which says what is looked at in thoughts.
        asked: By trace id, the segment of a question and the tokens of its prompt, as they are
            known beside the traces. If one is missing, as old ones may be deleted, none counts.
        seed: The seed of the permutations.

    Raises:
        InputError: If the traces lack a signal that the head looks at.
    """
    before, now = _one_a_question(before), _one_a_question(now)
    counts = len(before), len(now)
    if not all(counts):
        return Drift(*counts)
    shown = before.signals.keys() & now.signals.keys()
    both = concatenate([_showing(traces, shown) for traces in (before, now)])
    is_now = np.arange(len(both)) >= len(before)
    test = _Test(is_now, np.random.default_rng(seed))
    kind, given = _asked(both, asked)
    p_questions = test.p(given, np.zeros(len(both), np.int64))
    facts = _facts(before, now)
    if not test.shared(kind).any():
        return Drift(*counts, facts, p_questions)
    seen = _normal(_seen(both, config))
    thoughts = _residuals(seen, given)
    p_thoughts = test.p(thoughts, kind)
    drift = Drift(*counts, facts, p_questions, p_thoughts)
    if p_thoughts <= LEVEL / _NUM_TESTS:
        return replace(drift, p_least=_p_least(test, thoughts, kind))
    verdicts = _surprises(_verdicts(both), np.concatenate([given, seen, seen**2], axis=1))
    return replace(drift, p_verdicts=test.p(verdicts, 2 * kind + both.labelled))


def _one_a_question(traces: Traces) -> Traces:
    """Returns the last trace of each of the newest questions, in order."""
    _, first = np.unique(traces.question_id[::-1], return_index=True)
    return traces.select(np.sort(len(traces) - 1 - first)[-_MOST:])


def _showing(traces: Traces, signals: Set[str]) -> Traces:
    """Returns traces with some of their signals alone."""
    return replace(traces, signals={name: traces.signals[name] for name in sorted(signals)})


def _facts(before: Traces, now: Traces) -> tuple[str, ...]:
    """Returns what the recordings themselves tell to be other."""
    found = [", ".join(np.unique(each.model).tolist()) for each in (before, now)]
    return () if found[0] == found[1] else (f"The LM is called {found[1]}, and was {found[0]}.",)


def _asked(traces: Traces, asked: Mapping[str, tuple[str, int | None]]) -> tuple[Index, Float]:
    """Returns what is known of questions before the LM says anything.

    Returns:
        The number of its kind (N,), of a task, a segment and a class of lengths of prompts; and the
        same as columns (N, K).
    """
    ids, unknown = traces.trace_id.tolist(), ("", None)
    all_known = asked.keys() >= set(ids)
    told = [asked[name] if all_known else unknown for name in ids]
    segments = [one[0] or own for own, one in zip(traces.segment, told, strict=True)]
    names = np.array([f"{a}\n{b}" for a, b in zip(traces.task.tolist(), segments, strict=True)])
    kind = np.unique(names, return_inverse=True)[1]
    columns = np.eye(kind.max() + 1)[kind]
    lengths = np.array([one[1] or np.nan for one in told])
    if np.isnan(lengths).any():
        return kind, columns
    length = _normal(lengths[:, None])
    ends = np.quantile(length, np.linspace(0, 1, _NUM_LENGTHS + 1)[1:-1])
    kind = np.unique(
        kind * _NUM_LENGTHS + np.searchsorted(ends, length[:, 0]), return_inverse=True
    )[1]
    return kind, np.concatenate([columns, length, length**2], axis=1)


def _seen(traces: Traces, config: HeadConfig) -> Float:
    """Returns what was seen of thoughts (N, K): how long they are, how they end, their signals."""
    features = observed_features(traces, config.observing, config.halting)
    observed = config.observing.observe(features, 1.0)[:, :-1].astype(np.float64)
    num, answered = np.diff(traces.offsets), (traces.answer != "").astype(np.float64)
    means = [_means(column, traces) for column in (*observed.T, answered)]
    return np.column_stack([np.log1p(traces.num_tokens), traces.finished, num, *means])


def _verdicts(traces: Traces) -> Float:
    """Returns what is said of answers (N, 3): the forced ones, the last of them, the full one."""
    right = traces.correct.astype(np.float64)
    last = np.zeros(len(traces))
    some = np.diff(traces.offsets) > 0
    last[some] = right[traces.offsets[1:][some] - 1]
    return np.column_stack([_means(right, traces), last, traces.final_correct])


def _means(values: Float, traces: Traces) -> Float:
    """Returns the mean (N,) of values (P,) over the points of each trace where they are known."""
    known = np.isfinite(values)
    at = traces.trace_of_point
    total = np.bincount(at, np.where(known, values, 0.0), len(traces))
    return total / np.maximum(np.bincount(at, known, len(traces)), 1)


def _normal(values: Float) -> Float:
    """Returns each column (N, K) as the normal scores of its ranks; equal values share one."""
    from scipy.stats import norm, rankdata

    scores: Float = norm.ppf((rankdata(values, axis=0) - 0.5) / len(values))
    return scores


def _residuals(values: Float, given: Float) -> Float:
    """Returns what a ridge regression on other columns (N, L) leaves of columns (N, K).

    It does not know the stretches, so that what it leaves may be permuted as the columns may.
    """
    centred = given - given.mean(axis=0)
    values = values - values.mean(axis=0)
    gram = centred.T @ centred + _RIDGE * np.eye(centred.shape[1])
    residuals: Float = values - centred @ np.linalg.solve(gram, centred.T @ values)
    return residuals


def _surprises(verdicts: Float, given: Float) -> Float:
    """Returns how far verdicts (N, K) in [0, 1] are from what other columns (N, L) let expect.

    What is expected is a logistic regression's, which does not know the stretches either. A verdict
    between 0 and 1 counts as both, in its share.
    """
    from sklearn.linear_model import LogisticRegression

    twice, right = np.concatenate([given, given]), np.repeat([True, False], len(given))
    surprises: Float = verdicts - verdicts.mean(axis=0)
    for k in np.flatnonzero(verdicts.any(axis=0) & (verdicts < 1).any(axis=0)):
        weights = np.concatenate([verdicts[:, k], 1 - verdicts[:, k]])
        expected = LogisticRegression(C=1 / _RIDGE, max_iter=1_000).fit(twice, right, weights)
        surprises[:, k] = verdicts[:, k] - expected.predict_proba(given)[:, 1]
    return surprises


@dataclass(frozen=True, eq=False)
class _Test:
    """Asks whether questions of two stretches differ."""

    is_now: NDArray[np.bool_]
    """(N,) which stretch each is of."""
    rng: np.random.Generator

    def shared(self, kind: Index) -> NDArray[np.bool_]:
        """Returns which questions (N,) are of a kind that is in both stretches; none is below 0."""
        counts = [
            np.bincount(kind[side & (kind >= 0)], minlength=kind.max() + 1)
            for side in (self.is_now, ~self.is_now)
        ]
        shared: NDArray[np.bool_] = (kind >= 0) & ((counts[0] > 0) & (counts[1] > 0))[kind]
        return shared

    def p(self, values: Float, kind: Index) -> float:
        """Returns how probable it is that values (N, K) differ so much by chance.

        Args:
            values: What is compared.
            kind: (N,) the kinds that are compared each by itself; below 0 for what is left out.
        """
        found = np.zeros(_NUM_PERMUTATIONS + 1)
        for one in np.unique(kind[self.shared(kind)]):
            rows = np.flatnonzero(kind == one)
            found += self._distances(values[rows], self.is_now[rows])
        return float((found >= found[0] - 1e-9 * abs(found[0])).mean())

    def moved(self, values: Float, rows: NDArray[np.bool_]) -> Float:
        """Returns how far the mean (K,) of values (N, K) in some rows is from what it was."""
        now, before = values[rows & self.is_now], values[rows & ~self.is_now]
        difference: Float = now.mean(axis=0) - before.mean(axis=0)
        return difference

    def _distances(self, values: Float, is_now: NDArray[np.bool_]) -> Float:
        """Returns the energy distance (R + 1,) as it is, and after each permutation."""
        apart = np.sqrt(np.maximum(_squared_distances(values), 0.0)).astype(np.float32)
        sides = np.tile(is_now, (_NUM_PERMUTATIONS + 1, 1))
        self.rng.permuted(sides[1:], axis=1, out=sides[1:])
        num_now, num = int(is_now.sum()), len(is_now)
        weights = np.where(sides, 1 / num_now, -1 / (num - num_now)).astype(np.float32)
        distances: Float = -((weights @ apart) * weights).sum(axis=1, dtype=np.float64)
        return distances * num_now * (num - num_now) / num


def _squared_distances(values: Float) -> Float:
    squares = (values**2).sum(axis=1)
    distances: Float = squares[:, None] + squares - 2 * values @ values.T
    return distances


def _p_least(test: _Test, values: Float, kind: Index) -> float:
    """Returns how probable it is that those kinds differ by chance whose values differ least.

    They are asked for one thing alone, whether they differ as the others do: along the line from
    what the others were to what they are. Without others, it is what `_Test.p` says.
    """
    shared = test.shared(kind)
    least = _least(test, values, kind, shared)
    others = shared & (least < 0)
    if not others.any():
        return test.p(values, kind)
    numbers, weights = np.unique(kind[others], return_counts=True)
    moved = np.average([test.moved(values, kind == one) for one in numbers], 0, weights)
    return test.p((values @ moved)[:, None], least)


def _least(test: _Test, values: Float, kind: Index, shared: NDArray[np.bool_]) -> Index:
    """Returns kinds (N,) with those left out, below 0, whose values differ most.

    Those that are left have half of the questions or more. If they differ too, all kinds do.
    """
    numbers = np.unique(kind[shared])
    by_p = sorted((test.p(values, np.where(kind == one, one, -1)), one) for one in numbers.tolist())
    left = np.where(shared, kind, -1)
    for _, one in by_p:
        without = np.where(left == one, -1, left)
        if 2 * (without >= 0).sum() >= shared.sum():
            left = without
    return left
