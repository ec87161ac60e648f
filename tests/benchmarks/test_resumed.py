"""What is lost where a forced answer cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.resumed import ResumedConfig, measure, resumed
from benchmarks.synthetic import synthetic_traces
from evaluation.outcome import halt_outcome
from traces import Traces


def test_a_thought_that_goes_on_pays_for_its_answer_too(
    make_traces: Callable[..., Traces],
) -> None:
    """Halted at 100 of 600 tokens, 10 of an answer: 110, or 610 where that is not read."""
    points = {"position": [100, 250], "probe_tokens": [10, 12], "answer": ["7", "7"]}
    points |= {"correct": [True, True], "confidence": [0.5] * 2, "answer_logprobs": [[]] * 2}
    traces = make_traces([points | {"num_tokens": 600, "final_correct": True}] * 2)
    halts = np.array([True, False, True, False])
    answer = traces.answer.copy()
    answer[0] = ""
    traces = replace(traces, answer=answer, correct=answer != "")
    given = halt_outcome(traces, halts, "at_halt")
    assert (given.em.tolist(), given.cost.tolist()) == ([False, True], [110, 110])
    found = resumed(traces, halts, given)
    assert (found.em.tolist(), found.cost.tolist()) == ([True, True], [610, 110])
    assert found.halted.tolist() == [False, True]


def test_what_goes_on_has_the_exact_match_back_and_saves_less() -> None:
    traces = synthetic_traces(300)
    config = ResumedConfig(share=0.2, drop=0.2, draws=3)
    found = {result.name: result.median for result in measure(traces, config)}
    name = next(one.split(",")[0] for one in found)
    given, on = (
        [found[f"{name}, {how}: {what}"] for what in ("EM change", "saving")]
        for how in ("given", "go on")
    )
    assert on[0] > given[0] and on[1] < given[1]
