"""What the client gets: the chunks of all legs in the form that it asked for, and the usage."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from haltwise.proxy.probing import ProbeUsage
from haltwise.proxy.thought import ThoughtReader
from haltwise.proxy.upstream import LegUsage, summed
from haltwise.proxy.wire import (
    DONE,
    Json,
    StreamEvent,
    UpstreamError,
    chat_logprobs,
    choices_of,
    index_of,
    may_become,
    replace_texts,
    says_more,
    texts_of,
    trim_logprobs,
    without_markers,
)
from haltwise.session.request import Spent

# What the chunks of one answer have in common: their envelope.
_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# What a choice has on every server.
_OF_CHOICE = ("index", "delta", "text", "logprobs", "finish_reason")


class ClientAnswer:
    """Gives what the legs say the form that the client asked for.

    Args:
        reader: Knows the request, the server, the thought, and the usage of each leg.
        shadow: Whether the answer only tells where the thought would have been halted.
    """

    def __init__(self, reader: ThoughtReader, shadow: bool) -> None:
        """Starts before the first chunk."""
        self.envelope: Json = {}
        """What all chunks have in common, from the first leg's first one."""
        self.finish: str | None = None
        """Why the answer ended, once it has."""
        # Of the answer behind a closed thought, until it is more than markers.
        self._opening: str | None = ""
        self._open: set[int] = set()  # choices that have begun and not ended
        self._is_stopped = False  # by a text that the client named
        self.is_whole = False
        """Whether the server has marked the end of its stream."""
        self._reader, self._shadow, self._began = reader, shadow, time.monotonic()
        self._request, self._usages = reader.request, reader.usages
        self._num_top = reader.server.num_top_shown(reader.request)

    def shown(self, event: StreamEvent, chunk: Json) -> StreamEvent | None:
        """An event of the first leg without what the client did not ask for; None to show none.

        Args:
            event: The event; it is changed if it has more than that, and else sent as it came.
            chunk: Its chunk.
        """
        choices, usage = choices_of(chunk), chunk.get("usage")
        choice = choices[0] if choices else None
        for each in choices:
            self.envelope = self.envelope or {n: chunk[n] for n in _ENVELOPE if n in chunk}
            self._note_finish(each)
        if self._strip(chunk, choices):
            event.raw = b""
        if choice is not None and self._reader.is_close_shown:
            has_rest = self._leave_out_marker(event, choice)
            if not (has_rest or isinstance(usage, dict)):
                return None
        if isinstance(usage, dict):
            self._usages[-1].take(usage)
            if choice is None and not self._request.wants_usage:
                return None
            if self.has_ended:
                chunk["usage"], event.raw = self.usage(), b""
        return event

    @property
    def has_ended(self) -> bool:
        """Whether the server has told why the answer ended, and each of its choices if several."""
        return self.finish is not None and not self._open

    def _note_finish(self, choice: Json) -> None:
        """Notes why a choice ended, if it did."""
        finish = choice.get("finish_reason")
        (self._open.discard if finish else self._open.add)(index_of(choice))
        self.finish = finish or self.finish
        self._is_stopped |= self._request.is_stopped(choice)

    def passed(self, event: StreamEvent) -> StreamEvent | None:
        """An event to show as it is; None for the end of a leg, which ends no completion."""
        self.is_whole |= event is DONE
        return None if event is DONE else event

    def check_whole(self) -> None:
        """Checks that the answer has an end.

        Raises:
            UpstreamError: If it has none.
        """
        if not (self.has_ended or self.is_whole):
            raise UpstreamError("cut", "upstream broke off its answer")

    def _strip(self, chunk: Json, choices: Sequence[Json]) -> bool:
        """Takes out what the client did not ask for; returns whether there could be anything."""
        parts = [chunk, *choices]
        dropped = ["prompt_token_ids", "token_ids"]
        if self._num_top is None:
            dropped.append("logprobs")
        found = [part.pop(name) for part in parts for name in dropped if name in part]
        if self._num_top is None:
            return bool(found)
        for choice in choices:
            trim_logprobs(choice.get("logprobs"), self._num_top)
        return bool(found or choices)

    def usage(self) -> Json:
        """The usage of all legs and probes together, and the report about the thought.

        What the server tells of a leg is believed if that is the only one.
        """
        legs = self._reader.legs
        prompt = sum(usage.prompt_tokens or 0 for usage in legs)
        completion = sum(usage.completion_tokens for usage in legs)
        usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage |= {"total_tokens": prompt + completion}
        usage |= legs[0].told if len(legs) == 1 else self._details()
        if (probes := self._reader.prober.usage).num:
            for name in ("prompt_tokens", "completion_tokens"):
                usage[name] += getattr(probes, name)
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
            cached = {"prompt_tokens_details": {"cached_tokens": probes.cached_tokens}}
            usage = summed(usage, cached) if probes.cached_tokens else usage
        return usage | {"haltwise": self.report()}

    def spent(self) -> Spent:
        """What the whole request took."""
        thought = self._reader.thought
        return replace(
            self._taken(self._reader.legs, self._reader.prober.usage),
            reasoning_tokens=thought.position if thought.begun else None,
            outcome=self.finish or "cut off",
            seconds=time.monotonic() - self._began,
        )

    def spent_by_small(self) -> Spent:
        """The tokens that the small LM, which is the only one without a large one, has taken."""
        legs = [one for one in self._reader.legs if not one.is_large]
        return self._taken(legs, self._reader.prober.usage)

    def spent_by_large(self) -> Spent:
        """The tokens that the large LM has taken, if it was asked."""
        return self._taken([one for one in self._reader.legs if one.is_large], ProbeUsage())

    @staticmethod
    def _taken(legs: Sequence[LegUsage], probes: ProbeUsage) -> Spent:
        """The tokens of some legs and probes."""
        prompts = [one.prompt_tokens for one in legs if one.prompt_tokens is not None]
        cached = [one.cached_tokens for one in legs if one.cached_tokens is not None]
        # A prompt of which the server tells nothing is as long as the longest one.
        num_unknown = len(legs) - len(prompts)
        num_prompts = sum(prompts) + num_unknown * max(prompts, default=0)
        return Spent(
            input_tokens=num_prompts + probes.prompt_tokens if prompts else None,
            cached_tokens=sum(cached) + probes.cached_tokens if cached else None,
            output_tokens=sum(one.completion_tokens for one in legs) + probes.completion_tokens,
        )

    def _details(self) -> Json:
        """The details that servers tell of usage, of all legs together."""
        details: Json = {}
        for told in (usage.told for usage in self._reader.legs):
            details = summed(details, {n: v for n, v in told.items() if isinstance(v, dict)})
        name = "completion_tokens_details"
        num_thought = details.get(name, {}).get("reasoning_tokens")
        if not self._usages[0].told and isinstance(num_thought, int):
            # The first leg was left before it told them.
            num_thought += self._reader.thought.position
            details[name] = details[name] | {"reasoning_tokens": num_thought}
        return details

    def report(self) -> Json:
        """What the client and the log are told about the thought."""
        reader = self._reader
        if self.finish is not None or self.is_whole:
            reader.thought.end(by_lm=self.finish != "length" and not self._is_stopped)
        found = reader.streamed.report()
        if reader.fallback or (found.decided and not reader.is_closed):
            reader.streamed.release(reader.fallback)
            found = reader.streamed.report()
        report: Json = {
            "halted": found.halted,
            "reason": "escalated" if reader.escalated else found.reason,
            "position": found.position,
            "price": found.price,
            "legs": [usage.counts() for usage in reader.legs],
        }
        if found.request.terms.names_unknown_segment:
            report["unknown_segment"] = True
        if reader.num_turns > 1:
            report["turns"] = reader.num_turns
        if reader.is_closed and reader.thought.position > found.position:
            report["length"] = reader.thought.position
        if (looks := reader.prober.usage).num or looks.num_passed:
            report["probes"] = looks.report()
        for name in ("escalated", "not_escalated", "fallback"):
            if told := getattr(reader, name):
                report[name] = told
        if self._shadow and found.decided_at is not None:
            saved = found.position - found.decided_at
            shadow = {"reason": found.decided, "position": found.decided_at, "saved_tokens": saved}
            report["shadow"] = shadow
        return report

    def usage_event(self) -> StreamEvent:
        """The event that tells the usage of an answer of several legs."""
        return StreamEvent(chunk=self.envelope | {"choices": [], "usage": self.usage()})

    def close_events(self) -> Iterator[StreamEvent]:
        """The events that show the close text, in the thought's field and behind it."""
        server, field = self._reader.server, self._reader.field
        if self._reader.is_close_shown:
            return
        before, after = server.close_parts
        before = self._reader.call_end + before
        if field and before:
            yield self._made({}, {field: before})
        if text := after if field else self._reader.call_end + server.close_text:
            yield self._made({}, self._part(text))

    def whole_event(self, text: str) -> StreamEvent:
        """The event that shows a whole answer and its end."""
        self.finish = "stop"
        self._open.clear()
        return self._made({"finish_reason": self.finish}, self._part(text))

    def continued(self, choice: Json) -> StreamEvent | None:
        """A choice of a later leg as one of the first leg's; None if it has nothing to show."""
        self._note_finish(choice)
        self._strip({}, [choice])
        text = self._without_marker("".join(texts_of(choice)), is_last=self.finish is not None)
        if text or choice.get("logprobs") or choice.get("finish_reason"):
            return self._made(choice, self._part(text))
        return None

    def _leave_out_marker(self, event: StreamEvent, choice: Json) -> bool:
        """Leaves a repeated marker out of a choice; returns whether it has anything to show."""
        thought, text = texts_of(choice)
        left = self._without_marker(text, is_last=self.finish is not None)
        if left == text:
            return True
        replace_texts(choice, thought, left)
        event.raw = b""
        told = (left, thought, choice.get("logprobs"), choice.get("finish_reason"))
        return any(told) or says_more(choice)

    def _without_marker(self, text: str, is_last: bool) -> str:
        """The next text of an answer, less the markers that an LM writes once more before it."""
        if self._opening is None:
            return text
        marker = self._reader.server.rules.think_end
        text = without_markers(self._opening + text, marker)
        is_open = may_become(text, marker) and not is_last
        self._opening = text if is_open else None
        return "" if is_open else text

    def _part(self, text: str) -> Json:
        return {"content": text} if self._request.chat else {"text": text}

    def _made(self, choice: Json, part: Json) -> StreamEvent:
        """A chunk as those of the first leg, with what a choice of another one tells beside."""
        own: Json = {"index": 0}
        own |= {"delta": part} if self._request.chat else part
        if self._num_top is not None:
            logprobs = choice.get("logprobs")
            own["logprobs"] = chat_logprobs(logprobs) if self._request.chat else logprobs
        own["finish_reason"] = choice.get("finish_reason")
        own |= {name: value for name, value in choice.items() if name not in _OF_CHOICE}
        return StreamEvent(chunk=self.envelope | {"choices": [own]})
