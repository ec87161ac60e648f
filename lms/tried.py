"""What a dry run of an LM tells a person, whatever runs the LM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHOWN = 160


@dataclass(frozen=True)
class Tried:
    """What came of one question."""

    prompt: str
    """The LM's whole input; empty if a server takes messages alone."""
    text: str
    """All that it said, not halted."""
    answer: str
    """Its own answer, as it was read."""
    gold: str
    """The answer that it should have given."""
    is_right: bool
    """Whether it has."""
    finished: bool
    """Whether it ended by itself."""
    num_tokens: int
    """The number of tokens of its text."""
    forced: Sequence[str]
    """The forced answers, as they were read."""
    forced_text: str = ""
    """The whole of the first one; empty if that is not kept."""


def report(
    chat: str,
    close_text: str,
    tried: Sequence[Tried],
    warnings: Sequence[str] = (),
    begun: float | None = None,
) -> str:
    """Returns about ten lines for a person, and one for each warning.

    Args:
        chat: A description of how the LM is asked and how it thinks.
        close_text: The text that was appended to thoughts to force answers.
        tried: What came of each question, with one forced answer at least.
        warnings: Sentences about what may be wrong.
        begun: The share of the questions whose thought has begun, if that is known.
    """
    one = next(one for one in tried if one.forced)
    forced = [answer for each in tried for answer in each.forced]
    whole = f"{short(one.forced_text)}, " if one.forced_text else ""
    own = short(one.answer) + ("" if one.finished else " (cut)")
    shares = {} if begun is None else {"thought begun": begun}
    shares["ended by the LM"] = float(np.mean([each.finished for each in tried]))
    shares["right"] = float(np.mean([each.is_right for each in tried]))
    mean = np.mean([each.num_tokens for each in tried])
    lines = [
        chat,
        f"close text: {close_text!r}",
        *([f"prompt:     {short(one.prompt)}"] if one.prompt else []),
        f"goes on:    {short(one.text)}",
        f"forced:     {whole}read as {short(one.forced[0])}",
        f"own answer: {own}, gold {short(one.gold)}",
        f"{len(tried)} questions: "
        f"{', '.join(f'{name} {share:.0%}' for name, share in shares.items())}, "
        f"{mean:,.0f} tokens on average",
        f"{len(forced)} forced answers: {np.mean([bool(a) for a in forced]):.0%} could be read",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)])


def never_right(tried: Sequence[Tried]) -> list[str]:
    """Returns a warning if the LM is never right: then no head can learn what halting loses."""
    ended = [one for one in tried if one.finished]
    if not ended or any(one.is_right for one in ended):
        return []
    one = ended[0]
    return [
        f"none of {len(ended)} full answers is right, such as {short(one.answer)} where "
        f"{short(one.gold)} was expected: see whether --scorer reads what the LM writes, "
        "and whether the LM can answer such questions at all"
    ]


def misspelt(close_text: str, back: str) -> list[str]:
    """Returns a warning if the LM's tokens spell another close text.

    Args:
        close_text: The close text.
        back: What its tokens spell.
    """
    # Tokenizers that split at blanks keep none of them.
    if "".join(back.split()) == "".join(close_text.split()):
        return []
    return [f"the tokens of the close text {close_text!r} read {back!r}: the LM sees another text"]


def short(text: str) -> str:
    """Returns a text as Python writes it, without its middle if it is long."""
    shown = repr(text)
    if len(shown) <= _SHOWN:
        return shown
    return f"{shown[: _SHOWN // 2]} ... {shown[-_SHOWN // 2 :]}"
