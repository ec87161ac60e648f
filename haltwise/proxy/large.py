"""The large LM of a cascade: when a request is left to it, and how it is asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from haltwise.policy.cascade import Act, Cascade
from haltwise.policy.head import HaltHead
from haltwise.policy.question import Question
from haltwise.policy.signals import Bools, Float
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.config import ServeConfig, UpstreamConfig
from haltwise.proxy.upstream import Upstream, UpstreamLeg
from haltwise.proxy.wire import Json, RawHeaders, StreamEvent, UpstreamError, texts_of
from haltwise.session.request import ThoughtRequest

#: Why a request that was left to the large LM is answered by the small one.
FAILED = "large LM"

#: Where a request was left to the large LM: before the small one's first token, at a decision point
#: or cap, or at the end of its thought.
Where = Literal["start", "point", "end"]


class EscalatingHead(HaltHead):
    """A cascade's head, for one request: it closes the thought to answer, or to escalate.

    Args:
        cascade: Decides.
        question: What is asked.
    """

    def __init__(self, cascade: Cascade, question: Question) -> None:
        """Has seen nothing of the thought."""
        super().__init__(cascade.head.config, cascade.head.weights)
        self._cascade = cascade
        self._asked = cascade.reader.read([question])
        self._features = np.full((1, len(self.config.features)), np.nan, dtype=np.float32)
        self._act = Act.CONTINUE

    def halts(self, features: Float, price: ArrayLike | None = None) -> Bools:
        """Tells whether to close the thought (1,), see `Cascade.at_point`."""
        acts = self._cascade.at_point(features, self._asked, price)
        self._features, self._act = features, Act(int(acts[0]))
        closes: Bools = acts != Act.CONTINUE
        return closes

    def escalates_at_start(self, price: float) -> bool:
        """Whether the small LM is not asked at all."""
        return bool(self._cascade.at_start(self._asked, price)[0] == Act.ESCALATE)

    def escalates_here(self, price: float, is_capped: bool) -> bool:
        """Whether a thought that has just been closed at a decision point or a cap is escalated.

        Args:
            price: In exact match per 1,000 tokens of the small LM.
            is_capped: Whether its cap has closed it.
        """
        if not is_capped:
            return self._act == Act.ESCALATE
        return bool(self._cascade.at_halt(self._features, self._asked, price)[0] == Act.ESCALATE)

    def escalates_at_end(self, price: float, is_cut: bool) -> bool:
        """Whether a thought that has ended is escalated.

        Args:
            price: In exact match per 1,000 tokens of the small LM.
            is_cut: Whether its token budget has ended it.
        """
        acts = self._cascade.at_end(self._features, self._asked, price, is_cut)
        return bool(acts[0] == Act.ESCALATE)


def question_of(request: CompletionRequest, asked: ThoughtRequest) -> Question:
    """What is known of a question before the first token."""
    task, segment = asked.about.get("task"), asked.terms.segment
    return Question(request.question, str(task or ""), segment or "")


def large_lm(config: ServeConfig) -> LargeLM | None:
    """Returns the large LM that the settings name; None if they name none.

    Raises:
        InputError: If the head is none of a cascade.
    """
    if config.large is None:
        return None
    cascade = Cascade.load(config.head)
    return LargeLM(cascade, config.large_connections, config.large_model)


class LargeLM:
    """Asks the large LM, and waits for the whole of its answer.

    Args:
        cascade: Says when.
        connections: Where its server is.
        model: Its name there; None for the one that the client names.
    """

    def __init__(self, cascade: Cascade, connections: UpstreamConfig, model: str | None) -> None:
        """Opens nothing yet."""
        self.cascade = cascade
        self.upstream = Upstream(connections)
        self._model = model

    def anew(self, folder: Path) -> LargeLM:
        """Returns the same with the cascade that is in a folder now, and the connections that are.

        Raises:
            InputError: If there is none.
        """
        twin = copy.copy(self)
        twin.cascade = Cascade.load(folder)
        return twin

    def body_of(self, request: CompletionRequest) -> Json:
        """The body of a request, as the large LM is asked."""
        named = {} if self._model is None else {"model": self._model}
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return request.body | named | streaming

    async def begun(self, request: CompletionRequest, headers: RawHeaders) -> UpstreamLeg:
        """A leg whose first event has come.

        Raises:
            UpstreamError: If none comes.
        """
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        leg = await self.upstream.stream(path, self.body_of(request), headers)
        try:
            if not (leg.response.is_success and leg.is_readable):
                status = leg.response.status_code
                raise UpstreamError("status", f"the large LM's server answered with {status}")
            async for event in leg:
                leg.put_back(event)
                return leg
            raise UpstreamError("cut", "the large LM's server said nothing")
        except BaseException:
            await leg.close()
            raise

    async def events_of(self, leg: UpstreamLeg) -> list[StreamEvent]:
        """All events of a leg, which is closed.

        Raises:
            UpstreamError: If its answer is not whole, or empty.
        """
        events, has_end, says_something = list[StreamEvent](), False, False
        try:
            async for event in leg:
                events.append(event)
                if (choice := event.choice) is not None:
                    calls = choice.get("delta", {}).get("tool_calls")
                    says_something |= bool(texts_of(choice)[1] or calls)
                    has_end |= bool(choice.get("finish_reason"))
        finally:
            await leg.close()
        if not (has_end and says_something):
            raise UpstreamError("cut", "the large LM's answer has no end, or no text")
        return events
