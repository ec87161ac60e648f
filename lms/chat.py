"""How an LM is asked and how it thinks: seen in what its tokenizer's chat template renders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import TemplateError

from haltwise import InputError
from haltwise.errors import each_once, json_fault, reason_of, what_failed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The pairs of texts with which LMs open and close their thoughts.
MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)

# The errors that templates raise about messages that they refuse, or stumble over.
_REFUSALS = (
    *(TemplateError, TypeError, LookupError, AttributeError, ValueError),
    *(ArithmeticError, RecursionError, MemoryError),
)
_QUESTION, _THOUGHT, _ANSWER = "HALTWISE-QUESTION", "HALTWISE-THOUGHT", "HALTWISE-ANSWER"
# Has what a template may change: letters of both cases, and a sign that HTML has other words for.
_ASKED = "Is 3 < 4?"

#: One turn of a chat, with the keys "role" and "content".
Message = dict[str, str]


class ChatTemplate(Protocol):
    """What makes one text of the messages of a chat."""

    @property
    def text(self) -> str:
        """The template itself, or what it makes of a question; empty if there is none."""

    @property
    def bos(self) -> str:
        """The text that has to stand first where there is no template; it may be empty."""

    def render(self, messages: list[Message], is_open: bool, thinking: bool) -> str:
        """Returns the text of messages.

        Args:
            messages: The messages.
            is_open: Whether the LM's own turn is to follow.
            thinking: Whether the LM is to think in it, where the template lets one choose.

        Raises:
            ValueError: If the template refuses them, or one of the other `REFUSALS`.
        """

    def shown(self, text: str) -> str:
        """Returns a text as it reads in what `render` returns: some servers tell that as tokens."""

    def own_token(self, text: str) -> int | None:
        """Returns the token that a text begins with, if it is one that no plain text contains."""


@dataclass(frozen=True)
class TokenizerTemplate:
    """The `ChatTemplate` that a tokenizer has."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer."""

    @property
    def text(self) -> str:
        """The template itself; empty if there is none."""
        template = self.tokenizer.chat_template
        with suppress(ValueError):  # several, of which none is the usual one: none can be rendered
            template = template and self.tokenizer.get_chat_template()
        return str(template or "")

    @property
    def bos(self) -> str:
        """The text of the token that the tokenizer itself puts first; empty if it puts none."""
        first = self.tokenizer.encode("")[:1]
        is_added = first == [self.tokenizer.bos_token_id]
        return str(self.tokenizer.bos_token) if is_added else ""

    def shown(self, text: str) -> str:
        """Returns the text itself: a template is rendered as one."""
        return text

    def render(self, messages: list[Message], is_open: bool, thinking: bool) -> str:
        """Returns the text of messages; see `ChatTemplate.render`."""
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_open, **thinking_switch(thinking)
        )
        return str(rendered)

    def own_token(self, text: str) -> int | None:
        """Returns the token that a text begins with, if it is an added one."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens[0] if tokens and tokens[0] in self.tokenizer.added_tokens_decoder else None


def thinking_switch(thinking: bool) -> dict[str, Any]:
    """Returns the names by which templates let an LM think, or not; others look at neither."""
    return {"enable_thinking": thinking, "thinking": thinking}


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """What a person may say about an LM's chat; the rest is detected."""

    think_start: str | None = None
    """The text after which a thought begins. Empty, together with --think-end, for an LM that
    reasons in the open. Default: detected from the chat template."""
    think_end: str | None = None
    """The text with which the LM itself closes a thought. Default: detected from the chat
    template."""
    system: str = ""
    """A system message that is put before every question."""
    examples: Path | None = None
    """A file of worked examples that are put before every question, as JSON lines of the form
    {"user": TEXT, "assistant": TEXT}."""

    def before(self) -> tuple[Message, ...]:
        """Returns the messages that stand before every question.

        Raises:
            InputError: If the file of examples cannot be read, or a line of it is no example.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, turn in _turns(self.examples):
            is_turn = isinstance(turn, dict) and turn.keys() == {"user", "assistant"}
            if not is_turn or not all(isinstance(text, str) for text in turn.values()):
                raise InputError(
                    f'{self.examples}, line {number}: expected {{"user": TEXT, "assistant": TEXT}}'
                )
            told = ({"role": role, "content": turn[role]} for role in ("user", "assistant"))
            messages += told
        return tuple(messages)


@dataclass(frozen=True, kw_only=True)
class RecordedChat(ChatConfig):
    """What a recording says about an LM's chat; what it does not say is detected."""

    messages: tuple[Message, ...] = ()
    """The messages that stood before every question."""

    @classmethod
    def of(cls, recorder: Mapping[str, Any]) -> RecordedChat:
        """Returns what the `haltwise.recorder` metadata of traces say."""
        return cls(
            think_start=recorder.get("think_start"),
            think_end=recorder.get("think_end"),
            messages=tuple(recorder.get("messages", ())),
        )

    def before(self) -> tuple[Message, ...]:
        """Returns the messages that stood before every question."""
        return self.messages


@dataclass(frozen=True)
class Chat:
    """How an LM is asked, and how it thinks and answers."""

    template: ChatTemplate
    """What makes one text of messages."""
    think_start: str
    """The text after which a thought begins; empty if the LM reasons in the open."""
    think_end: str
    """The text with which the LM itself closes a thought; empty if it reasons in the open."""
    close_mark: str
    """The text that closes a thought, blanks included: an answer, or its cue, comes next."""
    before: tuple[Message, ...] = ()
    """The messages that stand before every question: the system message, and examples."""
    turn_end: int | None = None
    """The token that the template puts behind an LM's answer; None if it has no such token."""

    def prompt(self, text: str) -> str:
        """Returns the LM's whole input for what a user asks; without a template a line of text.

        Args:
            text: What the user asks, with its instruction.

        Raises:
            InputError: If the template refuses the messages.
        """
        if not self.template.text:
            return f"{self.template.bos}{text}\n"
        messages = self.messages(text)
        try:
            # An LM that is said to reason in the open is not asked to think.
            return self.template.render(messages, True, bool(self.think_start))
        except _REFUSALS as error:
            roles = " and a ".join(dict.fromkeys(message["role"] for message in messages))
            reason = reason_of(error)
            raise InputError(f"the chat template refuses a {roles} message: {reason}") from None

    def messages(self, text: str) -> list[Message]:
        """Returns the messages in which the LM is asked what a user asks."""
        return [*self.before, {"role": "user", "content": text}]

    def describe(self) -> str:
        """Returns three lines for a person.

        They tell how the LM is asked, where its thoughts begin and end, and what closes them.
        """
        prompt = self.prompt(_QUESTION)
        how = "chat template" if self.template.text else "no chat template"
        if not self.think_start:
            thought = "in the open, from the prompt's end; the LM has no think markers"
        elif prompt.rstrip().endswith(self.think_start):
            thought = f"opened by the prompt; the LM closes it with {self.think_end!r}"
        else:
            thought = f"the LM opens it with {self.think_start!r} and closes it with "
            thought += repr(self.think_end)
        return (
            f"asked:      {how}, behind a question stands {prompt.rpartition(_QUESTION)[2]!r}\n"
            f"thought:    {thought}\n"
            f"closed by:  {self.close_mark!r}"
        )


@dataclass(frozen=True)
class _RenderedChat:
    """What a chat template makes of a question, and of an answer with a thought.

    All texts are empty if there is no template or it refuses the question.
    """

    template: str = ""
    """The template itself."""
    prompt: str = ""
    """The question as the LM reads it, up to where the LM goes on."""
    before: str = ""
    """All that stands before the thought; empty if the template drops the thought."""
    between: str = ""
    """What stands between the thought and the answer."""
    after: str = ""
    """What follows the answer."""


def detect_chat(tokenizer: PreTrainedTokenizerBase, config: ChatConfig) -> Chat:
    """Detects an LM's chat from its tokenizer, as `chat_of` does from a template.

    Raises:
        InputError: As `chat_of`.
    """
    return chat_of(TokenizerTemplate(tokenizer), config)


def chat_of(template: ChatTemplate, config: ChatConfig) -> Chat:
    """Detects an LM's chat from its template; what the config states is taken as it is.

    A pair of `MARKERS` is the LM's if its template ends the prompt with the first, tells of both
    in the prompt, puts a thought between them, or strips the second where both have tokens of
    their own, unless it closes the thought in the prompt. A vocabulary alone says nothing: LMs
    that never think share it with those that do.

    Raises:
        InputError: If only one think marker is stated, the template refuses a question, or there
            is no place for the messages that stand before every question.
    """
    stated = (config.think_start, config.think_end)
    if bool(stated[0]) != bool(stated[1]) or (None in stated and stated != (None, None)):
        raise InputError(
            f"--think-start is {stated[0]!r} and --think-end {stated[1]!r}, "
            "expected both, both empty, or none"
        )
    sample = _rendered_chat(template)
    start, end = stated
    if start is None or end is None:
        start, end = _markers(template, sample)
    after = sample.after.strip()
    chat = Chat(
        template,
        start,
        end,
        _close_mark(sample, start, end),
        config.before(),
        template.own_token(after) if after else None,
    )
    _check_before(chat)
    return chat


def _check_before(chat: Chat) -> None:
    """Refuses messages that the LM would not see, and a question that it would not.

    Raises:
        InputError: If there is no template, or it does not show one of them as it is.
    """
    if chat.before and not chat.template.text:
        raise InputError("no chat template: no place for --system or --examples")
    prompt = chat.prompt(_ASKED)
    for message in chat.messages(_ASKED):
        content = message["content"].strip()
        seen = content if content in prompt else chat.template.shown(content).strip()
        if content and (not seen or seen not in prompt):
            often = " (earlier thoughts are often dropped)" * (message["role"] == "assistant")
            raise InputError(
                f"the chat template drops or changes the {message['role']} message "
                f"{content[:40]!r}: expected one that it shows as it is{often}"
            )


def _turns(path: Path | None) -> list[tuple[int, Any]]:
    """Returns what the lines of a file of JSON lines hold, by number; nothing if there is no file.

    Raises:
        InputError: If the file cannot be read, or has no lines.
    """
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"--examples: {what_failed(error)}, expected JSON lines") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--examples: {path}: {error}: expected text in UTF-8") from None
    turns = []
    for number, line in enumerate(lines, 1):
        try:
            turn = line.strip() and json.loads(line, object_pairs_hook=each_once)
            turns += [(number, turn)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            told = f"{json_fault(error)}: expected a JSON object"
            raise InputError(f"{path}, line {number}: {told}") from None
    if not turns:
        raise InputError(f"{path} is empty, expected JSON lines of user and assistant")
    return turns


def _markers(template: ChatTemplate, sample: _RenderedChat) -> tuple[str, str]:
    """Returns the pair of `MARKERS` that is the LM's, by the rules of `detect_chat`; else ""."""
    prompt = sample.prompt.rstrip()
    for start, end in MARKERS:
        opened = prompt.endswith(start)
        told = start in prompt and end in prompt
        rendered = _is_rendered(sample, start, end)
        stripped = end in sample.template and None not in map(template.own_token, (start, end))
        closed = prompt.endswith(end)  # the thought is empty: the LM is kept from thinking
        if (opened or told or rendered or stripped) and not closed:
            return start, end
    return "", ""


def _close_mark(sample: _RenderedChat, start: str, end: str) -> str:
    if not end:
        return "\n\n"
    return sample.between if _is_rendered(sample, start, end) else f"\n{end}\n\n"


def _is_rendered(sample: _RenderedChat, start: str, end: str) -> bool:
    return sample.before.rstrip().endswith(start) and end in sample.between


def _rendered_chat(chat_template: ChatTemplate) -> _RenderedChat:
    """Renders a question, and its answer with a thought under every name that thoughts go by."""
    if not chat_template.text:
        return _RenderedChat()
    question: Message = {"role": "user", "content": "?"}
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT)
    answer: Message = {"role": "assistant", "content": _ANSWER} | thought
    template = prompt = turn = ""
    try:
        template = chat_template.text
        prompt = chat_template.render([question], True, True)
        turn = chat_template.render([question, answer], False, True)
    except _REFUSALS:
        pass  # a question that is refused is an error once it is asked
    before, is_shown, rest = turn.partition(_THOUGHT)
    if not is_shown:
        return _RenderedChat(template, prompt, after=turn.partition(_ANSWER)[2])
    between, _, after = rest.partition(_ANSWER)
    return _RenderedChat(template, prompt, before, between, after)
