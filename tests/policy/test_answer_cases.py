"""Answers in the many ways that LMs write them: right ones are read as right, others are not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise.policy.answers import READERS, canonical, read_answer, read_choice, read_number
from lms import scorers
from lms.scorers import scorer_of
from tests.policy.answer_cases import CASES, Case

SHARED = Path(__file__).parents[2] / "shared" / "cases" / "answer_pairs.jsonl"


def shared_cases() -> Iterator[Case]:
    if SHARED.exists():
        for line in SHARED.read_text(encoding="utf-8").splitlines():
            yield tuple(json.loads(line).values())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes no formula wrong."""
    monkeypatch.setattr(scorers, "_TIMEOUT_S", 600)


@pytest.mark.parametrize(("rule", "text", "gold", "is_right"), [*CASES, *shared_cases()])
def test_an_answer_is_judged_as_a_person_would(
    rule: str, text: str, gold: str, is_right: bool
) -> None:
    if rule == "latex":
        pytest.importorskip("math_verify")
    assert scorer_of(rule)(READERS[rule](text), gold) is is_right


@pytest.mark.parametrize(("rule", "text", "gold", "is_right"), CASES)
def test_a_read_answer_is_read_as_itself(rule: str, text: str, gold: str, is_right: bool) -> None:
    answer = READERS[rule](text)
    assert not answer or READERS[rule](f"\\boxed{{{answer}}}") == answer


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_one_number_in_all_spellings(number: int) -> None:
    spellings = [
        f"{number}",
        f"{number:,}",
        f"{number:,}".replace(",", "{,}"),
        f"{number:,}".replace(",", r"\,"),
        f"{number:,}".replace(",", r"\ "),
        f"{number:,}".replace(",", "\u202f"),
        f"{number}.0",
        f"{number}".translate({ord("0") + i: ord("\uff10") + i for i in range(10)}),
        f"{number}".translate({ord("0") + i: ord("\u0660") + i for i in range(10)}),
        f"{number}".replace("-", "\u2212"),
        f"{number}\\%",
        f"\\text{{{number}}}",
        f"x = {number} \\text{{ cm}}",
    ]
    assert {read_number(f"\\boxed{{{one}}}") for one in spellings} == {str(number)}
    assert {read_answer(f"\\boxed{{{one}}}") for one in spellings[:10]} == {str(number)}
    assert read_number(f"\u7b54\u6848\u662f{number}\u3002") == str(number)
    assert read_answer(f"\u7b54\u6848\u662f{number}\u3002") == str(number)
    assert read_number(f"\\boxed{{{number + 1}}}") != str(number)


@given(st.integers(0, 99), st.integers(1, 98), st.integers(2, 99))
def test_a_mixed_number_is_the_sum_of_its_parts(whole: int, top: int, bottom: int) -> None:
    if top >= bottom:
        top, bottom = bottom - 1, top + 1
    value = read_number(str(whole + Fraction(top, bottom)))
    for mixed in (f"{whole} {top}/{bottom}", rf"{whole}\ \frac{{{top}}}{{{bottom}}}"):
        assert read_number(f"\\boxed{{{mixed}}}") == value
        assert READERS["latex"](f"\\boxed{{{mixed}}}") == value


@given(
    st.integers(0, 999),
    st.text("0123456789", max_size=5),
    st.text("0123456789", min_size=1, max_size=6),
)
def test_a_repeating_decimal_is_the_limit_of_its_digits(whole: int, first: str, block: str) -> None:
    value = Fraction(read_number(rf"\boxed{{{whole}.{first}\overline{{{block}}}}}"))
    close = Fraction(f"{whole}.{first}{block * 20}")
    assert 0 <= value - close <= Fraction(1, 10 ** (len(first) + 20 * len(block)))


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 23), st.integers(0, 59))
def test_times_are_equal_only_if_they_are_the_same(
    h: int, m: int, other_h: int, other_m: int
) -> None:
    for rule in ("number", "short", "latex"):
        read = READERS[rule](rf"\boxed{{{h}:{m:02}}}")
        assert READERS[rule](rf"\boxed{{{h:02}:{m:02}}}") == read
        other = READERS[rule](rf"\boxed{{{other_h}:{other_m:02}}}")
        assert (read == other) == ((h, m) == (other_h, other_m))


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from("ABCDEFGHIJ"))
def test_two_letters_are_no_choice(one: str, other: str) -> None:
    for text in ("Answer: {}", r"\boxed{{{}}}", "The answer is ({})", "the best option is {}."):
        assert read_choice(text.format(one)) == one
        if one != other:
            for joint in (" or ", " and ", ", ", "/", " & ", " or option "):
                assert read_choice(text.format(one + joint + other)) == ""


@given(
    st.text() | st.from_regex(r"(\\text\{|\}|[-$ .,0-9A-c\u0660\uff11\u00bd\u00b2]|\\[,% ]){0,9}")
)
@pytest.mark.whole
def test_canonical_spelling_is_its_own(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)


@pytest.mark.parametrize(
    "nonsense",
    [
        "1,111", "0", "1 111", "\\boxed{", "\\text{", "answer is ", "answer to ", "a-.", "!", "\n",
        "Answer: 1 or ", "\\frac{1}", "^", "A or ", "$", "not x but ", "\u2070", "5 and ", "{",
        "1.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", READERS)
def test_a_long_text_without_sense_is_read(rule: str, nonsense: str) -> None:
    assert isinstance(READERS[rule](nonsense * 3_000 + "x"), str)


def test_no_formula_keeps_a_thread_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(scorers, "_TIMEOUT_S", 1)
    monkeypatch.setattr(scorers, "_worker", scorers._Worker())
    found: list[bool] = []

    def judge() -> None:
        found.append(scorer_of("latex")("((9^{99})^{99})^{99}+1", "7"))
        monkeypatch.setattr(scorers, "_TIMEOUT_S", 600)
        found.append(scorer_of("latex")("x+1", "1+x"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert found == [False, True]
