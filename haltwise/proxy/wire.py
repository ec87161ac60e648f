"""What goes over the wire: server-sent events, and the chunks of a completion inside of them."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

Json = dict[str, Any]
#: HTTP headers as they are sent, in order; the names are in lower case.
RawHeaders = list[tuple[bytes, bytes]]

#: The media type of a stream of events.
EVENT_STREAM = "text/event-stream"

# No event of an honest server is longer.
_LONGEST_EVENT = 16 * 2**20
# Where a blank line may end, however its lines end.
_BLANK_LINES = (b"\n\n", b"\n\r", b"\r\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How some servers begin the texts of tokens that are no whole characters.
_BYTES_TEXT = "bytes:\\x"
# How llama-server calls the tokens that it has generated so far.
_DONE = "predicted_n"
#: How it calls the tokens of a prompt that its cache had, and those that it has computed.
PROMPT_PARTS = ("cache_n", "prompt_n")
_NAN = float("nan")
_MOST_DIGITS = 1000
# Log probabilities are none above 0, but for rounding.
_LARGEST_LOGPROB = 1e-3


class UpstreamError(Exception):
    """The upstream did not answer, or not as it should; `kind` says what happened, in a word."""

    def __init__(
        self,
        kind: str,
        message: str,
        status: int = 502,
        body: Json | None = None,
        answered: int | None = None,
        wait: float = 0.0,
    ) -> None:
        """Takes what happened, the status and the body that the client gets, and the upstream's.

        Args:
            kind: What happened, in a word.
            message: The same in a sentence.
            status: The status that the client gets.
            body: The body that it gets; None to make one of the message.
            answered: The upstream's status, if it answered with one.
            wait: Seconds for which the upstream does not want to be asked again.
        """
        super().__init__(message)
        self.wait = wait
        self.kind = kind
        self.status = status
        self.answered = answered
        self.body = body or error_body(message, "upstream_error")


def error_body(message: str, kind: str) -> Json:
    """An error in the form that OpenAI's clients read."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def json_object(
    data: bytes | str, decoder: type[json.JSONDecoder] = json.JSONDecoder
) -> Json | None:
    """The JSON object that some bytes or a text are; None if they are something else."""
    try:
        try:
            found = json.loads(data, cls=decoder)
        except json.JSONDecodeError:
            return None
        except ValueError:  # a number of thousands of digits, which others read
            found = json.loads(data, parse_int=_number_of_any_length)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number_of_any_length(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def json_bytes(value: Json, separators: tuple[str, str] = (", ", ": ")) -> bytes:
    """The bytes of a JSON object: numbers that JSON does not have are the nearest that it has."""
    try:
        return json.dumps(value, separators=separators, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), separators=separators).encode()


def _finite(value: Any) -> Any:
    """A JSON value whose numbers are finite; what is not a number is null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else math.copysign(sys.float_info.max, value)


@dataclass(slots=True)
class StreamEvent:
    """One event of a stream of server-sent events."""

    raw: bytes = b""
    """The event as it came, its blank line included; empty if it was changed or made here."""
    chunk: Json | None = None
    """The JSON object that it carries; None for a comment, and for the end."""

    @property
    def choice(self) -> Json | None:
        """The first choice of its chunk; None where it has none.

        Raises:
            UpstreamError: If it is malformed.
        """
        return None if self.chunk is None else choice_of(self.chunk)

    def encode(self) -> bytes:
        """The bytes that are sent to the client."""
        if self.raw:
            return self.raw
        return b"data: %b\n\n" % json_bytes(self.chunk or {}, (",", ":"))


#: What a stream that is whole ends with.
DONE = StreamEvent(b"data: [DONE]\n\n")


class EventReader:
    """Cuts a stream of bytes, in pieces of any length, into its events.

    If the bytes are a whole answer in place of a stream, its events are those that say the same.
    """

    def __init__(self) -> None:
        """Starts before the first byte."""
        self._rest: list[bytes] = []
        self._num_rest = 0
        self._last = b""  # bytes, with which a blank line may have begun
        self._is_whole: bool | None = None  # nobody knows yet

    def feed(self, data: bytes) -> Iterator[StreamEvent]:
        """Takes in the next piece of bytes; gives the events that it completes.

        Raises:
            UpstreamError: If an event is no JSON object, does not end, or is an error.
        """
        self._keep(data)
        if self._is_whole is None and (start := data.removeprefix(_BYTE_ORDER_MARK).lstrip()):
            self._is_whole = start.startswith(b"{")
        newest = self._last + data
        self._last = newest[-2:]
        # An event of many lines is put together once, and not anew at each of them.
        if self._is_whole or not any(line in newest for line in _BLANK_LINES):
            return
        data = b"".join(self._rest)
        half = b"\r" if data.endswith(b"\r") else b""  # of an end of line, perhaps
        if b"\r" in data:
            data = data.removesuffix(half).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = data.split(b"\n\n")
        self._rest, self._num_rest = [], 0
        self._keep(rest + half)
        yield from (_event(text) for text in events if text.strip(b"\n"))

    def end(self) -> Iterator[StreamEvent]:
        """Gives what is left once all bytes have come: an event without its blank line.

        Raises:
            UpstreamError: As `feed`.
        """
        if self._is_whole:
            data = b"".join(self._rest).removeprefix(_BYTE_ORDER_MARK)
            yield from _events_of_whole(_said(data))
        else:
            yield from self.feed(b"\n\n")

    def _keep(self, data: bytes) -> None:
        self._rest.append(data)
        self._num_rest += len(data)
        if self._num_rest > _LONGEST_EVENT:
            raise UpstreamError("malformed", "upstream sent an event that does not end")


def _event(text: bytes) -> StreamEvent:
    text = text.removeprefix(_BYTE_ORDER_MARK)
    lines = [line[5:] for line in text.split(b"\n") if line.startswith(b"data:")]
    data, raw = b"\n".join(lines).strip(), text + b"\n\n"
    if not data:
        return StreamEvent(raw)
    return DONE if data == b"[DONE]" else StreamEvent(raw, _said(data))


def _said(data: bytes) -> Json:
    """The JSON object that an upstream says.

    Bytes that are no UTF-8 are read as clients read them, and passed on as they are.

    Raises:
        UpstreamError: If it is none, or an error.
    """
    said = json_object(data.decode(errors="replace"))
    if said is None:
        raise UpstreamError("malformed", "upstream sent something that is no JSON object")
    if error := said.get("error"):
        message = "upstream sent an error"
        body = error_body(message, "upstream_error")  # it has every field that clients expect
        body["error"] |= error if isinstance(error, dict) else {"message": str(error)}
        code = body["error"]["code"]
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
        raise UpstreamError("said", message, status, body)
    return said


def _events_of_whole(answer: Json) -> Iterator[StreamEvent]:
    """The events of a stream that says what a whole answer does."""
    usage, choices = answer.pop("usage", None), answer.pop("choices", None)
    envelope = answer | {"object": "text_completion"}
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and isinstance(message := choice.pop("message", None), dict):
            envelope["object"] = "chat.completion.chunk"
            choice["delta"] = message | _numbered(message.get("tool_calls"))
    yield StreamEvent(chunk=envelope | {"choices": choices})
    if usage is not None:
        yield StreamEvent(chunk=envelope | {"choices": [], "usage": usage})
    yield DONE


def _numbered(calls: Any) -> Json:
    """The tool calls of a whole answer as a stream has them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return {}
    return {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}


# Chunks


def choices_of(chunk: Json) -> list[Json]:
    """All choices of a chunk.

    Raises:
        UpstreamError: If one is malformed.
    """
    choices = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        raise UpstreamError("malformed", "upstream sent a chunk whose choices are malformed")
    return choices


def _is_choice(choice: Any) -> bool:
    if isinstance(choice, dict) and choice.get("delta", {}) is None:
        choice["delta"] = {}  # nothing is added
    return isinstance(choice, dict) and isinstance(choice.get("delta", {}), dict)


def choice_of(chunk: Json) -> Json | None:
    """The first choice of a chunk, which is the only one of a watched thought; None without any.

    Raises:
        UpstreamError: If one is malformed.
    """
    return next(iter(choices_of(chunk)), None)


def index_of(choice: Json) -> int:
    """The number of a choice; 0 if it has none."""
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def has_others(chunk: Json) -> bool:
    """Whether a chunk has more than the one choice that was asked for, or another one.

    Raises:
        UpstreamError: If one is malformed.
    """
    choices = choices_of(chunk)
    return len(choices) > 1 or any(map(index_of, choices))


#: Where servers put the text of a thought.
REASONING_FIELDS = ("reasoning_content", "reasoning")


def texts_of(choice: Json) -> tuple[str, str]:
    """The text that a choice adds to the thought, if the server tells it apart, and to all else."""
    delta = choice.get("delta")
    if delta is None:
        return "", _text_of(choice.get("text"))
    thought = next((delta[name] for name in REASONING_FIELDS if delta.get(name)), "")
    return _text_of(thought), _text_of(delta.get("content"))


def says_more(choice: Json) -> bool:
    """Whether a choice has something beside its texts, like a tool call."""
    known = ("role", "content", *REASONING_FIELDS)
    return any(value for name, value in (choice.get("delta") or {}).items() if name not in known)


def replace_texts(choice: Json, thought: str, text: str) -> None:
    """Gives a choice other texts than those that `texts_of` finds."""
    part, own = (choice["delta"], "content") if "delta" in choice else (choice, "text")
    part.update({name: thought for name in REASONING_FIELDS if part.get(name)})
    if text or part.get(own):
        part[own] = text


def without_markers(text: str, marker: str) -> str:
    """An answer's text less the markers before it, which an LM writes where one was forced.

    Args:
        text: The text.
        marker: The marker; empty if the LM has none.
    """
    while marker and text.lstrip().startswith(marker):
        text = text.lstrip().removeprefix(marker).lstrip()
    return text


def may_become(text: str, *markers: str) -> bool:
    """Whether a text may be the beginning of a marker, or of the blanks before it."""
    return any(marker.startswith(text.strip()) and text.strip() != marker for marker in markers)


def _text_of(content: Any) -> str:
    """The text of a content, which may have parts."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


@dataclass(slots=True)
class ServedToken:
    """A generated token, as a server tells of it."""

    text: str
    logprob: float = _NAN
    """Log probability in nats; NaN if unknown."""
    top: list[float] | tuple[()] = ()
    """Log probabilities of the likeliest tokens in its place, in nats; empty if unknown."""
    id: int | None = None

    @property
    def is_shown(self) -> bool:
        """Whether the server has shown it, and not only counted it."""
        return bool(self.text) or self.id is not None or not math.isnan(self.logprob)


def tokens_of(choice: Json) -> list[ServedToken]:
    """The tokens of a choice, read from its log probabilities in either of their two forms.

    Without log probabilities those have no text whose ids are told, and there are no others. A
    number that is malformed is unknown, no error.
    """
    logprobs, ids = choice.get("logprobs"), choice.get("token_ids")
    if not isinstance(logprobs, dict):
        return [ServedToken("") for _ in ids] if isinstance(ids, list) else []
    content = logprobs.get("content")
    entries = content if isinstance(content, list) else _chat_entries(logprobs)
    return [_token(entry) for entry in entries if isinstance(entry, dict)]


def whole_texts(tokens: list[ServedToken], text: str) -> list[ServedToken]:
    """Tokens whose texts are that of their chunk, where their own are less.

    A token's own text may be a part of a character, or lack the blank before a word.

    Args:
        tokens: Those of a chunk; without any, its text counts as one.
        text: That of the chunk.
    """
    own = "".join(token.text for token in tokens)
    are_characters = "\ufffd" not in own and _BYTES_TEXT not in own
    if own == text and are_characters:
        return tokens
    if not tokens:
        return [ServedToken(text)]
    parts = _with_blanks(tokens, text) if are_characters else []
    if parts or (are_characters and len(own) >= len(text)):
        return parts or tokens
    return [*(replace(token, text="") for token in tokens[:-1]), replace(tokens[-1], text=text)]


def _with_blanks(tokens: list[ServedToken], text: str) -> list[ServedToken]:
    """Tokens with the blanks that a text has before them; none if it is another text.

    The last one may be the LM's end, which is no part of the text.
    """
    parts: list[ServedToken] = []
    start = 0
    for token in tokens:
        at = text.find(token.text, start)
        if at < 0 and start == len(text) and len(parts) == len(tokens) - 1:
            return [*parts, token]
        if at < 0 or text[start:at].strip():
            return []
        end = at + len(token.text)
        parts.append(replace(token, text=text[start:end]))
        start = end
    return [] if start < len(text) else parts


def served_tokens(choice: Json) -> list[ServedToken]:
    """The tokens of a choice with all that any server tells of them: whole texts, and their ids.

    A choice without log probabilities has one token, of which its text is known.
    """
    tokens, ids = whole_texts(tokens_of(choice), "".join(texts_of(choice))), choice.get("token_ids")
    if not isinstance(ids, list) or len(ids) != len(tokens):
        return tokens
    return [replace(token, id=i) for token, i in zip(tokens, ids, strict=True)]


def uncut(choice: Json, tokens: list[ServedToken]) -> list[ServedToken]:
    """Tokens of a choice with their whole texts, where llama-server was told a stop text.

    It cuts tokens there, and holds back what may become one. Among the likeliest tokens of their
    places they are whole, unless they are parts of characters.

    Args:
        choice: The choice.
        tokens: Its tokens, in order.
    """
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or len(entries) != len(tokens):
        return tokens
    whole = [_likely_text(entry) for entry in entries]
    return [
        token if text is None or "\ufffd" in text else replace(token, text=text)
        for token, text in zip(tokens, whole, strict=True)
    ]


def _likely_text(entry: Any) -> str | None:
    """The text of a token as it stands among the likeliest of its place; None if it does not."""
    top = entry.get("top_logprobs") if isinstance(entry, dict) else None
    for other in top if isinstance(top, list) else ():
        if isinstance(other, dict) and other.get("id") == entry.get("id") is not None:
            return str(other.get("token", ""))
    return None


def num_generated(chunk: Json) -> int:
    """How many tokens have been generated up to a chunk, as far as it tells; 0 if it does not."""
    told = [
        part.get(name)
        for part, name in ((chunk.get("usage"), "completion_tokens"), (chunk.get("timings"), _DONE))
        if isinstance(part, dict)
    ]
    return max((number for number in told if isinstance(number, int)), default=0)


def _token(entry: Json) -> ServedToken:
    top, token_id = entry.get("top_logprobs"), entry.get("id")
    others = top if isinstance(top, list) else ()
    return ServedToken(
        str(entry.get("token", "")),
        _logprob(entry.get("logprob")),
        [_logprob(other.get("logprob")) for other in others if isinstance(other, dict)],
        token_id if isinstance(token_id, int) else None,
    )


def _chat_entries(logprobs: Json) -> list[Json]:
    """The tokens of the form of completions, as the form of chat has them but for their bytes."""
    texts = logprobs.get("tokens")
    if not isinstance(texts, list):
        return []
    numbers, tops = (
        values if isinstance(values, list) and len(values) == len(texts) else [None] * len(texts)
        for values in (logprobs.get("token_logprobs"), logprobs.get("top_logprobs"))
    )
    pairs = (top.items() if isinstance(top, dict) else () for top in tops)
    return [
        _entry(text, number) | {"top_logprobs": [_entry(*pair) for pair in top]}
        for text, number, top in zip(texts, numbers, pairs, strict=True)
    ]


def _entry(text: Any, logprob: Any) -> Json:
    return {"token": text, "logprob": logprob, "bytes": None}


def _logprob(value: Any) -> float:
    number = _number(value)
    return number if number <= _LARGEST_LOGPROB else _NAN


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else _NAN
    except OverflowError:  # of hundreds of digits
        return _NAN


def trim_logprobs(logprobs: Any, num_top: int) -> None:
    """Cuts the likeliest tokens, in either form, to as many as the client asked for."""
    if not isinstance(logprobs, dict):
        return
    content, texts, tops = (logprobs.get(n) for n in ("content", "tokens", "top_logprobs"))
    for entry in content if isinstance(content, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("top_logprobs"), list):
            del entry["top_logprobs"][num_top:]
    if isinstance(texts, list) and isinstance(tops, list):
        logprobs["top_logprobs"] = [
            _likeliest(top, num_top, text) if isinstance(top, dict) else top
            for text, top in zip(texts, tops, strict=False)
        ]


def _likeliest(top: Json, num: int, text: Any) -> Json:
    """The likeliest entries, and the token's own beside them."""
    numbers = {name: _number(value) for name, value in top.items()}
    kept = sorted(numbers, key=lambda name: (numbers[name] != numbers[name], -numbers[name]))[:num]
    return {name: top[name] for name in top if name in kept or name == text}


def chat_logprobs(logprobs: Any) -> Any:
    """Log probabilities in the form of chat, whichever form they have."""
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("tokens"), list):
        return logprobs
    content = _chat_entries(logprobs)
    for entry in content:
        for told in (entry, *entry["top_logprobs"]):
            told["bytes"] = list(str(told["token"]).encode("utf-8", "surrogatepass"))
    return {"content": content}


# A stream put together


class WholeAnswer:
    """Puts the chunks of a stream together to the answer that a client without one expects."""

    def __init__(self) -> None:
        """Starts without a chunk."""
        self._answer: Json = {}
        self._choices: dict[int, _WholeChoice] = {}

    def add(self, chunk: Json) -> None:
        """Takes in the next chunk."""
        self._answer |= {k: v for k, v in chunk.items() if k != "choices" and v is not None}
        for choice in choices_of(chunk):
            self._choices.setdefault(index_of(choice), _WholeChoice()).add(choice)

    def answer(self, chat: bool) -> Json:
        """The whole answer, with a choice for each number that there was, and at least one."""
        choices = [self._choices[i] for i in sorted(self._choices)] or [_WholeChoice()]
        kind = "chat.completion" if chat else "text_completion"
        return self._answer | {"object": kind, "choices": [each.choice(chat) for each in choices]}


class _WholeChoice:
    """Puts one choice of a stream together."""

    def __init__(self) -> None:
        """Starts without anything."""
        self._choice: Json = {"index": 0}
        self._texts: Json = {}
        self._calls: dict[int, Json] = {}
        self._logprobs: Json = {}

    def add(self, choice: Json) -> None:
        """Takes in what the next chunk has of it."""
        for name, value in choice.items():
            if name not in ("delta", "text", "logprobs") and value is not None:
                self._choice[name] = value
        for name, value in (choice.get("delta") or {"text": choice.get("text")}).items():
            self._add_text(name, value)
        logprobs = choice.get("logprobs")
        for name, values in logprobs.items() if isinstance(logprobs, dict) else ():
            if isinstance(values, list):
                self._logprobs.setdefault(name, []).extend(values)

    def _add_text(self, name: str, value: Any) -> None:
        if name == "tool_calls":
            for call in value if isinstance(value, list) else (value,):
                if isinstance(call, dict):
                    _add_call(self._call_of(call), call)
        elif name == "role":
            self._texts[name] = value or self._texts.get(name, "assistant")
        elif value is not None:
            self._texts[name] = _grown(self._texts.get(name), value)

    def _call_of(self, part: Json) -> Json:
        """The tool call that a part belongs to; without an index, one with an id is a new one."""
        index = part.get("index")
        if not isinstance(index, int):
            index = max(self._calls, default=-1) + 1 if part.get("id") or not self._calls else None
        return self._calls.setdefault(max(self._calls) if index is None else index, {})

    def choice(self, chat: bool) -> Json:
        """The whole choice."""
        choice = {"finish_reason": None, "logprobs": self._logprobs or None} | self._choice
        if not chat:
            return choice | {"text": self._texts.get("text", "")}
        # Of a thought that was cut, no server streams a text; clients read one all the same.
        message: Json = {"role": "assistant", "content": ""} | self._texts
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
            message["content"] = message["content"] or None
        return choice | {"message": message}


def _add_call(call: Json, part: Json) -> None:
    """Adds a part to a tool call: the texts of its function grow, all else is told once."""
    function, more = call.setdefault("function", {}), part.get("function")
    for name, value in more.items() if isinstance(more, dict) else ():
        function[name] = _grown(function.get(name), "" if value is None else value)
    call |= {k: v for k, v in part.items() if k not in ("function", "index") and v}


def _grown(one: Any, more: Any) -> Any:
    """A value and what a stream adds to it: texts and lists grow, all else is told anew."""
    grows = isinstance(one, str | list) and type(one) is type(more)
    if grows or not more:
        return one + more if grows else more if one is None else one
    return more
