from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from haltwise import MEAN_LOGPROB, Halting
from haltwise.session.signal_collector import REFLECTIONS, SignalCollector, num_reflections
from haltwise.session.thought import PointRules, Probe, Thought
from lms.embedded import VOCABULARY

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


def join(tokens: Sequence[str]) -> str:
    """As many tokenizers do: the blank at the start of a text is dropped."""
    return "".join(tokens).removeprefix(" ")


def counts(*parts: Sequence[str]) -> list[int]:
    """Reflection words in each part of a thought."""
    thought: list[str] = []
    found = []
    for part in parts:
        thought += part
        found.append(num_reflections(thought, len(part), join))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, but 7 + 8 is 15. HOWEVER, maybe not.", 4),
        ("Hmm. Let me double-check: verify", 3),
        ("button, waiter, checkers, wait_list, awaits", 0),
        ("", 0),
    ],
)
def test_whole_words_in_any_case_count(text: str, expected: int) -> None:
    assert counts([text]) == [expected]


def test_a_word_counts_once_and_where_it_is_whole() -> None:
    assert counts([" so", " Wa"], ["it", ","], [" wait", " so"]) == [0, 1, 1]
    assert counts([" so", " wait"], [" so", " but"]) == [1, 1]
    assert counts([" so"], [" wait"]) == [0, 1]  # not "sowait"
    assert counts([" so", " but"], ["ton"]) == [1, 0]


def test_words_long_ago_do_not_count_again() -> None:
    assert counts([" wait"] * 20, [" so"], [" wait"] * 3) == [20, 0, 3]


def test_the_embedded_lm_has_words_of_its_own() -> None:
    assert set(VOCABULARY) & set(REFLECTIONS) == {"check", "wait"}
