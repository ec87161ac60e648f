"""Words with which an LM takes back, doubts or checks what it has thought."""

import re
from collections.abc import Callable, Sequence

#: Whole words, in any case. The first and the last row are also the embedded LM's.
REFLECTIONS = (
    *("wait", "hmm", "but", "however", "alternatively", "maybe", "perhaps", "actually"),
    *("check", "checking", "recheck", "verify", "verifying"),
)

_WORD = re.compile(rf"\b(?:{'|'.join(REFLECTIONS)})\b", re.IGNORECASE)
# A word has at most so many tokens.
_CONTEXT = 8


def num_reflections(
    tokens: Sequence[int], num_new: int, decode: Callable[[Sequence[int]], str]
) -> int:
    """Reflection words in the newest tokens of a thought.

    A word that is cut by the border counts once it is whole. A token is decoded beside the tokens
    before it, since many tokenizers drop the blank at the start of a text.

    Args:
        tokens: The thought so far.
        num_new: How many of them are new.
        decode: Gives the text of tokens.
    """
    start = len(tokens) - num_new
    recent = tokens[max(start - _CONTEXT, 0) :]
    before = recent[: len(recent) - num_new]
    # What was a whole word may have gone on to be another one ("but", "button").
    return max(_count(decode(recent)) - _count(decode(before)), 0)


def _count(text: str) -> int:
    return len(_WORD.findall(text))
