from typing import Any

import numpy as np
import pytest

from haltwise import MEAN_LOGPROB, Halting
from haltwise.session.forced_answer import Probe
from haltwise.session.signal_collector import SignalCollector
from haltwise.session.thought import PointRules, Thought

RULES = PointRules(Halting("always", "every 2 tokens, at most 3", "</think>", MEAN_LOGPROB))
TOP = np.array([[np.log(0.5), np.log(0.5), *[-np.inf] * 18]])
ROW = np.zeros(1, dtype=np.int64)


def test_signals_are_of_the_tokens_since_the_previous_point() -> None:
    collector = SignalCollector(RULES, ("logprob", "num_reflections"), 1)
    thought, seen = Thought(RULES, "<think>"), []
    for i, word in enumerate(["wait ", "but ", "x ", "hmm "]):
        thought.add(word)
        collector.add(ROW, np.array([-1.0 * i]), TOP)
        if thought.at_point:
            seen.append(collector.collect(ROW, [thought]))
    told: list[Any] = [(s.position, s.points_left, s.logprob, s.num_reflections) for s in seen]
    assert told == [(2, 2, -0.5, 2), (4, 1, -2.5, 1)]
    assert seen[0].entropy is None and seen[0].answer is None  # nobody wanted them


def test_forced_answers_and_what_was_measured_elsewhere_are_signals_too() -> None:
    collector, thought = SignalCollector(RULES, (), 1), Thought(RULES, "<think>")
    thought.add("x ")
    thought.add("y ")
    probe = Probe([7], [-0.5], 2, "7", "7")
    seen = collector.collect(ROW, [thought], [probe], {"end_think_logprob": np.array([-3.0])})
    told: Any = (seen.probe_tokens, seen.worst_logprob, seen.end_think_logprob)
    assert told == (2, -0.5, -3.0)
    assert seen.confidence == pytest.approx(np.exp(-0.5))
    assert seen.logprob is None and seen.num_reflections is None
