"""The examples' questions: their answers by another way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.stories import StoriesConfig, main, stories
from haltwise import InputError


def told(text: str) -> int:
    """How many things a story's hero has in the end, read from its sentences."""
    num = 0
    for sentence in text.split(". "):
        numbers = [int(found) for found in re.findall(r"\d+", sentence)]
        match re.search(r"has \d|buys|finds|gives half|gives|loses|How many", sentence):
            case None:
                raise AssertionError(sentence)
            case found if found[0] in ("buys", "finds") or found[0].startswith("has"):
                num += numbers[0] * (numbers[1:] or [1])[0]
            case found if found[0] == "gives half":
                num //= 2
            case found if found[0] in ("gives", "loses"):
                num -= numbers[0]
    return num


def test_a_story_tells_its_answer() -> None:
    rows = list(stories(300, 0))
    assert len({row["question"] for row in rows}) == 300
    for row in rows:
        assert told(row["question"]) == int(row["answer"]) >= 1
        assert row["segment"] == f"{row['question'].count('Then')} steps"
    assert {row["segment"] for row in rows} == {"1 steps", "2 steps", "3 steps"}
    assert rows == list(stories(300, 0)) != list(stories(300, 1))


@pytest.mark.parametrize("num", [0, 10_001])
def test_there_are_so_many_stories(num: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"num is {num}, expected 1 to 10000"):
        main(StoriesConfig(tmp_path / "out.jsonl", num))
    assert not list(tmp_path.iterdir())
