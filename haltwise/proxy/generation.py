"""What an LM says to one request: its tokens, how it ended, and the forced answer that it is."""

import math
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass, field, replace

from haltwise.proxy.dialect import NO_SUCH_PATH, text_of
from haltwise.proxy.upstream import UpstreamLeg
from haltwise.proxy.wire import (
    DONE,
    ServedToken,
    StreamEvent,
    UpstreamError,
    json_object,
    num_generated,
    served_tokens,
    texts_of,
    uncut,
)
from haltwise.session.thought import ForcedAnswer

# How servers call the end of an answer that the LM has ended, and of one that they break off.
_ENDED_BY_LM = ("stop", "eos", "eos_token")
_BROKEN_OFF = ("abort", "error", "cancelled")
# Characters of a server's own message that fit into a line.
_LONGEST_SAID = 200


@dataclass
class ServedGeneration:
    """What the LM has said to one request."""

    tokens: list[ServedToken] = field(default_factory=list)
    """Its tokens, in order. One that ends what the LM says has no text, and neither has one that
    the server has only counted, such as a part of a character."""
    ended_by_lm: bool = False
    """Whether the LM has ended it, and not a limit."""
    num_apart: int = 0
    """Tokens that the server has told apart as a thought; they come first."""
    num_hidden: int = 0
    """Tokens of these that stand at the end, though nobody knows where they were."""
    is_stopped: bool = False
    """Whether a text has ended it that the server was told to end it at."""

    @property
    def forced_answer(self) -> ForcedAnswer:
        """What was said, as a forced answer."""
        tokens = self.tokens[: len(self.tokens) - self.ended_by_lm]
        logprobs = [token.logprob for token in tokens]
        known = [] if any(map(math.isnan, logprobs)) else logprobs
        return ForcedAnswer([token.text for token in tokens], known, len(self.tokens))


async def read_generation(
    leg: AsyncIterable[StreamEvent],
    max_tokens: int,
    is_complete: Callable[[list[ServedToken]], bool],
    stop: str = "",
) -> ServedGeneration:
    """Reads a stream to its end, or to where nothing more is wanted if its server goes on there.

    Args:
        leg: The stream.
        max_tokens: The most tokens that it may have.
        is_complete: Tells whether nothing is wanted behind some tokens.
        stop: The text at which the server was told to end it, if it was.

    Raises:
        UpstreamError: If it breaks off or is malformed, or neither the LM nor a limit ends it.
    """
    tokens: list[ServedToken] = []
    complete: list[ServedToken] | None = None
    finish, num_told, num_apart, last_text, is_over = "", 0, 0, "", False
    async for event in leg:
        is_over |= event is DONE
        num_told = max(num_told, num_generated(event.chunk or {}))
        choice = event.choice
        if choice is None:
            continue
        new, texts = served_tokens(choice), texts_of(choice)
        new = uncut(choice, new) if stop else new
        if new:
            last_text = "".join(texts)
            tokens += [ServedToken("")] * (num_told - len(tokens) - len(new))
        tokens += new
        num_apart = len(tokens) if texts[0] else num_apart
        finish = choice.get("finish_reason") or finish
        if complete is None and is_complete(tokens):
            complete = tokens.copy()
        if complete is not None and not stop:
            break
    if complete is not None:
        return ServedGeneration(complete)
    if not (finish or is_over) or finish in _BROKEN_OFF:
        raise UpstreamError("cut", "upstream broke off its answer")
    if stop and finish in _ENDED_BY_LM and stop in text_of(tokens):
        return ServedGeneration(tokens, is_stopped=True)
    whole = _whole(tokens, finish, max(num_told, len(tokens)), last_text, max_tokens)
    return replace(whole, num_apart=num_apart)


def _whole(
    tokens: list[ServedToken], finish: str, num: int, last_text: str, max_tokens: int
) -> ServedGeneration:
    """An answer that is whole, its end token without text.

    Args:
        tokens: Those that were shown.
        finish: Why it has ended, in the server's word; empty if it tells none.
        num: The number of tokens that were generated.
        last_text: The text of the last chunk that had tokens.
        max_tokens: The most tokens that it may have.

    Raises:
        UpstreamError: If neither the LM nor the limit has ended it.
    """
    by_lm = finish in _ENDED_BY_LM or (not finish and num < max_tokens)
    if not by_lm and num < max_tokens:
        raise UpstreamError(
            "short",
            f"the server gave {num} tokens without an end ({finish!r}), expected {max_tokens}, "
            "or the LM's end before: its context may be too small for --max-tokens",
        )
    num_hidden = num - len(tokens)
    counted = [ServedToken("")] * num_hidden
    if by_lm and tokens and (not last_text or not last_text.endswith(tokens[-1].text)):
        tokens[-1] = replace(tokens[-1], text="")  # shown, but no part of the text
    elif by_lm and num_hidden:
        num_hidden -= 1  # the end itself
    return ServedGeneration([*tokens, *counted], by_lm, num_hidden=num_hidden)


async def refusal(path: str, leg: UpstreamLeg) -> UpstreamError:
    """What a server says that does not answer with a stream.

    Args:
        path: What was asked.
        leg: The answer.
    """
    status, wait, data = leg.response.status_code, leg.wait, await leg.body()
    if status in NO_SUCH_PATH:
        told = f"{path} was answered with {status}: expected a server that goes on from a "
        told += "prompt, and not of chats alone"
        return UpstreamError("status", told, answered=status, wait=wait)
    found = json_object(data)
    if found is None:
        text = data.decode(errors="replace")
        told = f"{path} was answered with {status} and no JSON: {text!r:.{_LONGEST_SAID}}"
        return UpstreamError("malformed", told, answered=status, wait=wait)
    error = found.get("error", found)
    said = str(error.get("message", error) if isinstance(error, dict) else error)
    told = f"{path} was answered with {status}: {said:.{_LONGEST_SAID}}"
    return UpstreamError("status", told, answered=status, wait=wait)
