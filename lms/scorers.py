"""Answer rules: how an LM is asked for an answer, and how it is compared with the gold answer."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from haltwise import InputError
from haltwise.policy.answers import canonical, normal_latex, normal_text, read_choice, read_number

_BOXED = r"Reason step by step and put the final answer in \boxed{}."
_SAID = 'Reason step by step. End with "Answer:" and a short answer, on a line of its own.'
_OPEN_BOX = r"The final answer is \boxed{"

# Longer formulas are compared as they are spelled: they can take sympy minutes.
_LONGEST_FORMULA = 200
_TIMEOUT_S = 5
_HEXADECIMAL = re.compile(r"\b0x", re.IGNORECASE)
_HUGE = re.compile(r"[0-9]{3,}!|\^\{?[^}]{0,9}(?:\^|[0-9]{4,})")


@dataclass(frozen=True)
class Scorer:
    """One answer rule; called with an answer as it was read, and the gold answer."""

    compare: Callable[[str, str], bool]
    """Arguments, result and errors as of `short`."""
    instruction: str
    """Follows the question."""
    cue: str
    """Said after a thought to force an answer."""
    answer_end: str
    """See haltwise.Halting."""

    def __call__(self, answer: str, gold: str) -> bool:
        """Says whether an answer is right."""
        return self.compare(answer, gold)


def _spelled(gold: str, spell: Callable[[str], str], expected: str) -> str:
    """The gold answer in the spelling that right answers share.

    Raises:
        InputError: It has none.
    """
    spelling = spell(gold)
    if not spelling:
        found = "cannot be compared" if canonical(gold) else "is empty"
        raise InputError(f"gold answer {gold!r} {found}: expected {expected}")
    return spelling


def short(answer: str, gold: str) -> bool:
    """Says whether an answer equals the gold answer, both in canonical spelling.

    Args:
        answer: as returned by `read_answer`; "" is never right.
        gold: the reference answer.

    Raises:
        InputError: the gold answer is empty.
    """
    return canonical(answer) == _spelled(gold, canonical, "a reference answer")


def _any_line(answer: str, gold: str, spell: Callable[[str], str]) -> bool:
    _spelled(gold, spell, "a reference answer, or several, one a line")
    return bool(answer) and answer in {spell(line) for line in gold.splitlines()}


def strict(answer: str, gold: str) -> bool:
    """Says whether an answer is, letter for letter, one of the gold answers.

    Args:
        answer: as returned by `read_strict`; "" is never right.
        gold: the reference answers, one a line.

    Raises:
        InputError: the gold answer is empty.
    """
    return _any_line(answer, gold, str.strip)


def text(answer: str, gold: str) -> bool:
    """Says whether an answer is one of the gold answers in normal spelling, as in SQuAD.

    Args:
        answer: as returned by `read_text`; "" is never right.
        gold: the reference answers, one a line.

    Raises:
        InputError: no gold answer has a letter or digit besides its articles.
    """
    return _any_line(answer, gold, normal_text)


def number(answer: str, gold: str) -> bool:
    """Says whether an answer has exactly the value of the gold answer.

    Args:
        answer: as returned by `read_number`; "" is never right.
        gold: has the reference number as its last.

    Raises:
        InputError: the gold answer has no number.
    """
    return answer == _spelled(gold, read_number, "a number")


def choice(answer: str, gold: str) -> bool:
    """Says whether an answer is the letter of the right choice.

    Args:
        answer: as returned by `read_choice`; "" is never right.
        gold: the letter.

    Raises:
        InputError: the gold answer is no letter.
    """
    return answer == _spelled(gold, read_choice, "the letter of a choice")


def latex(answer: str, gold: str) -> bool:
    """Says whether an answer is a formula equal to the gold answer, as math-verify sees it.

    Equal spellings are equal. Math-verify is asked about the others, but not about words, numbers
    in base 16 and what could keep it busy.

    Args:
        answer: as returned by `read_latex`; "" is never right.
        gold: the reference formula.

    Raises:
        InputError: the gold answer is empty, or math-verify is missing.
    """
    wanted = _spelled(gold, normal_latex, "a formula")
    if not answer or answer == wanted:
        return answer == wanted
    if any(_is_beyond(formula) for formula in (answer, wanted)):
        return False
    return _verify(answer, wanted)


def _is_beyond(formula: str) -> bool:
    """Whether math-verify should not be asked about a formula."""
    return (
        len(formula) > _LONGEST_FORMULA
        or re.fullmatch(r"[A-Za-z]{3,}", formula) is not None
        or _HEXADECIMAL.search(formula) is not None
        or _HUGE.search(formula) is not None
    )


def _verify(answer: str, gold: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError(needed("math-verify", "math")) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Its clock is a signal, which only the main thread can have.
    is_main = threading.current_thread() is threading.main_thread()
    seconds = _TIMEOUT_S if is_main else None
    sides = [parse(f"${side}$", parsing_timeout=seconds) for side in (gold, answer)]
    return bool(all(sides) and verify(*sides, timeout_seconds=seconds))


def needed(package: str, extra: str) -> str:
    """Says that a package is missing, and what installs it."""
    return f"{package} is not installed: expected it, pip install -e '.[{extra}]'"


def check_scorer(name: str) -> None:
    """Refuses an answer rule that cannot be used.

    Raises:
        InputError: There is none of that name, or its package is missing.
    """
    if name not in SCORERS:
        raise InputError(f"scorer is {name!r}, expected one of {', '.join(SCORERS)}")
    if name == "latex" and find_spec("math_verify") is None:
        raise InputError(needed("math-verify", "math"))


#: By answer rule, the same names as in haltwise.policy.answers.READERS.
SCORERS: dict[str, Scorer] = {
    "short": Scorer(short, _BOXED, _OPEN_BOX, "}"),
    "strict": Scorer(strict, _SAID, "Answer:", "\n"),
    "text": Scorer(text, _SAID, "Answer:", "\n"),
    "number": Scorer(number, _BOXED, _OPEN_BOX, "}"),
    "choice": Scorer(
        choice,
        r"Reason step by step and put the letter of the right choice in \boxed{}.",
        _OPEN_BOX,
        "}",
    ),
    "latex": Scorer(latex, _BOXED, _OPEN_BOX, "}"),
}
