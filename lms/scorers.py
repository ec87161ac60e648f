"""Scorers: how an LM is asked for an answer, and how its answer is compared with the gold answer.

Every answer rule of `haltwise.policy.answers.READERS` has a scorer. A rule needs none of its own in
`SCORERS` if two answers are equal whenever its reader reads the same from them.
"""

from __future__ import annotations

import json
import operator
import os
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from haltwise import InputError
from haltwise.errors import from_clone
from haltwise.policy.answers import READERS, canonical, normal_latex, normal_text
from haltwise.policy.answers.formulas import measure

_IN_A_BOX = r"Reason step by step and put the final answer in \boxed{}."
_AFTER_A_MARK = 'Reason step by step. End with "Answer:" and a short answer, on a line of its own.'
_OPEN_BOX = r"The final answer is \boxed{"

# Longer formulas are compared as they are spelled: they can take sympy minutes.
_LONGEST_FORMULA = 200
_TIMEOUT_S = 5
# What math-verify would take for a product of letters: a word, also a short one; letters that it
# does not know; and short words within a formula.
_WORD = re.compile(
    r"^(?:[^\W\d_]{3,}|a[dhmnst]|b[ey]|do|eh|go|h[aei]|i[dfnst]|la|m[aey]|no|o[fhknrx]|pa|so|to|"
    r"u[ps]|we)$|[^\W\d_A-Za-z]",
    re.IGNORECASE,
)
_RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,20}\*?\}")
_SHORT_WORDS = re.compile(
    "no|on|yes|not|all|any|one|two|six|ten|odd|am|pm|is|it|in|of|we|he|us|by|do|go|to|up|my|so|"
    "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun",
    re.IGNORECASE,
)
_TIME = re.compile(r"[0-9]:[0-5][0-9](?![0-9])")
_HEXADECIMAL = re.compile(r"\b0x", re.IGNORECASE)
# Large factorials and exponents, and powers of powers of numbers.
_HUGE = re.compile(
    r"[0-9]{3,}!|\^(?:\{[^{}A-Za-z]{0,9})?[0-9]{4,}|"
    r"\^(?:\{[^{}A-Za-z]{0,20}|[0-9]{1,9})\^(?!\{?[A-Za-z])"
)
_BASE = re.compile(r"(?<=[0-9])_\{?([0-9]+)")
_TUPLE = re.compile(r"\([^()\[\]]*,[^()\[\]]*\)")
_NO_BARE_LIST = re.compile(r"[()\[\]<>=]|\\(?:[{}]|[lg]eq?(?![a-z])|in(?![a-z])|cup|cap)")
_SET_SIGN = re.compile(r"\\(?:cup|cap)(?![A-Za-z])")


@dataclass(frozen=True)
class Scorer:
    """How one answer rule compares answers, and how it asks an LM for them."""

    compare: Callable[[str, str], bool]
    """Takes an answer as the rule has read it and the gold answer as it stands in the data; says
    whether the answer is right. An answer "" is never right."""
    instruction: str
    """The text that follows a question, to tell the LM in which form to answer."""
    cue: str
    """The words that follow the closed thought, to lead the LM to its answer."""
    answer_end: str
    """The text that ends a forced answer, see `haltwise.Halting.answer_end`."""
    agree: Callable[[str, str], bool] = operator.eq
    """Says whether two answers are equal, both as the rule has read them."""

    def __call__(self, answer: str, gold: str) -> bool:
        """Says whether an answer is right.

        Args:
            answer: The answer as the rule has read it; "" is never right.
            gold: The gold answer as it stands in the data.

        Raises:
            InputError: If the gold answer cannot be compared with anything.
        """
        return self.compare(answer, gold)


def _spelled(gold: str, spell: Callable[[str], str], expected: str) -> str:
    """Returns the gold answer in the spelling that right answers share.

    Raises:
        InputError: If it has no such spelling.
    """
    spelling = spell(gold)
    if not spelling:
        found = "cannot be compared" if canonical(gold) else "is empty"
        raise InputError(f"gold answer {gold!r} {found}: expected {expected}")
    return spelling


def short(answer: str, gold: str) -> bool:
    """Says whether an answer equals the gold answer, both in canonical spelling.

    Args:
        answer: The answer that `read_answer` has read; "" is never right.
        gold: The gold answer.

    Raises:
        InputError: If the gold answer is empty.
    """
    return canonical(answer) == _spelled(gold, canonical, "a reference answer")


def _any_line(answer: str, gold: str, spell: Callable[[str], str]) -> bool:
    _spelled(gold, spell, "a reference answer, or several, one a line")
    return bool(answer) and answer in {spell(line) for line in gold.splitlines()}


def strict(answer: str, gold: str) -> bool:
    """Says whether an answer is, letter for letter, one of the gold answers.

    Args:
        answer: The answer that `read_strict` has read; "" is never right.
        gold: The gold answers, one a line.

    Raises:
        InputError: If there is no gold answer.
    """
    return _any_line(answer, gold, lambda line: unicodedata.normalize("NFC", line).strip())


def text(answer: str, gold: str) -> bool:
    """Says whether an answer is one of the gold answers in normal spelling, as in SQuAD.

    Args:
        answer: The answer that `read_text` has read; "" is never right.
        gold: The gold answers, one a line.

    Raises:
        InputError: If no gold answer has a letter or digit besides its articles.
    """
    return _any_line(answer, gold, normal_text)


def _same_reading(rule: str, expected: str) -> Callable[[str, str], bool]:
    """Returns a comparison for answers that are equal if a rule reads the same from them.

    Args:
        rule: A key of `READERS`. An answer has been read by it; the gold answer is yet to be.
        expected: What the rule can read, for the message about a gold answer that it cannot.
    """

    def compare(answer: str, gold: str) -> bool:
        return answer == _spelled(gold, READERS[rule], expected)

    return compare


def latex(answer: str, gold: str) -> bool:
    r"""Says whether an answer is a formula equal to the gold answer, as math-verify sees it.

    Equal spellings are equal. Math-verify is asked about the others, but not about words, numbers
    in base 16, times of day and what could keep it busy. What a number measures may be left out,
    but not be another: 5\text{cm} is 5, and not 5\text{m}.

    Args:
        answer: The formula that `read_latex` has read; "" is never right.
        gold: The gold formula.

    Raises:
        InputError: If the gold answer is empty, or math-verify is missing.
    """
    wanted = _spelled(gold, normal_latex, "a formula")
    if not answer or answer == wanted:
        return answer == wanted
    (size, unit), (wanted_size, wanted_unit) = measure(answer), measure(wanted)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    size, wanted_size = _as_tuple(size, wanted_size), _as_tuple(wanted_size, size)
    if size == wanted_size or _parts(size) == _parts(wanted_size):
        return True
    if _says_otherwise(size, wanted_size):
        return False
    if any(map(_is_beyond, (size, wanted_size))) or _words(size) != _words(wanted_size):
        return False
    return _verify(size, wanted_size)


def _parts(formula: str) -> tuple[list[str], list[str]]:
    """Returns the sets that a formula unites or intersects, and the signs between them.

    The order of the sets does not matter if all signs are the same; math-verify knows that of
    intervals, but not of letters.
    """
    parts, signs = _SET_SIGN.split(formula), _SET_SIGN.findall(formula)
    is_flat = len(set(signs)) == 1 and not re.search(r"[()\\]", "".join(parts))
    return (sorted(part.strip() for part in parts) if is_flat else parts), signs


def _as_tuple(formula: str, other: str) -> str:
    """Returns a list in round brackets if the other formula is in them: then its order matters."""
    is_list = "," in formula and not _NO_BARE_LIST.search(formula)
    return f"({formula})" if is_list and _TUPLE.fullmatch(other) else formula


def _says_otherwise(one: str, other: str) -> bool:
    """Says whether two formulas differ in what math-verify passes over: the base, or the braces."""
    bases = _BASE.findall(one), _BASE.findall(other)
    if all(bases) and bases[0] != bases[1]:
        return True
    pairs = ((one, other), (other, one))
    return any(a.startswith((r"\{", r"\pm")) and _TUPLE.fullmatch(b) for a, b in pairs)


def _words(formula: str) -> list[str]:
    """Returns the words of a formula: math-verify takes their letters for factors."""
    runs = _RUN.findall(_ENVIRONMENT.sub("", formula))
    return sorted(run for run in runs if len(run) > 3 or _SHORT_WORDS.fullmatch(run))


def _is_beyond(formula: str) -> bool:
    """Says whether math-verify should not be asked about a formula."""
    return len(formula) > _LONGEST_FORMULA or any(
        pattern.search(formula) for pattern in (_WORD, _HEXADECIMAL, _TIME, _HUGE)
    )


class _Worker:
    """The process that runs math-verify, started when it is first asked, and anew once it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def are_equal(self, gold: str, answer: str) -> bool:
        """Says whether two formulas are equal; one that takes too long is not."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None and stdout is not None
            try:
                print(json.dumps([gold, answer]), file=stdin, flush=True)
                result = stdout.readline()
            except BrokenPipeError:  # It was killed while it waited.
                result = ""
            if not result:  # The time is over.
                self._process.wait()
                self._process.communicate()
                self._process = None
            return result == "true\n"

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("formula_worker.py")
        # -P: the modules beside the script are not to hide others.
        process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(_TIMEOUT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if process.stdout is None or process.stdout.readline() != "true\n":
            raise InputError("math-verify does not start: expected `import math_verify` to work")
        return process


_worker = _Worker()


def _forget_worker() -> None:
    global _worker
    _worker = _Worker()


# The child of a fork must not read its parent's answers.
os.register_at_fork(after_in_child=_forget_worker)


def _verify(answer: str, gold: str) -> bool:
    if not _has_math_verify():
        raise InputError(needed("math-verify", "math"))
    return _worker.are_equal(gold, answer)


def _has_math_verify() -> bool:
    return find_spec("math_verify") is not None


def needed(package: str, extra: str) -> str:
    """Returns a message that says that a package is missing, and what installs it."""
    return f"{package} is not installed: {from_clone(extra)}"


def check_scorer(name: str) -> None:
    """Refuses an answer rule that cannot be used.

    Raises:
        InputError: If there is no rule of that name, or the package that it needs is missing.
    """
    if name not in READERS:
        raise InputError(f"--scorer is {name!r}, expected one of {', '.join(READERS)}")
    if name == "latex" and not _has_math_verify():
        raise InputError(needed("math-verify", "math"))


@lru_cache(1 << 16)
def _are_equal_formulas(one: str, other: str) -> bool:
    """Says what `latex` does; traces are read several times, and math-verify takes milliseconds."""
    return latex(one, other)


#: The scorers of the answer rules that ask or compare in a way of their own, by the rule's name.
SCORERS: dict[str, Scorer] = {
    "short": Scorer(short, _IN_A_BOX, _OPEN_BOX, "}"),
    "strict": Scorer(strict, _AFTER_A_MARK, "Answer:", "\n"),
    "text": Scorer(text, _AFTER_A_MARK, "Answer:", "\n"),
    "number": Scorer(_same_reading("number", "a number"), _IN_A_BOX, _OPEN_BOX, "}"),
    "choice": Scorer(
        _same_reading("choice", "the letter of a choice"),
        r"Reason step by step and put the letter of the right choice in \boxed{}.",
        _OPEN_BOX,
        "}",
    ),
    "latex": Scorer(latex, _IN_A_BOX, _OPEN_BOX, "}", _are_equal_formulas),
}


def scorer_of(rule: str) -> Scorer:
    """Returns the scorer of an answer rule; a rule without one of its own compares readings.

    Args:
        rule: A key of `READERS`.
    """
    by_reading = _same_reading(rule, "a reference answer that the rule can read")
    return SCORERS.get(rule) or Scorer(by_reading, _AFTER_A_MARK, "Answer:", "\n")


def agreeing(rule: str) -> Callable[[str, str], bool]:
    """Returns what says whether two answers are equal, both as an answer rule has read them.

    Args:
        rule: A key of `READERS`.
    """
    return scorer_of(rule).agree
