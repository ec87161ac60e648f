"""A learning curve judges every question once, by heads that have not seen it."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks import curve
from benchmarks.curve import CurveConfig
from benchmarks.started import started_head
from benchmarks.synthetic import synthetic_traces
from evaluation.compare import swept
from evaluation.intervals import Resamples
from evaluation.outcome import Outcome, never_outcome
from haltwise import InputError
from policies.head import HeadPolicy

_SMALL = CurveConfig(num_questions=(12, 40), num_draws=2, steps=20)


@pytest.mark.whole
def test_heads_learn_from_so_many_questions_and_none_that_they_judge() -> None:
    traces = synthetic_traces(6 * 90)  # six of each question
    with (
        patch("benchmarks.curve.started_head", wraps=started_head) as learning,
        patch("benchmarks.curve.swept", wraps=swept) as judging,
    ):
        found = {result.name: result.median for result in curve.measure(traces, _SMALL)}
    learned = [{*call.args[0].question_id} for call in learning.call_args_list]
    assert [*map(len, learned)] == [12] * 6 + [40] * 6
    judged = [{*call.args[1].question_id} for call in judging.call_args_list[2:]]
    assert not any(known & new for known, new in zip(learned, judged, strict=True))
    lead = found["40 questions: lead over evidence at a loss of 2"]
    saved = found["40 questions: saving at a loss of 2"], found["evidence: saving at a loss of 2"]
    assert lead == pytest.approx(saved[0] - saved[1])
    assert found["40 questions: lead over evidence at a loss of 2, lower end"] <= lead


def test_parts_are_joined_in_the_order_of_the_traces() -> None:
    def part(*values: float) -> Outcome:
        return Outcome(np.array(values), 10 * np.array(values), np.array(values) > 1)

    joined = curve._joined([part(0, 3), part(1, 2)], [np.array([0, 3]), np.array([1, 2])])
    assert [joined.em.tolist(), joined.cost.tolist()] == [[0, 1, 2, 3], [0, 10, 20, 30]]
    assert joined.halted.tolist() == [False, False, True, True]


def test_a_level_curve_is_told_by_no_number_of_questions() -> None:
    traces = synthetic_traces(30)
    level = curve._Frontier.of(
        traces, [never_outcome(traces)], Resamples.draw(traces.question_id, 100)
    )
    *_, last = curve._compared("", level, {"evidence": level}, 30)
    assert last.median == np.inf


@pytest.mark.whole
def test_heads_see_the_groups_that_are_named() -> None:
    config = replace(_SMALL, num_questions=(12,), num_draws=1, groups=("confidence",))
    with patch("benchmarks.curve.HeadPolicy", wraps=HeadPolicy) as made:
        curve.measure(synthetic_traces(6 * 30), config)
    heads = [call.args[0] for call in made.call_args_list]
    assert [head.config.observing.groups for head in heads] == [("confidence",)] * 3
    with pytest.raises(InputError, match="groups are pase, expected feature groups"):
        curve.measure(synthetic_traces(6 * 30), replace(config, groups=("pase",)))


def test_more_questions_than_the_other_folds_have_are_refused() -> None:
    too_many = replace(_SMALL, num_questions=(61,))
    with pytest.raises(InputError, match="3 folds of 90 questions leave 60"):
        curve.measure(synthetic_traces(6 * 90), too_many)
