from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from traces import TraceFiles, write_shard
from traces.soundness import check_sound

Row = dict[str, Any]
Recording = Callable[..., TraceFiles]


@pytest.fixture
def recording(tmp_path: Path, make_row: Callable[..., Row]) -> Recording:
    """Makes recordings of 200 questions, half of them train; changes are by number of the row."""

    def make(num: int = 200, changes: dict[int, Row] | None = None, **shared: Any) -> TraceFiles:
        rows = [
            make_row(
                trace_id=f"t{n}",
                question_id=f"q{n}",
                question=f"What is {n}?",
                split=("train", "dev")[n % 2],
                **shared,
            )
            | (changes or {}).get(n, {})
            for n in range(num)
        ]
        for k in range(2):  # what contradicts may stand in another file
            write_shard(tmp_path / f"{k}.parquet", rows[k::2], {})
        return TraceFiles.open(tmp_path)

    return make


def test_a_sound_recording_leaves_no_doubt(recording: Recording) -> None:
    assert check_sound(recording()) == []


UNREAD = {"final_answer": "", "final_correct": False}
UNREAD_FORCED = {"answer": [""] * 3, "correct": [False] * 3}
WRONG = {"final_correct": False, "final_answer": "9", "correct": [False] * 3}


@pytest.mark.parametrize(
    ("num", "changes", "message"),
    [
        (200, {5: {"question_id": "q4"}}, "'q4' has the splits 'dev', 'train', expected one"),
        (200, {6: {"question_id": "q4", "gold": "8"}}, "'q4' has the reference answers '7', '8'"),
        (9, {}, "9 questions to learn from, in the splits train and dev: expected at least 10"),
        (
            200,
            dict.fromkeys(range(200), WRONG),
            r"0 of 200 traces end with a right answer \(0.0%\)",
        ),
        (
            200,
            dict.fromkeys(range(186), WRONG),
            r"14 of 200 .* \(7.0%\): expected at least 10.0%, .* expected '7', found '9'",
        ),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(
    recording: Recording, num: int, changes: dict[int, Row], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_sound(recording(num, changes))


def test_a_low_exact_match_can_be_meant(recording: Recording) -> None:
    files = recording(changes=dict.fromkeys(range(186), WRONG))
    assert check_sound(files, min_em=0.05) == []
    with pytest.raises(InputError, match="--min-em is -1"):
        check_sound(files, min_em=-1)


@pytest.mark.parametrize(
    ("num", "changes", "doubt"),
    [
        (150, {}, "150 questions to learn from are few: one of them is 0.7 points"),
        (
            200,
            dict.fromkeys(range(21), UNREAD),
            "21 of 200 final answers (10%) could not be read",
        ),
        (
            200,
            dict.fromkeys(range(101), UNREAD_FORCED),
            "303 of 600 forced answers (50%) could not be read",
        ),
        (
            200,
            {3: {"final_correct": False}},
            "1 answers are marked right in one place and wrong in another, for the same question: "
            "the first is '7' to 'q3'. They are in 1 of 200 traces (0.5%): 't3'.",
        ),
        (
            200,
            {3: {"question": "What is 4?", "gold": "8"}},
            "1 questions with the same text have several reference answers: the first is "
            "'What is 4?', '7', '8'.",
        ),
        (
            200,
            {3: {"question": "What is 4?", "split": "test"}},
            "1 questions with the same text are in several splits, under other ids",
        ),
    ],
)
def test_what_may_be_wrong_is_told(
    recording: Recording, num: int, changes: dict[int, Row], doubt: str
) -> None:
    assert any(told.startswith(doubt) for told in check_sound(recording(num, changes)))


def test_an_answer_that_is_cut_off_need_not_be_readable(recording: Recording) -> None:
    cut = {"final_answer": "", "final_correct": False, "finished": False}
    assert check_sound(recording(changes=dict.fromkeys(range(100), cut))) == []
