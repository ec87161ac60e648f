"""The thought of a completion: how it is read from the first leg, and where the head halts it."""

import time
from collections.abc import Callable

from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.large import Where
from haltwise.proxy.lm_server import LMServer
from haltwise.proxy.metrics import Metrics, log
from haltwise.proxy.probing import AnswerProber
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage
from haltwise.proxy.wire import (
    REASONING_FIELDS,
    Json,
    ServedToken,
    has_others,
    texts_of,
    tokens_of,
    whole_texts,
    without_markers,
)
from haltwise.session.stream import StreamedThought

#: Why a thought is left to its LM that gives other choices than the one that was asked for.
SEVERAL = "several choices"
# How vLLM begins the texts of tokens that it was told to name by their ids.
_ID_TEXT = "token_id:"
# How LMs begin and end a tool call, which can be written amid a thought; the outer one first.
_CALLS = (
    ("<|tool_calls_begin|>", "<|tool_calls_end|>"),
    ("<|tool_call_begin|>", "<|tool_call_end|>"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
    ("<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"),
    ("<tool_call>", "</tool_call>"),
    ("<function=", "</function>"),
    ("[TOOL_CALLS]", ""),
)
# Tokens that a call may take to end before the thought is closed all the same.
_LONGEST_CALL = 256


def _open_calls(text: str) -> list[str]:
    """What ends each tool call that has begun in a text and not ended, the inner ones first."""
    begun = [(text.rfind(start), end) for start, end in _CALLS if start in text]
    begun.sort(reverse=True)
    return [end for place, end in begun if not end or place > text.rfind(end)]


class ThoughtReader:
    """Reads a thought from the chunks of the first leg, and says when to halt it.

    Args:
        request: What the client asked for.
        server: The LM's server.
        streamed: The thought, before its first token.
        prober: Forces the answers that the head looks at, if it looks at any.
        metrics: Where decisions and fallbacks are counted.
    """

    def __init__(
        self,
        request: CompletionRequest,
        server: LMServer,
        streamed: StreamedThought,
        prober: AnswerProber,
        metrics: Metrics,
    ) -> None:
        """Starts before the first chunk."""
        self.request, self.server, self.prober = request, server, prober
        self.streamed, self.thought = streamed, streamed.thought
        self.generated = GeneratedSoFar()
        """All tokens up to the end of the thought."""
        self.usages = [LegUsage()]
        """Tokens of each leg, the first one's first; who opens another leg adds its own."""
        self.num_turns = 1
        """Requests that the first leg has taken."""
        self.is_thinking = True
        """Whether the next chunk belongs to the thought, or to what stands before it."""
        self.may_halt = True
        """Whether halting has not been tried yet."""
        self.is_closed = False
        """Whether the proxy closed the thought."""
        self.is_close_shown = False
        """Whether the client has the end of the thought, which the server was told to write."""
        self.thinks_on = False
        """Whether the LM thinks on in spite of that, or again."""
        self.escalated: Where | None = None
        """Where the request was left to the large LM; None if it was not."""
        self.is_cut: bool | None = None
        """Whether its token budget has ended the thought, once that has ended by itself."""
        self.large: LegUsage | None = None
        """What the large LM takes; None if it was not asked, or could not be reached."""
        self.not_escalated = ""
        """Why the large LM may not be asked; empty if it may, or if there is none."""
        self.fallback = ""
        """Why the LM was left to think on; empty if it was not."""
        self.call_end = ""
        """What ends the tool calls that the thought is closed amid of, if it is."""
        self.field = ""
        """The field in which the server puts the thought; empty if it stands in the text."""
        self.shown_texts: list[str] = []
        """What the client has of the thought."""
        self._metrics = metrics
        self._opening = ""
        self._call_since: int | None = None  # tokens before a call that halting waits for

    def answer_in(self, said: str) -> str:
        """The answer in all that was said outside of the thought's own field.

        It has no thought that stands in the text; one that has no end is all.
        """
        rules, in_text = self.server.rules, self.thought.begun
        if self.escalated:
            in_text |= rules.think_start in said or rules.think_end in said
        is_apart = self.field or not (in_text and rules.think_end)
        text = said if is_apart else said.partition(rules.think_end)[2]
        return without_markers(text, rules.think_end)

    async def read(self, chunk: Json, choice: Json) -> bool:
        """Reads the next chunk, which has this choice; returns whether to halt behind it."""
        halts = await self._read(chunk, choice)
        if not self.is_thinking or choice.get("finish_reason"):
            self.prober.cancel()
        return halts

    async def read_answer(self) -> bool:
        """Takes in the answer of the probe that has ended; returns whether to halt now."""
        probe = self.prober.take()
        halts = self._guarded(lambda: self.streamed.answered(probe))
        return halts and await self._halts_here()

    async def _read(self, chunk: Json, choice: Json) -> bool:
        tokens, (thought, text) = tokens_of(choice), texts_of(choice)
        if self.begins_answer(choice):
            self.is_thinking, self.thought.closed = False, True  # the server tells them apart
            self.usages[0].completion_tokens += len(tokens) or 1
            return False
        self.generated.add(chunk, tokens)
        self.usages[0].completion_tokens = self.generated.num_tokens
        self.note_prompt()
        self.shown_texts.append(thought + text)
        if thought and not self.field:
            self.field = next(name for name in REASONING_FIELDS if choice["delta"].get(name))
            self.thought.begun = True
            if not self.server.rules.think_start:
                self.is_thinking = False  # it is no LM that reasons in the open
                self.fall_back("thought apart")
                return False
        if any(token.text.startswith(_ID_TEXT) for token in tokens):
            self.is_thinking = False  # its markers cannot be seen
            self.fall_back("token texts")
            return False
        tokens = whole_texts(tokens, thought + text)
        if not self.thought.begun:
            await self._find_opening("".join(token.text for token in tokens))
            if not self.is_thinking:
                return False
        # What ends an answer in the open has no text, and often comes before the reason.
        is_blank = not (thought or text or self.server.rules.think_end)
        ends = is_blank or bool(choice.get("finish_reason"))
        halts = self._guarded(lambda: self._show_head(tokens, ends))
        self.is_thinking &= not self.thought.is_over
        return halts and await self._halts_here()

    async def _halts_here(self) -> bool:
        """Whether a thought that is to be halted can be, where it is."""
        budget = self.request.max_tokens
        is_within = budget is None or self.generated.num_tokens < budget
        return self.may_halt and is_within and await self._is_thought()

    def check_choices(self, chunk: Json) -> None:
        """Leaves an answer of several choices, or of another one than was asked for, to its LM."""
        if self.is_thinking and self.may_halt and has_others(chunk):
            self.is_thinking = False
            self.fall_back(SEVERAL)

    def begins_answer(self, choice: Json) -> bool:
        """Whether the server says that this choice is of the answer, and no longer of a thought."""
        text = texts_of(choice)[1]
        return bool(choice.get("delta", {}).get("tool_calls") or (text and self.field))

    async def _find_opening(self, text: str) -> None:
        """Finds out whether an answer begins with a thought, from its next text.

        The LM writes the marker first if the prompt does not end with it; later it is mentioned.
        """
        is_first = not self._opening
        self._opening = (self._opening + text).lstrip()
        if not self._opening:
            return
        opened = await self.server.opened(self.request) if is_first else None
        marker = self.server.rules.think_start
        begins = self._opening.startswith(marker) or marker.startswith(self._opening)
        self.thought.begun = opened is True
        self.is_thinking = self.thought.begun or (begins and opened is None)

    async def _is_thought(self) -> bool:
        """Whether what the server takes for a thought is one, and neither an answer nor a call."""
        if self._waits_for_call():
            return False
        if self.field and await self.server.opened(self.request) is False:
            self.fall_back("no thought")
            return False
        return True

    def _waits_for_call(self) -> bool:
        """Whether halting waits for a tool call to end, in which the close text would stand.

        It is tried again where it would be next: at each token behind the cap.
        """
        ends, num = _open_calls("".join(self.shown_texts)), self.generated.num_tokens
        self._call_since = (self._call_since or num) if ends else None
        self.call_end = "".join(ends)
        waits = self._call_since is not None and num - self._call_since < _LONGEST_CALL
        self.fallback = "tool call" if waits else ""
        if waits:
            self.streamed.undo()
        return waits

    def note_prompt(self) -> None:
        """Counts the prompt's tokens, once the server has told their ids."""
        if self.generated.prompt_ids is not None:
            self.usages[0].prompt_tokens = len(self.generated.prompt_ids)

    def _show_head(self, tokens: list[ServedToken], ends: bool) -> bool:
        """Shows tokens to the head; returns whether it halts at one of them.

        Args:
            tokens: The tokens.
            ends: Whether the LM may have ended with them.
        """
        halts = False
        for i, token in enumerate(tokens, start=1):
            num_points, started = self.thought.num_points, time.perf_counter()
            is_last = ends and i == len(tokens)
            halts |= self.streamed.add(token.text, token.logprob, token.top, is_last)
            if self.streamed.asks:
                self._look()
            if self.thought.num_points > num_points:
                self._metrics.decision_seconds.observe(time.perf_counter() - started)
        return halts

    def _look(self) -> None:
        """Starts to look at the answer of a decision point, unless there is no room for it."""
        if not self.prober.has_room:
            self.prober.pass_point()
            self.streamed.skip()
            return
        self.streamed.await_answer()
        num, generated = self.thought.num_tokens, self.generated
        ids = generated.ids[:num] if generated.has_ids else []
        texts = list(map(str, self.thought.tokens))
        self.prober.start(GeneratedSoFar(texts, ids, generated.prompt_ids, num))

    def _guarded(self, halts: Callable[[], bool]) -> bool:
        """Whether the head halts the thought; one that fails lets the LM think on."""
        try:
            return halts()
        except Exception:
            log.exception("a decision failed: the LM thinks on")
            self.is_thinking = False
            self.fall_back("policy")
            return False

    def note_end(self, choice: Json) -> None:
        """Notes that the thought has ended by itself, if it has.

        Args:
            choice: The newest chunk's.
        """
        is_cut = self.is_thinking and choice.get("finish_reason") == "length"
        is_over = not self.is_thinking and self.thought.closed and not self.is_closed
        if is_cut or (is_over and not self.fallback):
            self.is_cut = is_cut

    def leave_to_large(self, where: Where) -> None:
        """Notes that the large LM answers; what comes from it is not watched."""
        self.is_thinking = self.may_halt = False
        self.escalated = where
        self.streamed.note_escalated()
        assert self.large is not None
        self.usages[0 if where == "start" else len(self.usages) :] = [self.large]

    @property
    def legs(self) -> list[LegUsage]:
        """The tokens of all legs, and of the large LM's too if its answer has come to nothing."""
        lost = [] if self.large is None or self.escalated else [self.large]
        return [*self.usages, *lost]

    def fall_back(self, reason: str) -> None:
        """Lets the LM think on, and counts why."""
        self.may_halt, self.fallback = False, reason
        self.prober.cancel()
        self.streamed.release(reason)
