"""What a client asked for: what its completion may be halted with, and what it is to get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from haltwise.proxy.wire import Json
from haltwise.session.token_statistics import NUM_TOP

_STRUCTURED = (
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("json_schema", "regex", "ebnf", "grammar", "format"),
)
# Fields that only chat has.
_OF_CHAT = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("response_format", "chat_template", "chat_template_kwargs", "reasoning_effort", "reasoning"),
    *("max_completion_tokens", "top_logprobs", "logprobs", "modalities", "store", "metadata"),
    *("add_generation_prompt", "continue_final_message", "separate_reasoning", "reasoning_format"),
)
# What changes how an answer tells of its tokens.
_CHANGING = (
    *("echo", "suffix", "post_sampling_probs"),
    *("return_token_ids", "return_tokens_as_token_ids"),
)
# Of a model; longer ones are no names.
_LONGEST_NAME = 1000
_MAX_TOKENS = ("max_completion_tokens", "max_tokens")
_NUMBERS = ("n", "best_of", "logprobs", "top_logprobs", *_MAX_TOKENS)


@dataclass(frozen=True)
class Asked:
    """A request for a completion."""

    chat: bool
    """Whether it is one of a chat."""
    body: Json
    """As the client sent it."""

    @property
    def path(self) -> str:
        """Where it goes."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def prompt(self) -> str:
        """Of a completion that is none of a chat."""
        prompt = self.body["prompt"]
        return str(prompt[0] if isinstance(prompt, list) else prompt)

    @property
    def streams(self) -> bool:
        """Whether the client wants events."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether the client wants to be told what it used."""
        options = self.body.get("stream_options")
        return not self.streams or bool(options and options.get("include_usage"))

    @property
    def num_top(self) -> int | None:
        """The likeliest tokens that the client wants to see; None if it wants no numbers at all."""
        wanted = self.body.get("logprobs")
        if self.chat:
            return int(self.body.get("top_logprobs") or 0) if wanted else None
        return None if wanted is None or wanted is False else int(wanted)

    @property
    def max_tokens(self) -> int | None:
        """Tokens that may be generated; None if the client set no limit, or -1 for none."""
        found = [int(limit) for limit in self.named(*_MAX_TOKENS).values()]
        return found[0] if found and found[0] >= 0 else None

    def why_not(self) -> str | None:
        """Why this cannot be halted on any server; None if it can.

        What is malformed is for the server to refuse.
        """
        body = self.body
        options, stop = body.get("stream_options"), body.get("stop")
        stops = stop if isinstance(stop, list) else [stop]
        if (
            any(not isinstance(number, int) for number in self.named(*_NUMBERS).values())
            or not isinstance(options, dict | None)
            or not all(isinstance(text, str | None) for text in stops)
            or any(number < 0 for number in self.named("logprobs", "top_logprobs").values())
            or len(str(body.get("model"))) > _LONGEST_NAME
        ):
            return "malformed"
        if (body.get("n") or 1) != 1:
            return "n is not 1"
        if (body.get("best_of") or 1) != 1:
            return "best_of"
        for name in _CHANGING:
            if body.get(name):
                return name
        if not self.chat:
            return _why_not_prompt(body.get("prompt"))
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            return "malformed"
        return None

    def why_not_continued(self, close_text: str) -> str | None:
        """Why a second request cannot go on where the first was cut; None if it can."""
        body = self.body
        form = body.get("response_format")
        if body.get("tools") or body.get("functions"):
            return "tools"
        if any(body.get(name) for name in _STRUCTURED) or (
            isinstance(form, dict) and form.get("type") != "text"
        ):
            return "structured output"
        if body.get("include_reasoning") is False:
            return "hidden reasoning"
        stop = body.get("stop") or []
        if any(text in close_text for text in ([stop] if isinstance(stop, str) else stop)):
            return "stop"
        return "media" if any(map(_has_media, body.get("messages") or ())) else None

    def named(self, *names: str) -> Json:
        """Those of some fields that the client set."""
        return {name: self.body[name] for name in names if self.body.get(name) is not None}

    def watched(self, extra: Json) -> Json:
        """The body of a request whose tokens can be watched."""
        options = self.body.get("stream_options")
        num_top = max(NUM_TOP, self.num_top or 0)
        numbers: Json = {"logprobs": num_top}
        if self.chat:
            numbers = {"logprobs": True, "top_logprobs": num_top}
        streaming = {"stream": True, "stream_options": {**(options or {}), "include_usage": True}}
        return self.body | numbers | streaming | extra

    def continued(self, **changes: Any) -> Json:
        """The body of a request that goes on, less what its endpoint does not have.

        Args:
            changes: The prompt or the messages that it goes on from.
        """
        chat = "messages" in changes
        dropped = ("request_id", *(("prompt",) if chat else _OF_CHAT))
        body = {name: value for name, value in self.body.items() if name not in dropped}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.num_top is not None:
            numbers = {"logprobs": True, "top_logprobs": self.num_top}
            body |= numbers if chat else {"logprobs": self.num_top}
        return body | changes

    def less(self, body: Json, num_used: int) -> Json:
        """A body with limits that leave out tokens that were generated already."""
        if self.max_tokens is not None:
            body = {name: value for name, value in body.items() if name not in _MAX_TOKENS}
            body["max_tokens"] = max(self.max_tokens - num_used, 1)
        if isinstance(body.get("min_tokens"), int):
            body["min_tokens"] = max(body["min_tokens"] - num_used, 0)
        return body


def _why_not_prompt(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list) or not prompt:
        return "malformed"
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return None
    return "token prompt" if isinstance(prompt[0], int) else "several prompts"


def _has_media(message: Any) -> bool:
    """Whether a message has a part that is no text."""
    content = message.get("content")
    return isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )
