from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation.intervals import Resamples, interval, intervals, resample
from evaluation.outcome import Outcome, em_delta, never_outcome, saving
from evaluation.rows import SweepRow, without_intervals
from tests.evaluation.reports import known, made_row
from traces import Traces

MakeTraces = Callable[..., Traces]


def halve(traces: Traces) -> Outcome:
    """All right, for half of the tokens."""
    everyone = np.ones(len(traces), dtype=bool)
    return Outcome(everyone, traces.num_tokens // 2, everyone)


def test_sums_are_over_whole_questions() -> None:
    # Question a: 1 + 2 and 0; question b: 10 and 5. Two draws of a, b with replacement.
    values = np.array([[1.0, 2.0, 10.0], [0.0, 0.0, 5.0]])
    sums = Resamples.draw(np.array(["a", "a", "b"]), 2500).sums(values)
    assert sums.shape == (2, 2500)
    outcomes, count = np.unique(sums, axis=1, return_counts=True)
    assert outcomes.tolist() == [[6, 13, 20], [0, 5, 10]]
    np.testing.assert_allclose(count / 2500, [0.25, 0.5, 0.25], atol=0.04)


def test_one_question_leaves_nothing_to_resample(random_traces: Traces) -> None:
    one = replace(random_traces, question_id=np.full(len(random_traces), "q"))
    outcome = halve(one)
    found = resample(one, {"x": outcome}, num_resamples=20)["x"]
    np.testing.assert_allclose(found.em_delta, em_delta(one, outcome))
    np.testing.assert_allclose(found.saving, saving(one, outcome))


def test_intervals_hold_the_estimate_and_never_halting_has_no_width(random_traces: Traces) -> None:
    outcomes = {"half": halve(random_traces), "never": never_outcome(random_traces)}
    found = resample(random_traces, outcomes)
    low, high = interval(found["half"].em_delta)
    assert low < em_delta(random_traces, outcomes["half"]) < high
    assert interval(found["never"].em_delta) == interval(found["never"].saving) == [0.0, 0.0]


def test_differences_are_paired(random_traces: Traces) -> None:
    outcome = halve(random_traces)
    cheaper = replace(outcome, cost=outcome.cost - random_traces.num_tokens // 10 * 2)
    found = resample(random_traces, {"a": outcome, "b": cheaper}, num_resamples=500)
    lead = found["b"].saving - found["a"].saving
    assert interval(lead)[0] > 0
    assert lead.std() < 0.2 * found["a"].em_delta.std()
    assert np.array_equal(found["a"].em_delta, found["b"].em_delta)


def test_the_same_seed_gives_the_same_resamples(random_traces: Traces) -> None:
    outcomes = {"half": halve(random_traces)}
    first, again = (resample(random_traces, outcomes, 100)["half"].em_delta for _ in range(2))
    other = resample(random_traces, outcomes, 100, seed=1)["half"].em_delta
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_resamples_in_parts_are_those_drawn_at_once() -> None:
    num, num_resamples = 30_000, 100  # of a million counts at once, 33 resamples
    resamples = Resamples.draw(np.arange(num).astype(str), num_resamples, seed=3)
    at_once = np.random.default_rng(3).multinomial(num, np.full(num, 1 / num), num_resamples)
    order = np.unique(np.arange(num).astype(str), return_inverse=True)[1]
    values = np.random.default_rng(0).random((2, num))
    assert np.array_equal(resamples.counts, at_once)
    np.testing.assert_allclose(resamples.sums(values), values @ at_once[:, order].T)


@pytest.mark.parametrize(("num", "drawn"), [(5_000, 10_000), (40_000, 2_500), (200_000, 1_000)])
def test_very_many_questions_are_resampled_less_often(
    num: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All a hundredth of the size; what was asked for is never exceeded."""
    monkeypatch.setattr("evaluation.intervals._MOST_COUNTS", 10**4)
    monkeypatch.setattr("evaluation.intervals._FEWEST_RESAMPLES", 10)
    names = np.arange(num // 100).astype(str)
    assert Resamples.draw(names, 100).counts.shape == (drawn // 100, num // 100)
    assert len(Resamples.draw(names, 5).counts) == 5


def test_a_row_keeps_all_but_its_intervals() -> None:
    row = made_row(known("head", 1.0, -0.01, 0.5))
    assert isinstance(row, SweepRow) and row.saving_interval == pytest.approx([0.47, 0.53])
    bare = replace(row, em_delta_interval=None, saving_interval=None)
    assert without_intervals(row) == bare != row


def test_the_spread_is_that_of_independent_questions() -> None:
    """For 0/1 means over Q questions of one trace: sqrt(p (1 - p) / Q), as by theory."""
    rng = np.random.default_rng(1)
    num = 400
    right = rng.random(num) < 0.3
    mean = Resamples.draw(np.arange(num).astype(str), 4000).sums(right[None])[0] / num
    expected = np.sqrt(right.mean() * (1 - right.mean()) / num)
    assert mean.std() == pytest.approx(expected, rel=0.05)


def test_traces_of_one_question_count_once() -> None:
    """Four copies of every trace must not make the interval narrower."""
    rng = np.random.default_rng(2)
    right = (rng.random(100) < 0.5)[None]
    names = np.arange(100).astype(str)
    single = Resamples.draw(names, 2000).sums(right)
    copied = Resamples.draw(np.repeat(names, 4), 2000).sums(np.repeat(right, 4, axis=1))
    np.testing.assert_allclose(copied, 4 * single)


def test_intervals_are_the_middle_95_percent_of_every_row() -> None:
    samples = np.random.default_rng(0).permuted([np.arange(1001), 5 * np.arange(1001)], axis=1)
    assert intervals(samples) == [[25, 975], [125, 4875]]
    assert interval(samples[1]) == [125, 4875]


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(make_traces: MakeTraces) -> None:
    """200 questions of 3 traces; what a question does to EM and cost is shared by its traces.

    Never halting is right half of the time. The policy is right with a probability that is
    uniform over questions, so the EM change is 0 in truth; it spends a share of the tokens that is
    uniform over [0, 1], and longer traces more: E[share * tokens] / E[tokens] in truth.
    """
    num, per, draws = 200, 3, 500
    traces = make_traces([{"question_id": f"q{n // per}"} for n in range(num * per)])
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for seed in range(draws):
        skill, length = (np.repeat(rng.random(num), per) for _ in range(2))
        drawn = replace(
            traces,
            final_correct=rng.random(num * per) < 0.5,
            num_tokens=(1000 * (1 + length)).astype(np.int64),
        )
        em, cost = rng.random(num * per) < skill, drawn.num_tokens * length
        found = resample(drawn, {"": Outcome(em, cost, em)}, 1000, seed)[""]
        # E[(1 + u) u] / E[1 + u] = (1/2 + 1/3) / (3/2) = 5/9 is spent.
        for k, (samples, truth) in enumerate([(found.em_delta, 0), (found.saving, 4 / 9)]):
            low, high = interval(samples)
            hits[k] += low <= truth <= high
    assert ((hits / draws >= 0.92) & (hits / draws <= 0.98)).all(), hits / draws
