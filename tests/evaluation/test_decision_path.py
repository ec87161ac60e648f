import re
from collections.abc import Callable

import numpy as np

from evaluation.decision_path import decision_path
from haltwise import FEATURE_GROUPS, HaltHead
from haltwise.policy.features import features_of
from tests.heads import random_head
from traces import Traces, Words

MakeTraces = Callable[..., Traces]


def test_every_feature_has_words() -> None:
    features = features_of(FEATURE_GROUPS)
    assert len({feature.name for feature in features}) == len(features)
    assert all(feature.higher != feature.lower for feature in features)


def test_what_was_recorded_is_there_to_read(worked_example: Traces, run_head: HaltHead) -> None:
    words = Words("7", "8", question="What is\n3 + 4?", text="seven " * 100)
    heading = decision_path(worked_example, run_head, 0.5, words).split("\n\n")[0].splitlines()
    assert heading[3:5] == ["It asks: What is 3 + 4?", "Expected is '7', and the LM ends with '8'."]
    assert heading[5].startswith("It is halted about here: ... seven seven")
    # 400 of 600 tokens, so two thirds of the text; of that the last 240 characters.
    assert " ".join(heading[5:-1]).count("seven") == 39


def test_at_a_point_with_an_unknown_signal_it_goes_on(
    make_traces: MakeTraces,
) -> None:
    heads = (random_head(seed, ("confidence",)) for seed in range(100))
    known = make_traces([{"confidence": [np.nan, 0.25, 0.5]}])
    # Of many heads, one that goes on at the second point.
    head = next(head for head in heads if "at point 3" in decision_path(known, head, 1.0))
    lines = decision_path(known, head, 1.0).split("\n\n")[2].splitlines()[1:]
    assert lines[0].endswith("?       ?       ?  a signal is unknown: it goes on")
    assert len(lines) == 3 and all("?" not in line for line in lines[1:])


def test_the_worked_example_in_words(worked_example: Traces, run_head: HaltHead) -> None:
    """It halts at the second "7", where it would at any price above 0.432."""
    text = decision_path(worked_example, run_head, 0.5)
    heading, legend, points, after, verdict = text.split("\n\n")
    assert "how likely the policy is to halt; it does from 50" in legend
    assert heading.splitlines() == [
        "Trace t0",
        "Question q0 (toy, easy), answered by lm",
        "Never halted, the LM ends by itself after 600 tokens with a right answer.",
        "The price is 0.5 exact match per 1,000 tokens: one right answer is worth 2,000 tokens.",
    ]
    assert points.splitlines()[1:] == [
        "  1      100  3             wrong   50.00    41.5    2.79  - repeated less in a row",
        "  2      250  7             right   75.00    41.5    2.79  little",
        "  3      400  7             right   96.88    50.8   0.432  + repeated more in a row",
    ]
    assert after.splitlines() == [
        "It is halted at point 3 of 3 with a right answer.",
        "What weighed most, against an average point: + repeated more in a row",
        "Points before: 2, with a right answer: 1; the first, point 2, would have cost 272 tokens.",
        "Points after: 0, with a right answer: 0.",
    ]
    assert verdict.splitlines() == [
        "Tokens:           433 instead of 600: 27.8% saved, with 33 spent on forced answers",
        "Exact match:        1 instead of 1",
        "Return:         0.783 instead of 0.700 (exact match - price * tokens / 1,000)",
    ]


def test_a_trace_that_is_not_halted(make_traces: MakeTraces, run_head: HaltHead) -> None:
    answers = ["", " a\nlong answer ", "b"]
    trace = make_traces([{"answer": answers, "correct": [False] * 3, "finished": False}])
    text = decision_path(trace, run_head, 0.2)
    assert "the LM is cut off after 600 tokens" in text
    assert [line[14:26] for line in text.splitlines()[-10:-7]] == [
        "(none)      ",
        "a long ans..",
        "b           ",
    ]
    assert "\nIt is not halted.\nPoints: 3, with a right answer: 0.\n" in text
    assert "633 instead of 600: 5.5% more, with 33 spent on forced answers" in text


def test_a_head_that_looks_at_no_answer_spends_tokens_on_its_own_answer_alone(
    worked_example: Traces,
) -> None:
    """Of many heads some halt at each point, which takes 10, 12 and 11 tokens, and some nowhere."""
    heads = (random_head(seed, ("pace",), probing="at_halt") for seed in range(100))
    paths = [decision_path(worked_example, head, 1.0) for head in heads]
    assert {re.findall(r"Tokens: +(.*)", path)[0] for path in paths} == {
        "110 instead of 600: 81.7% saved, with 10 spent on the answer",
        "262 instead of 600: 56.3% saved, with 12 spent on the answer",
        "411 instead of 600: 31.5% saved, with 11 spent on the answer",
        "600 instead of 600: 0.0% saved",
    }


def test_prices_beyond_those_trained_for_are_not_told(
    make_traces: MakeTraces, run_head: HaltHead
) -> None:
    text = decision_path(make_traces([{"answer": ["", "7", "7"]}]), run_head, 0.15)
    assert "   >10  - " in text  # no answer
    assert "  <0.1  + " in decision_path(
        make_traces([{"answer": ["7"] * 3, "confidence": [np.nan] * 3}]),
        HaltHead(run_head.config, run_head.weights | {"b2": np.full(1, 0.5, dtype=np.float32)}),
        0.1,
    )


def test_lines_stay_short_and_say_nothing_twice(random_traces: Traces) -> None:
    groups = ("pace", *tuple(FEATURE_GROUPS)[2:-1])
    head = random_head(3, groups)
    for n in range(len(random_traces)):
        lines = decision_path(random_traces.select(np.array([n])), head, 1.0).splitlines()
        assert max(map(len, lines)) <= 110
        for line in lines:
            words = re.split(r" [+-] ", line.replace(",", ""))
            assert len(words) == len(set(words))


def test_a_trace_without_points_has_nothing_to_decide(
    random_traces: Traces, run_head: HaltHead
) -> None:
    empty = random_traces.select(np.flatnonzero(np.diff(random_traces.offsets) == 0)[:1])
    assert decision_path(empty, run_head, 1.0).endswith(
        "\n\nIt has no decision point: there is nothing to decide."
    )
