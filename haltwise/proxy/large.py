"""The large LM of a cascade: when a request is left to it, and how it is asked."""

from __future__ import annotations

from typing import Literal

from haltwise.policy.cascade import Cascade
from haltwise.policy.cascade_head import CascadeHead
from haltwise.policy.head import HaltHead
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.config import GOVERNED, ServeConfig, UpstreamConfig
from haltwise.proxy.probing import counting
from haltwise.proxy.upstream import LegUsage, Upstream, UpstreamLeg
from haltwise.proxy.wire import Json, RawHeaders, StreamEvent, UpstreamError, texts_of

#: Why a request that was left to the large LM is answered by the small one.
FAILED = "large LM"

#: Errors of the large LM's server that has generated nothing.
TOOK_NOTHING = ("unreachable", "connect timeout", "status")

#: Where a request was left to the large LM: before the small one's first token, at a decision point
#: or cap, or at the end of its thought.
Where = Literal["start", "point", "end"]


def served_head(config: ServeConfig) -> HaltHead:
    """Returns the head that the settings name: beside a large LM, that of a cascade.

    Raises:
        InputError: If there is none, or it is none of a cascade.
    """
    if config.large is None:
        return HaltHead.load(config.head)
    return CascadeHead(Cascade.load(config.head), config.large_model or "")


def large_lm(config: ServeConfig) -> LargeLM | None:
    """Returns the large LM that the settings name; None if they name none."""
    if config.large is None:
        return None
    is_reference = config.control in GOVERNED
    return LargeLM(config.large_connections, config.large_model, is_reference)


class LargeLM:
    """Asks the large LM, and waits for the whole of its answer.

    Args:
        connections: Where its server is.
        model: Its name there; None for the one that the client names.
        is_reference: Whether a control measures against it, so that a price of 0 is its answer.
    """

    def __init__(self, connections: UpstreamConfig, model: str | None, is_reference: bool) -> None:
        """Opens nothing yet."""
        self.upstream = Upstream(connections)
        self._model, self.is_reference = model, is_reference

    def model_of(self, request: CompletionRequest) -> str:
        """The large LM's name, as a request asks for it."""
        return request.model if self._model is None else self._model

    def body_of(self, request: CompletionRequest) -> Json:
        """The body of a request, as the large LM is asked."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return self.renamed(request.body) | streaming

    def renamed(self, body: Json) -> Json:
        """The body of a request, with the large LM's name."""
        return body if self._model is None else body | {"model": self._model}

    async def begun(self, request: CompletionRequest, headers: RawHeaders) -> UpstreamLeg:
        """A leg whose first event has come.

        Raises:
            UpstreamError: If none comes.
        """
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        leg = await self.upstream.stream(path, self.body_of(request), headers)
        try:
            if not leg.response.is_success:
                status = leg.response.status_code
                raise UpstreamError("status", f"the large LM's server answered with {status}")
            if not leg.is_readable:
                raise UpstreamError("malformed", "the large LM's server answered with no stream")
            async for event in leg:
                leg.put_back(event)
                return leg
            raise UpstreamError("cut", "the large LM's server said nothing")
        except BaseException:
            await leg.close()
            raise

    async def events_of(self, leg: UpstreamLeg, usage: LegUsage) -> list[StreamEvent]:
        """All events of a leg, which is closed.

        Args:
            leg: The leg.
            usage: Takes what it takes.

        Raises:
            UpstreamError: If its answer is not whole, or empty.
        """
        events, has_end, says_something = list[StreamEvent](), False, False
        try:
            async for event in counting(usage, leg):
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
