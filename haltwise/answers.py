"""Reading the answer that an LM gives after its thought: the same in training and in serving."""

from __future__ import annotations

import re
from collections.abc import Callable

_BOXED = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _boxed(text: str) -> str | None:
    """Returns what is in the last boxed{...}, braces balanced; None if there is none."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for i in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[starts[-1] : i]
    return None


def canonical(answer: str) -> str:
    """Returns the one spelling that equal answers share.

    Case, outer blanks, dollar signs, a final full stop and runs of blanks do not matter; a number
    loses its thousands separators, plus sign, leading zeros and empty decimals. Nothing is
    calculated: 1/2 and 0.5 stay different.
    """
    text = " ".join(answer.replace("\u2212", "-").casefold().split()).strip(" $.")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    number = re.fullmatch(r"([-+]?)0*(\d+)(?:\.(\d*?)0*)?", text)
    if number is None:
        return text
    sign, whole, decimals = number.groups()
    size = f"{whole}.{decimals}" if decimals else whole
    return f"-{size}" if sign == "-" and size != "0" else size


def read_answer(text: str) -> str:
    """Reads the answer from the text generated after the close text.

    The last boxed answer counts; without one the last number; without one a single word.

    Args:
        text: decoded, without special tokens.

    Returns:
        The canonical answer, or "" if none can be read.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return canonical(boxed)
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    if numbers:
        return canonical(numbers[-1].rstrip(","))
    words = text.split()
    return canonical(words[0]) if len(words) == 1 else ""


#: By answer rule: reads an answer from a text, "" if there is none.
READERS: dict[str, Callable[[str], str]] = {"short": read_answer}
