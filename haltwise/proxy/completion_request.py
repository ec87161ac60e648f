"""What a client asked for: whether its thought can be halted, and what its answer is to hold."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from haltwise.proxy.wire import Json, RawHeaders
from haltwise.session.signal_collector import NUM_TOP

T = TypeVar("T")

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
    *("echo", "suffix", "post_sampling_probs", "n_probs"),
    *("return_token_ids", "return_tokens_as_token_ids"),
)
# Characters of a model's name; longer ones are no names.
_LONGEST_NAME = 1000
# Levels of a body; what is nested deeper can be read, but not written from everywhere.
_DEEPEST = 100
_MAX_TOKENS = ("max_completion_tokens", "max_tokens")
# llama-server's own limit, which it heeds before any other.
_N_PREDICT = "n_predict"
_NUMBERS = ("n", "best_of", "logprobs", "top_logprobs", *_MAX_TOKENS)


@dataclass(frozen=True)
class CompletionRequest:
    """A client's request for a completion.

    Nothing is known of the body but that it is a JSON object. Only `why_not_halted` takes every
    one; all else may be asked once that is None.
    """

    chat: bool
    """Whether it is for a chat completion."""
    body: Json
    """The body, as the client sent it."""
    headers: RawHeaders = field(default_factory=list)
    """Those of the client's headers that the upstream gets."""
    comes_in_turns: bool = False
    """Whether its thought is asked for piece by piece, see `haltwise.proxy.turns`."""
    chat_body: Json | None = None
    """The client's own body, if that is a chat's whose prompt has been rendered."""
    num_thoughts: int = 1
    """Most thoughts behind its answer, see `haltwise.proxy.voted_completion`."""
    _told: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    async def once(self, name: str, ask: Callable[[], Awaitable[T]]) -> T:
        """What the upstream tells of this request, which is asked until it has told it.

        Args:
            name: What is asked.
            ask: Asks it.

        Raises:
            UpstreamError: If the server does not tell.
        """
        if name not in self._told:
            self._told[name] = await ask()
        found: T = self._told[name]
        return found

    @property
    def shows_chat(self) -> bool:
        """Whether the client gets the answer in the form of a chat's."""
        return self.chat or self.chat_body is not None

    @property
    def asked_body(self) -> Json:
        """The client's own body."""
        return self.body if self.chat_body is None else self.chat_body

    @property
    def model(self) -> str:
        """The name of the model; empty if the client named none."""
        model = self.body.get("model")
        return model if isinstance(model, str) else ""

    @property
    def prompt(self) -> str:
        """The prompt of a completion that is none of a chat."""
        prompt = self.body["prompt"]
        return str(prompt[0] if isinstance(prompt, list) else prompt)

    @property
    def question(self) -> str:
        """What is asked, for a person to read: the texts of a chat, or the prompt."""
        if not self.shows_chat:
            return self.prompt
        contents = [message.get("content") for message in self.asked_body.get("messages") or ()]
        return "\n\n".join(filter(None, map(_text_of, contents)))

    @property
    def user(self) -> str:
        """Whom the client asks for, as it names its users; empty if it does not tell."""
        named = [self.body.get(name) for name in ("safety_identifier", "user")]
        return next((name for name in named if name and isinstance(name, str)), "")

    @property
    def streams(self) -> bool:
        """Whether the client wants a stream of events."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether the client wants to be told how many tokens it used."""
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
        found = [int(limit) for limit in self.fields_set(*_MAX_TOKENS).values()]
        return found[0] if found and found[0] >= 0 else None

    def why_not_halted(self) -> str | None:
        """Why this cannot be halted on any server; None if it can.

        What is malformed is for the server to refuse.
        """
        if self._is_malformed():
            return "malformed"
        body = self.body
        if (body.get("n") or 1) != 1:
            return "n is not 1"
        if (body.get("best_of") or 1) != 1:
            return "best_of"
        for name in _CHANGING:
            if body.get(name):
                return name
        return None if self.chat else _why_not_prompt(body.get("prompt"))

    def _is_malformed(self) -> bool:
        """Whether a field that the proxy reads is of a type that it cannot have."""
        body, messages = self.body, self.body.get("messages")
        numbers = self.fields_set(*_NUMBERS)
        return (
            _is_nested_deeper(body.values(), _DEEPEST)
            or any(not isinstance(number, int) for number in numbers.values())
            or any(numbers.get(name, 0) < 0 for name in ("logprobs", "top_logprobs"))
            or not isinstance(body.get("stream_options"), dict | None)
            or not all(isinstance(text, str | None) for text in self._stops)
            or len(self.model) > _LONGEST_NAME
            or not isinstance(body.get("model"), str | None)
            or not (_are_objects(messages) or (messages is None and not self.chat))
        )

    def is_stopped(self, choice: Json) -> bool:
        """Whether an answer ends with this choice because the client has named such an end.

        Some servers tell it; of others it is believed.
        """
        if choice.get("finish_reason") != "stop":
            return False
        if "stop_reason" in choice:
            return choice["stop_reason"] is not None
        return self.has_stops

    @property
    def has_stops(self) -> bool:
        """Whether the client has named a text or a token at which the answer is to end."""
        return any(self._stops) or bool(self.body.get("stop_token_ids"))

    @property
    def _stops(self) -> list[Any]:
        """The texts at which the answer is to end, as the client named them."""
        stops = self.body.get("stop")
        return stops if isinstance(stops, list) else [stops]

    def why_not_continued(self, close_text: str) -> str | None:
        """Why a second request cannot go on where the first was cut; None if it can.

        Args:
            close_text: What the first one's thought is closed with.
        """
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
        if any(text is not None and text in close_text for text in self._stops):
            return "stop"
        return "media" if any(map(_has_media, body.get("messages") or ())) else None

    def fields_set(self, *names: str) -> Json:
        """Those of some fields that the client set to something else than null."""
        return {name: self.body[name] for name in names if self.body.get(name) is not None}

    def watched_body(self, extra: Json, has_numbers: bool = True) -> Json:
        """The body of a request whose thought can be watched.

        Args:
            extra: Fields that the kind of server needs beside.
            has_numbers: Whether to ask for log probabilities.
        """
        options = self.body.get("stream_options")
        numbers = numbers_asked(self.chat, max(NUM_TOP, self.num_top or 0)) if has_numbers else {}
        streaming = {"stream": True, "stream_options": {**(options or {}), "include_usage": True}}
        return self.body | numbers | streaming | extra

    def continued_body(self, **changes: Any) -> Json:
        """The body of a request that goes on, less what its endpoint does not have.

        Args:
            changes: The prompt or the messages that it goes on from.
        """
        chat = "messages" in changes
        dropped = ("request_id", *(("prompt",) if chat else _OF_CHAT))
        body = {name: value for name, value in self.body.items() if name not in dropped}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.num_top is not None:
            body |= numbers_asked(chat, self.num_top)
        return body | changes

    def limited(self, num: int) -> "CompletionRequest":
        """The same request, that may generate so many tokens."""
        named = self.fields_set(*_MAX_TOKENS)
        is_heeded = bool(named) if self.chat else "max_tokens" in named
        told = ({} if is_heeded else {"max_tokens": None}) | named | self.fields_set(_N_PREDICT)
        is_less = {name: isinstance(one, int) and 0 < one < num for name, one in told.items()}
        return replace(self, body=self.body | {n: told[n] if is_less[n] else num for n in told})

    def of_prompt(self, rendered: str) -> "CompletionRequest":
        """The request for a completion that stands for this chat, by its prompt."""
        body = self.less_tokens(self.continued_body(prompt=rendered), 0)
        own = {name: self.body.get(name) for name in ("stream", "stream_options")}
        return replace(self, chat=False, body=body | own, chat_body=self.body, _told={})

    def why_not_several(self, close_text: str) -> str | None:
        """Why several thoughts cannot be asked for on any server; None if they can.

        Args:
            close_text: What a thought is closed with.
        """
        why_not = self.why_not_halted() or self.why_not_continued(close_text)
        alike = "a temperature of 0, where all thoughts are the same"
        return why_not or (alike if self.body.get("temperature") == 0 else None)

    def of_thought(self, number: int) -> "CompletionRequest":
        """The request for one of several thoughts, with a seed of its own if the client named one.

        Args:
            number: That of the thought, 0 for the first.
        """
        seed = self.body.get("seed")
        if type(seed) is not int or seed < 0:  # some servers take a negative one for any
            return self
        return replace(self, body=self.body | {"seed": seed + number})

    def less_tokens(self, body: Json, num_used: int) -> Json:
        """A body whose limits leave out the tokens that were generated already."""
        if self.max_tokens is not None:
            dropped = (*_MAX_TOKENS, _N_PREDICT)
            body = {name: value for name, value in body.items() if name not in dropped}
            body["max_tokens"] = max(self.max_tokens - num_used, 1)
        if isinstance(body.get("min_tokens"), int):
            body["min_tokens"] = max(body["min_tokens"] - num_used, 0)
        return body


def numbers_asked(chat: bool, num_top: int) -> Json:
    """The fields that ask for so many of the likeliest tokens."""
    return {"logprobs": True, "top_logprobs": num_top} if chat else {"logprobs": num_top}


def _is_nested_deeper(values: Iterable[Any], limit: int) -> bool:
    """Whether JSON values have lists and objects inside of each other on more levels."""
    level = list(values)
    for _ in range(limit):
        inner = (value for value in level if isinstance(value, list | dict))
        level = [x for each in inner for x in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _why_not_prompt(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list) or not prompt:
        return "malformed"
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return None
    return "token prompt" if isinstance(prompt[0], int) else "several prompts"


def _has_media(message: Json) -> bool:
    """Whether a message has a part that is no text."""
    content = message.get("content")
    return isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )


def _text_of(content: Any) -> str:
    """The text of a message's content, which may be in parts."""
    if isinstance(content, list):
        return "".join(_text_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
