"""Halting inside vLLM: one logits processor for both of its model runners.

    vllm serve LM --logits-processors haltwise.vllm:HaltProcessor
        --additional-config '{"haltwise": {"head": "FOLDER", "price": 0.5}}'

`head` is a folder written by train.py, and HALTWISE_HEAD in the environment will do instead. Beside
it may stand the terms of requests that ask for nothing (`price`, `min_tokens`, `max_tokens`,
`off`), a `control` as MODULE:NAME (see `haltwise.Control`), and `free_answers`, see below. The LM's
markers are the head's. A request asks with `vllm_xargs` over HTTP, or
`SamplingParams(extra_args=...)`: `haltwise_price`, `haltwise_min_tokens`, `haltwise_max_tokens`,
`haltwise_off`. A bad value is that request's error (HTTP 400). No request lifts the engine's own
`max_tokens`, with whatever it contradicts it.

A thought that is halted or capped is closed token by token with the head's close text. Then the LM
answers with its likeliest tokens, also where the request is sampled: so were the answers that the
head has been trained and certified on. `"free_answers": true` has them sampled as the request says.
A token that something else forbids, such as a grammar, is never forced: there the LM takes over as
the request says, and what is left of the close text is dropped.

vLLM's own `thinking_token_budget` works beside it, and wins; one that ends within the close text
doubles its end.

vLLM lets no processor answer a request: what happened stands in the text, in one line of the log a
halted request (logger `vllm.haltwise`, no content), and in `HaltProcessor.counts`.

What the head sees are the logits that vLLM gives to processors: before temperature, after
`allowed_token_ids`, `bad_words`, `logit_bias` and a grammar; V2 has applied penalties by then, V1
has not. The likeliest token of a sampled request's answer is that of these logits. Each request's
newest logits are kept until its next token: on the device, float32, for `max_num_seqs` requests
(V1: 64 more), such as 160 MB for 256 requests and 152,000 tokens.

The host waits for the device once a decision point, and in V2, if there is a control, once more for
each request that it is told of when the slot goes to another. With the rule "after TEXT" every
token may be one: V2 then waits at every token. (V1 tells the host every token anyway.) A thought
that begins behind its cap is closed by the device itself where it begins; where the marker of a
beginning is several tokens long, V2 waits at every token between the cap and the beginning, 64 at
most.

- Requests in chunked prefill wait for their first token. Beam search sends a new request for every
  token and is never halted. LoRA adapters are not told apart from the LM that the head knows.
- A request that vLLM takes out of the batch and back is known again in V1. In V2, or if its slot
  was needed, the head decides no more about it, and a close text under way is dropped; its cap
  holds. What is left of an answer is then sampled.
- Speculative decoding and diffusion LMs are refused at start. vLLM itself refuses pooling models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from haltwise import InputError, Terms, ThoughtRequest
from haltwise.vllm.halting import SlotHalting, log
from haltwise.vllm.settings import check_tokens_are_shown, is_first, read_settings
from haltwise.vllm.slots import V1Slots, V2Slots

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # a vLLM from before that runner's processors
    _INTERFACES: tuple[type, ...] = (V1LogitsProcessor,)
else:
    _INTERFACES = (V2LogitsProcessor, V1LogitsProcessor)

_PREFIX = "haltwise_"


class HaltProcessor(*_INTERFACES):  # type: ignore[misc]
    """Lets a head halt the requests of a vLLM engine; vLLM makes it, see this module.

    Args:
        vllm_config: The engine's.
        args: The device and whether memory is pinned (V1), or the state of requests (V2).

    Raises:
        InputError: If there is no head, or the head does not fit this engine.
    """

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        """Reads the head, and checks that it fits the engine."""
        settings = read_settings(vllm_config)
        self._terms = settings.terms
        if len(args) == 1:
            self._slots: V1Slots | V2Slots = V2Slots(args[0])
        else:
            check_tokens_are_shown(vllm_config)
            self._slots = V1Slots(vllm_config.scheduler_config.max_num_seqs, args[0])
        self._halting = SlotHalting(
            settings.head,
            settings.rules,
            self._slots.num_slots,
            vllm_config.model_config.get_vocab_size(),
            self._slots.device,
            is_first(vllm_config.parallel_config),
            settings.control,
            settings.free_answers,
        )
        #: What has happened since the start.
        self.counts = self._halting.counts

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request with bad terms.

        Raises:
            InputError: If a term is unknown or has a bad value.
        """
        _terms_of(sampling_params, Terms(0.0))

    def is_argmax_invariant(self) -> bool:
        """V1: greedy requests are halted too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests join, leave and change rows."""
        assert isinstance(self._slots, V1Slots)
        if batch_update is not None:
            for slot, params in self._slots.update(batch_update, self._halting.num_tokens):
                if params is None:
                    self._halting.leave(slot, self._slots)
                else:
                    self._join(slot, params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request joins; whether anything can halt it."""
        return self._join(req_idx, sampling_params)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Both: looks at logits (rows, V), and forces tokens in them."""
        self._halting.step(self._slots.rows(ctx), self._slots, logits)
        return logits

    def _join(self, slot: int, sampling_params: Any) -> bool:
        try:
            terms = _terms_of(sampling_params, self._terms)
        except InputError as error:  # by themselves they are sound: they contradict the engine's
            terms = _terms_of(sampling_params, replace(self._terms, min_tokens=0), "min_tokens")
            terms = replace(terms, min_tokens=terms.max_tokens or 0)
            log.warning("a request's terms contradict the engine's, its cap holds: %s", error)
        request = ThoughtRequest(terms, sampling_params.extra_args or {})
        self._halting.leave(slot, self._slots)
        return self._halting.join(slot, request, sampling_params)


def _terms_of(sampling_params: Any, limits: Terms, *unheard: str) -> Terms:
    asked = {
        key.removeprefix(_PREFIX): value
        for key, value in (sampling_params.extra_args or {}).items()
        if key.startswith(_PREFIX) and key.removeprefix(_PREFIX) not in unheard
    }
    try:
        return Terms.within(asked, limits)
    except InputError as error:
        raise InputError(f"{_PREFIX}*: {error}") from None
