"""Reading answers and exact match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise.answers import canonical, read_answer
from lms.scorers import short as exact_match


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("17", "17"),
        (" 17 \n", "17"),
        ("The answer is 42.", "42"),
        ("12 apples and 30 pears, so 42", "42"),
        ("so \\boxed{\\frac{1}{2}} as claimed in 1999", "\\frac{1}{2}"),
        ("first \\boxed{3}, no: \\boxed{4}", "4"),
        ("1,234", "1234"),
        ("it costs $1,234.50 in all", "1234.5"),
        ("minus two is \u22122", "-2"),
        ("5/11", "5/11"),
        ("Sunday.", "sunday"),
        ("between 3 and 4, that is 3,", "3"),
        ("", ""),
        ("   ", ""),
        ("I do not know", ""),
        ("\\boxed{7", "7"),
    ],
)
def test_read_answer(text: str, answer: str) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("007", "7"),
        ("+7", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        ("-0", "0"),
        ("0.0", "0"),
        ("100", "100"),
        ("1,000", "1000"),
        ("1,00", "1,00"),
        ("$12$", "12"),
        ("A  B", "a b"),
        ("0$\x0c", "0"),
    ],
)
def test_canonical(spelling: str, expected: str) -> None:
    assert canonical(spelling) == expected


@given(st.text())
def test_canonical_and_read_answer_settle(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)
    assert canonical(read_answer(text)) == read_answer(text)


@given(st.integers())
def test_every_integer_is_read_as_itself(number: int) -> None:
    assert read_answer(f"the answer is {number}.") == str(number)
    assert exact_match(f"{number:,}", str(number))


def test_exact_match_is_strict() -> None:
    assert exact_match("17", "17")
    assert not exact_match("17", "7")
    assert not exact_match("0.5", "1/2")
    assert not exact_match("", "0")


@pytest.mark.parametrize("gold", ["", "  ", "$.$"])
def test_an_empty_gold_answer_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        exact_match("3", gold)
