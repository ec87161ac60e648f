"""llama-server's native endpoint: it tells the ids of tokens without their log probabilities.

These cost llama-server a pass over its whole vocabulary at every token.
"""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx2

from haltwise.proxy.upstream import UpstreamLeg
from haltwise.proxy.wire import DONE, Json, StreamEvent

#: Its path.
NATIVE_PATH = "/completion"
# Other names of the fields of a completion.
_RENAMED = {"max_tokens": "n_predict", "logprobs": "n_probs"}


def native_body(body: Json) -> Json:
    """The body that asks the native endpoint for the same as the body of a completion."""
    named = {_RENAMED.get(name, name): value for name, value in body.items()}
    return named | {"return_tokens": True}


class NativeLeg(UpstreamLeg):
    """An answer of the native endpoint, whose events are those of a completion.

    Args:
        response: The answer, whose headers have come.
        model: The model's name, which the endpoint does not tell.
    """

    def __init__(self, response: httpx2.Response, model: str) -> None:
        """Reads nothing of the body yet."""
        super().__init__(response)
        name, now = f"cmpl-{secrets.token_hex(16)}", int(time.time())
        own = {"id": name, "object": "text_completion", "created": now, "model": model}
        self._envelope: Json = own

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        async with aclosing(super()._read()) as events:
            async for event in events:
                if event.chunk is None or event.chunk.get("choices"):
                    yield event
                    continue
                yield StreamEvent(chunk=self._envelope | completion_chunk(event.chunk))
                if event.chunk.get("stop") is True:
                    yield DONE
                    return


def completion_chunk(told: Json) -> Json:
    """A chunk of the native endpoint as a completion has it, with the ids of its tokens."""
    ids, probs = told.get("tokens"), told.get("completion_probabilities")
    choice: Json = {
        "index": told.get("index", 0),
        "text": told.get("content"),
        "finish_reason": None,
    }
    choice["logprobs"] = {"content": probs} if probs else None
    choice |= {"token_ids": ids} if isinstance(ids, list) else {}
    chunk: Json = {"choices": [choice]}
    if told.get("stop") is True:
        choice["finish_reason"] = "length" if told.get("stop_type") == "limit" else "stop"
        chunk["usage"] = _usage(told)
    return chunk | ({"timings": told["timings"]} if "timings" in told else {})


def _usage(told: Json) -> Json:
    """The usage that the last chunk tells, as far as it does."""
    timings = told.get("timings")
    cached = timings.get("cache_n") if isinstance(timings, dict) else None
    named = {"prompt_tokens": "tokens_evaluated", "completion_tokens": "tokens_predicted"}
    usage: Json = {name: told[own] for name, own in named.items() if isinstance(told.get(own), int)}
    usage["total_tokens"] = sum(usage.values())
    return usage | ({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}})
