"""Traces of a dense decision rule, read under a coarser one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise import MEAN_LOGPROB, DecisionRule, Halting
from haltwise.policy.signals import answer_keys
from haltwise.session.thought import PointRules, Thought
from tests.conftest import trace_row
from traces import TraceFiles, read_traces, write_shard
from traces.looks import looked_at

CLOSER = "every 12 tokens, every 4 while the answer repeats"
MakeRow = Callable[..., dict[str, Any]]


def recorded(path: Path, answers: list[str], rule: str = "every 4 tokens", **columns: Any) -> Path:
    """One trace with a point every 4 tokens."""
    num = len(answers)
    columns = {
        "position": [4 * (n + 1) for n in range(num)],
        "probe_tokens": [2] * num,
        "correct": [False] * num,
        "confidence": [0.5] * num,
        "answer_logprobs": [[-0.5]] * num,
        "num_tokens": 4 * num + 3,
    } | columns
    row = trace_row(answer=answers, **columns)
    write_shard(path, [row], {"decision_rule": rule})
    return path


def test_what_is_seen_of_the_tokens_since_is_seen_of_all_of_them(tmp_path: Path) -> None:
    path = recorded(
        tmp_path / "0.parquet",
        ["a", "b", "c", "d", "e"],
        entropy=[1.0, 2.0, 6.0, 4.0, 9.0],
        max_entropy=[5.0, 3.0, 1.0, 2.0, 9.0],
        min_logprob=[-3.0, -1.0, -2.0, -2.5, -9.0],
        num_reflections=[1.0, 0.0, 2.0, 1.0, 9.0],
        end_think_logprob=[-1.0, -2.0, -3.0, -4.0, -9.0],
    )
    found = looked_at(read_traces(path), DecisionRule("every 8 tokens"))
    assert found.position.tolist() == [8, 16] and found.answer.tolist() == ["b", "d"]
    assert found.offsets.tolist() == [0, 2]
    expected = {
        "entropy": [1.5, 5.0],
        "max_entropy": [5.0, 2.0],
        "min_logprob": [-3.0, -2.5],
        "num_reflections": [1.0, 3.0],
        "end_think_logprob": [-2.0, -4.0],
    }
    assert {name: found.signals[name].tolist() for name in expected} == expected
    assert found.recorder["decision_rule"] == "every 8 tokens"


RULES = (CLOSER, f"{CLOSER}, at most 5", "every 8 tokens", "every 4 tokens, at most 3")


@pytest.mark.whole
@given(st.lists(st.sampled_from(["", "1", "2"]), min_size=1, max_size=40), st.sampled_from(RULES))
def test_a_thought_looks_where_replay_does(
    tmp_path_factory: pytest.TempPathFactory, answers: list[str], rule: str
) -> None:
    traces = read_traces(recorded(tmp_path_factory.mktemp("t") / "0.parquet", answers))
    thought, looked = Thought(PointRules(Halting("always", rule, "", MEAN_LOGPROB)), "<think>"), []
    for token in range(4 * len(answers)):
        ahead = thought.next_look()
        thought.add("x")
        assert (ahead == thought.num_tokens) == thought.at_point
        if thought.at_point:
            looked.append(thought.position)
            thought.answered(int(answer_keys([answers[token // 4]])[0]))
    assert looked_at(traces, DecisionRule(rule)).position.tolist() == looked


def test_points_lie_close_behind_an_answer_that_repeats(tmp_path: Path) -> None:
    answers = ["", "", "1", "", "", "1", "2", "1", "1", "1", "", ""]
    traces = read_traces(recorded(tmp_path / "0.parquet", answers))
    #                     12   24 = 12: close    28 != 24: far again   40
    found = looked_at(traces, DecisionRule(CLOSER))
    assert found.position.tolist() == [12, 24, 28, 40]


@pytest.mark.parametrize(
    ("stated", "rule", "is_read"),
    [
        ("every 4 tokens", "every 8 tokens", True),
        ("every 4 tokens", CLOSER, True),
        ("every 4 tokens", "every 4 tokens, at most 2", True),
        ("every 4 tokens", "every 6 tokens", False),
        ("every 4 tokens", "after Wait", False),
        ("every 8 tokens", CLOSER, False),
        ("every 4 tokens, at most 9", "every 8 tokens", False),
        ("after Wait", "every 4 tokens", False),
        (CLOSER, "every 12 tokens", False),
        ("every line", "every line", True),
    ],
)
def test_files_are_read_under_a_rule_if_they_hold_its_points(
    tmp_path: Path, stated: str, rule: str, is_read: bool
) -> None:
    path = recorded(tmp_path / "0.parquet", ["1"] * 6, rule=stated)
    files = TraceFiles.open(path).under(rule)
    assert files.recorder["decision_rule"] == (rule if is_read else stated)
    num = files.read(files.rows()).num_points
    assert (num == 6) == (not is_read or rule in ("every line",))


def test_a_trace_whose_points_are_all_passed_stays(tmp_path: Path, make_row: MakeRow) -> None:
    rows = [make_row(trace_id="a"), make_row(trace_id="b", **no_points())]
    write_shard(tmp_path / "0.parquet", rows, {"decision_rule": "every 50 tokens"})
    files = TraceFiles.open(tmp_path / "0.parquet").under("every 1000 tokens")
    found = files.read(files.rows())
    assert (len(found), found.num_points, found.offsets.tolist()) == (2, 0, [0, 0, 0])
    assert np.isin(found.trace_id, ["a", "b"]).all()


def no_points() -> dict[str, Any]:
    names = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    return {name: [] for name in names}
