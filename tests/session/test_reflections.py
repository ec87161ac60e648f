from collections.abc import Sequence

import pytest

from haltwise.session.reflections import REFLECTIONS, num_reflections
from lms.embedded import VOCABULARY


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
