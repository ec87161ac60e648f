"""Reading answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from haltwise.policy.answers import (
    READERS,
    canonical,
    normal_text,
    read_answer,
    read_choice,
    read_latex,
    read_number,
    read_strict,
    read_text,
)
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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # A forced answer, after a box that the close text has opened, or after nothing.
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{0.50", "0.5"),
        ("\\boxed{7\nWait, 8", "7"),
        (" 18 sheep", "18"),
        # A whole answer; reasoning in the open.
        ("First 3 + 4 = 7. Twice that is 14 apples.", "14"),
        ("I get 12, no: \\boxed{\\text{ 13 eggs}}. That took 2 steps.", "13"),
        ("#### -12", "-12"),
        # Spellings of one value.
        ("1000.0", "1000"),
        ("$1,000", "1000"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("1,\\!000", "1000"),
        ("10^3", "1000"),
        ("1e3", "1000"),
        ("1 \\times 10^{3}", "1000"),
        ("1.5 x 10^-2", "0.015"),
        ("\u22123", "-3"),
        ("x = - 3", "-3"),
        ("-\\$3", "-3"),
        ("1/2", "0.5"),
        ("\\frac12", "0.5"),
        ("-\\dfrac{1}{2}", "-0.5"),
        ("3\\frac{1}{2}", "3.5"),
        ("3 1/2", "3.5"),
        ("2/6", "1/3"),
        ("+.5", "0.5"),
        ("50\\%", "50"),
        ("\u20ac 12.30", "12.3"),
        # What is no number of its own.
        ("36 cm^2", "36"),
        ("36 cm^{2}", "36"),
        ("\\boxed{2^{10}}", "1024"),
        ("\\boxed{2^{1000}}", ""),
        ("\\boxed{x^{10}}", ""),
        ("2^{10} = 1024", "1024"),
        ("12^2", "144"),
        ("-1.25 ^2", ""),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("5\\times10^3", "5000"),
        ("x2", ""),
        ("1, 2345", ""),
        ("1/0", ""),
        ("\\boxed{none}, as 3 is odd", ""),
        ("none", ""),
        ("", ""),
    ],
)
def test_a_number_is_the_last_one_by_its_exact_value(text: str, answer: str) -> None:
    assert read_number(text) == answer


@given(st.fractions())
def test_every_fraction_is_read_as_its_value(value: Fraction) -> None:
    read = read_number(f"The answer is {value}.")
    assert Fraction(read) == value
    assert read_number(f"\\boxed{{{value}}}") == read


def test_a_number_without_end_is_read_as_it_is_spelt() -> None:
    assert read_number("9" * 5000) == "9" * 5000
    assert read_number("1" + "0" * 100) == "1" + "0" * 100


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{(c) 5", "C"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{(D)}}", "D"),
        ("\\boxed{Rome}", ""),
        ("B", "B"),
        ("(B)", "B"),
        (" B.", "B"),
        ("b) Rome", "B"),
        ("**B**", "B"),
        ("B. Rome is the capital.", "B"),
        ("Rome is the capital.\nB", "B"),
        ("The answer is (B), as option A is a river.", "B"),
        ("**Answer: C**", "C"),
        ("Is the answer B? No: the answer is C.", "C"),
        ("So the correct choice is: option D.", "D"),
        ("The best answer is $\\text{E}$.", "E"),
        ("I would take (C) rather", "C"),
        ("A. Paris\nB. Rome\n\nOne of them is a capital.", ""),
        ("A. Paris\nB. Rome\n\nB", "B"),
        ("A. Paris\nB. Rome\n\nThe answer is:\nB. Rome", "B"),
        ("(A) or (B)? Hard to say.", ""),
        ("the answer is a number", ""),
        ("The answer is not B", ""),
        ("Answer: None of them", ""),
        ("A or B", ""),
        ("I do not know", ""),
        ("Apples", ""),
        ("", ""),
    ],
)
def test_a_choice_is_a_letter_in_the_place_of_an_answer(text: str, answer: str) -> None:
    assert read_choice(text) == answer


@pytest.mark.parametrize(
    ("text", "strict", "normal"),
    [
        (" The Old Mill. \n", "The Old Mill.", "old mill"),
        ("It is old.\nAnswer: the Old  Mill\nThat was easy.", "the Old  Mill", "old mill"),
        ("Answer: no\n\n**Answer:** Yes!", "Yes!", "yes"),
        ("Answer:\n  1931", "1931", "1931"),
        ("Answer: \\boxed{\\text{A mill}}.", "A mill", "mill"),
        ("\\boxed{aB}, says the text", "aB", "ab"),
        ("By Hallin.\n\nThe yard.", "The yard.", "yard"),
        ("\u201cLe  Monde\u201d", "\u201cLe  Monde\u201d", "le monde"),
        ("It floats. The answer is the ferry.", "the ferry.", "ferry"),
        ("Answer: Rome\nThe answer is clear.", "Rome", "rome"),
        ("**Answer: Rome**", "Rome", "rome"),
        ("**Answer:** x", "x", "x"),
        ("**Answer: x**", "x", "x"),
        ("Answer: **x**", "x", "x"),
        ("The answer is: **x**", "x", "x"),
        ("Answer: __init__", "__init__", "init"),
        ("The answer is __init__", "__init__", "init"),
        ("Answer: *", "*", ""),
        ("Answer:", "", ""),
        ("  ", "", ""),
        ("the", "the", ""),
    ],
)
def test_words_follow_the_last_mark_or_stand_in_the_last_line(
    text: str, strict: str, normal: str
) -> None:
    assert read_strict(text) == strict
    assert read_text(text) == normal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\dfrac{3}{7}}", "3/7"),
        ("\\boxed{ \\left( 2, \\frac\\pi2 \\right) }", "(2,\\frac\\pi2)"),
        ("\\boxed{\\frac{\\sqrt{2}}{2}", "\\frac{\\sqrt{2}}{2}"),
        ("\\boxed{\\text{Ada}}", "ada"),
        ("\\boxed{11{,}111}", "11111"),
        ("\\boxed{\\$1,\\!000}", "1000"),
        ("\\boxed{(3, 1,\\!000)}", "(3,1000)"),
        ("\\boxed{3 1/2}", "3.5"),
        ("\\boxed{10\\%}", "10"),
        ("\\boxed{\u2212x}", "-x"),
        ("As $y = 2$, the answer is $x^2 + 1$.", "x^2+1"),
        ("Answer: x + 1.", "x+1"),
        ("so the answer is **72**.", "72"),
        ("so the answer is *72*.", "72"),
        ("\\boxed{2^{10}}", "2^{10}"),
        ("so it is $x$, that is $\\frac12 y$ of all", "\\frac{1}{2}y"),
        ("It takes 3 of 40 days", "40"),
        ("x+1", "x+1"),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_a_formula_is_boxed_or_follows_the_words(text: str, answer: str) -> None:
    assert read_latex(text) == answer


@pytest.mark.parametrize("rule", READERS)
@given(text=st.text() | st.from_regex(r"(answer: |\\boxed\{|[-$ .,/{}A-c0-3]|\\frac|\n){0,12}"))
@example(text="c:\u0327")
def test_whatever_an_lm_says_can_be_read_and_read_again(rule: str, text: str) -> None:
    answer = READERS[rule](text)
    if rule in ("number", "choice"):
        assert READERS[rule](answer) == answer
    assert normal_text(normal_text(answer)) == normal_text(answer)


@pytest.mark.parametrize("text", ["```\nblue\n```", "~~~text\nblue", "```\nblue\n  ```  \n"])
def test_a_fence_is_no_part_of_an_answer(text: str) -> None:
    assert [READERS[rule](text) for rule in ("short", "strict", "text")] == ["blue"] * 3
    assert READERS["choice"]("```\nB\n```") == READERS["choice"]("B") != ""
    assert (
        READERS["latex"]("```latex\n\\boxed{42}\n```") == READERS["number"]("```\n42\n```") == "42"
    )
    assert READERS["strict"]("`blue`") == "`blue`"  # a line with words is none
