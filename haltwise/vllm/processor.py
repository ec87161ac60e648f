"""Halting inside vLLM: one logits processor for both of its model runners.

    vllm serve LM --logits-processors haltwise.vllm:HaltProcessor
        --additional-config '{"haltwise": {"head": "FOLDER", "price": 0.5}}'

`head` is a folder written by train.py, and HALTWISE_HEAD in the environment will do instead. Beside
it may stand the terms of requests that ask for nothing (`price`, `min_tokens`, `max_tokens`,
`off`). The LM's markers are the head's. A request asks with `vllm_xargs` over HTTP, or
`SamplingParams(extra_args=...)`: `haltwise_price`, `haltwise_min_tokens`, `haltwise_max_tokens`,
`haltwise_off`. A bad value is that request's error (HTTP 400).

A thought that is halted is closed token by token with the head's close text, and then the LM goes
on freely with the request's own sampling. A token that something else forbids, such as a grammar,
is never forced: there the LM takes over, and what is left of the close text is dropped.

vLLM's own `thinking_token_budget` works beside it, and wins; one that ends within the close text
doubles its end.

vLLM lets no processor answer a request: what happened stands in the text, in one line of the log a
halted request (logger `vllm.haltwise`, no content), and in `HaltProcessor.counts`.

What the head sees are the logits that vLLM gives to processors: before temperature, after
`allowed_token_ids`, `bad_words`, `logit_bias` and a grammar; V2 has applied penalties by then, V1
has not. Each request's newest logits are kept until its next token: on the device, float32, for
`max_num_seqs` requests (V1: 64 more), such as 160 MB for 256 requests and 152,000 tokens.

The host waits for the device once a decision point. With the rule "after TEXT" every token may be
one: V2 then waits at every token. (V1 tells the host every token anyway.)

- Requests in chunked prefill wait for their first token. Beam search sends a new request for every
  token and is never halted. LoRA adapters are not told apart from the LM that the head knows.
- A request that vLLM takes out of the batch and back is known again in V1. In V2, or if its slot
  was needed, the head decides no more about it, and a close text under way is dropped; its cap
  holds.
- Speculative decoding and diffusion LMs are refused at start. vLLM itself refuses pooling models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor import MoveDirectionality

from haltwise.engine.fingerprint import check_tokenizer
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.errors import InputError
from haltwise.policy.features import signals_of, unshown_groups
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index
from haltwise.session.monitor import HaltMonitor
from haltwise.session.terms import Terms
from haltwise.session.thought import Thought, ThoughtRules

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # a vLLM from before that runner's processors
    _INTERFACES: tuple[type, ...] = (V1LogitsProcessor,)
else:
    _INTERFACES = (V2LogitsProcessor, V1LogitsProcessor)

# Under vLLM's own logger: it is the one that vLLM shows.
_log = logging.getLogger("vllm.haltwise")

_PREFIX = "haltwise_"
# V1 keeps so many requests in mind that have left the batch and may come back.
_NUM_SPARE = 64

Bools = NDArray[np.bool_]
# A slot, and which of its generated tokens: the first, and the first that is not.
Span = tuple[int, int, int]


@dataclass
class HaltCounts:
    """What has happened since the start, in this process."""

    num_requests: int = 0
    """Requests that could be halted."""
    num_halted: int = 0
    """Thoughts that the head closed."""
    num_capped: int = 0
    """Thoughts that reached their `max_tokens`."""
    num_bad_signals: int = 0
    """Decision points with a signal that was not finite; the request went on."""
    num_lost: int = 0
    """Times that the head has not seen all tokens of a request, and decides no more about it."""


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
        head, terms, rules = _read_config(vllm_config)
        self._terms = terms
        if len(args) == 1:
            self._slots: _V1Slots | _V2Slots = _V2Slots(args[0])
        else:
            _check_tokens_are_shown(vllm_config)
            self._slots = _V1Slots(vllm_config.scheduler_config.max_num_seqs, args[0])
        self._watch = _Watch(
            head,
            rules,
            self._slots.num_slots,
            vllm_config.model_config.get_vocab_size(),
            self._slots.device,
            _is_first(vllm_config.parallel_config),
        )
        #: What has happened since the start.
        self.counts = self._watch.counts

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
        assert isinstance(self._slots, _V1Slots)
        if batch_update is not None:
            for slot, params in self._slots.update(batch_update, self._watch.num_tokens):
                self._join(slot, params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request joins; whether anything can halt it."""
        return self._join(req_idx, sampling_params)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Both: looks at logits (rows, V), and forces tokens in them."""
        self._watch.step(self._slots.rows(ctx), self._slots, logits)
        return logits

    def _join(self, slot: int, sampling_params: Any) -> bool:
        try:
            terms = _terms_of(sampling_params, self._terms)
        except InputError:  # by themselves they are sound: they contradict the engine's
            terms = _terms_of(sampling_params, Terms(self._terms.price))
        return self._watch.join(slot, terms)


def _terms_of(sampling_params: Any, default: Terms) -> Terms:
    asked = {
        key.removeprefix(_PREFIX): value
        for key, value in (sampling_params.extra_args or {}).items()
        if key.startswith(_PREFIX)
    }
    try:
        return Terms.read(asked, default)
    except InputError as error:
        raise InputError(f"{_PREFIX}*: {error}") from None


def _read_config(vllm_config: Any) -> tuple[HaltHead, Terms, ThoughtRules]:
    """The head, the terms of requests that ask for nothing, and how thoughts are read."""
    _check_engine(vllm_config)
    terms = _stated(vllm_config.additional_config)
    folder = terms.pop("head", None) or os.environ.get("HALTWISE_HEAD")
    if not folder:
        raise InputError(
            "no head: expected additional-config {'haltwise': {'head': FOLDER}}, or HALTWISE_HEAD"
        )
    head = HaltHead.load(folder)
    _check_runnable(head)
    try:
        default = Terms.read(terms, Terms(head.config.default_price))
    except InputError as error:
        raise InputError(f"haltwise in additional-config: {error}") from None
    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    if tokenizer is None:
        raise InputError("the engine has no tokenizer: expected one, without skip_tokenizer_init")
    check_tokenizer(head, tokenizer)
    return head, default, ThoughtRules(tokenizer, head.config.halting)


def _check_engine(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise InputError("speculative decoding: expected none, a head decides token by token")
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise InputError("a diffusion LM: expected one that generates token by token")


def _stated(additional_config: Any) -> dict[str, Any]:
    """What the engine's config says to haltwise: the head's folder, and terms."""
    stated = additional_config.get("haltwise", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(stated, dict):
        raise InputError(
            f"haltwise in additional-config is {stated!r}, expected {{'head': FOLDER}}"
        )
    folder = stated.get("head", "FOLDER")
    if not (isinstance(folder, str) and folder):
        raise InputError(f"haltwise in additional-config: head is {folder!r}, expected text")
    return dict(stated)


def _check_runnable(head: HaltHead) -> None:
    if head.config.halting.probing != "at_halt":
        raise InputError("head probes always: expected at_halt, vLLM cannot try out answers")
    unshown = unshown_groups(head.config.observing.groups, "vllm")
    if unshown:
        raise InputError(f"head has features {unshown[0]!r}: expected none, vLLM cannot show them")


def _check_tokens_are_shown(vllm_config: Any) -> None:
    """Refuses a V1 engine that would show placeholders instead of the newest tokens."""
    if vllm_config.scheduler_config.async_scheduling and not (
        vllm_config.model_config.logits_processors
    ):
        raise InputError(
            "loaded as a plugin, V1 with async scheduling hides the newest tokens: expected "
            "--logits-processors haltwise.vllm:HaltProcessor, or --no-async-scheduling"
        )


def _is_first(parallel_config: Any) -> bool:
    """Whether this process is the first of those that sample the same requests: it logs."""
    if getattr(parallel_config, "enable_batch_sharded_sampling", False):
        return True  # each process samples its own
    return bool(parallel_config.rank % parallel_config.tensor_parallel_size == 0)


@dataclass(frozen=True)
class _Rows:
    """B rows of logits whose next token counts."""

    index: Index
    """(B,) which rows."""
    slots: Index
    """(B,) whose they are."""
    num_tokens: Index
    """(B,) generated so far."""
    known: Bools
    """(B,) whether the newest token is known, or there is none."""
    newest: Tensor
    """(rows,) of every row, on the device; anything before the first, -1 if it is not known."""

    def only(self, chosen: Bools) -> _Rows:
        """Some of the rows (B,)."""
        return _Rows(
            self.index[chosen],
            self.slots[chosen],
            self.num_tokens[chosen],
            self.known[chosen],
            self.newest,
        )


class _Request(NamedTuple):
    """A request as V1 describes it: lists that vLLM goes on writing to."""

    params: Any
    prompt: list[int] | None
    output: list[int]

    def goes_on_as(self, other: _Request, num_seen: int) -> bool:
        """Whether the other one is this one, back in the batch, with one new token at most."""
        return (
            num_seen >= len(other.output) - 1
            and self.params is other.params
            and self.prompt is other.prompt
            and self.output[:num_seen] == other.output[:num_seen]
        )


class _V1Slots:
    """Gives the requests of V1's batch slots, since their rows change.

    Those that have left keep theirs until it is needed: vLLM also takes requests out of the batch
    that it puts back later.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.num_slots, self.device = max_num_reqs + _NUM_SPARE, device
        self._requests: dict[int, _Request] = {}
        self._slots: dict[int, int] = {}
        # In the order in which their requests have left.
        self._free: dict[int, None] = dict.fromkeys(range(self.num_slots))

    def update(self, update: Any, num_seen: Index) -> list[tuple[int, Any]]:
        """Follows a `BatchUpdate`: removed, then added, then moved.

        Args:
            update: What has changed.
            num_seen: (S,) generated tokens that have been seen of each slot's request.

        Returns:
            Slots that have new requests, and their sampling parameters.
        """
        before = list(self._slots.values())
        for row in update.removed:
            self._slots.pop(row, None)
        for number, (row, *_) in enumerate(update.added):
            self._slots[row] = ~number  # a slot is found below
        for source, target, direction in update.moved:
            self._move(source, target, direction == MoveDirectionality.SWAP)
        after = set(self._slots.values())
        self._free |= dict.fromkeys(slot for slot in before if slot not in after)
        joined = []
        for row, number in self._slots.items():
            if number < 0:
                request = _Request(*update.added[~number][1:])
                slot = self._slot_of(request, num_seen)
                if slot is None:
                    slot = next(iter(self._free))
                    joined.append((slot, request.params))
                del self._free[slot]
                self._slots[row], self._requests[slot] = slot, request
        return joined

    def _move(self, source: int, target: int, swaps: bool) -> None:
        coming, going = self._slots.pop(source, None), self._slots.pop(target, None)
        if coming is not None:
            self._slots[target] = coming
        if swaps and going is not None:
            self._slots[source] = going

    def _slot_of(self, request: _Request, num_seen: Index) -> int | None:
        """The slot that a request had before, if it still is its own."""
        for slot in reversed(self._free):  # it may have had others even before
            before = self._requests.get(slot)
            if before is not None and before.goes_on_as(request, int(num_seen[slot])):
                return slot
        return None

    def rows(self, _: object) -> _Rows:
        """The rows of this step."""
        index = np.fromiter(self._slots.keys(), np.int64, len(self._slots))
        slots = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        outputs = [self._requests[slot].output for slot in slots.tolist()]
        num_tokens = np.array([len(output) for output in outputs], dtype=np.int64)
        newest = np.zeros(len(index), dtype=np.int64)
        newest[index] = [output[-1] if output else 0 for output in outputs]
        return _Rows(index, slots, num_tokens, newest[index] >= 0, _on(self.device, newest))

    def prompt(self, slot: int) -> list[int]:
        """A prompt's tokens; none if it has only embeddings."""
        return self._requests[slot].prompt or []

    def generated(self, spans: Sequence[Span]) -> list[list[int]]:
        """Generated tokens in each of some spans."""
        return [self._requests[slot].output[start:stop] for slot, start, stop in spans]


class _V2Slots:
    """The slots that V2 itself gives to requests."""

    def __init__(self, req_states: Any) -> None:
        self.num_slots: int = req_states.max_num_reqs
        self.device: torch.device = req_states.device
        self._states = req_states

    def rows(self, ctx: Any) -> _Rows:
        """The rows of this step."""
        slots = ctx.idx_mapping_np.astype(np.int64)
        length = ctx.seq_lens_upper_bound_np[: len(slots)].astype(np.int64)
        prompt = self._states.prompt_len.np[slots]
        # vLLM throws away what a prompt's earlier chunks give, and warms up without prompts.
        counts = (length >= self._states.prefill_len.np[slots]) & (prompt > 0)
        everyone = np.arange(len(slots))
        rows = _Rows(everyone, slots, length - prompt, everyone >= 0, ctx.input_ids)
        return rows.only(counts)

    def prompt(self, slot: int) -> list[int]:
        """A prompt's tokens."""
        tokens: list[int] = self._tokens[slot, : self._states.prompt_len.np[slot]].tolist()
        return tokens

    def generated(self, spans: Sequence[Span]) -> list[list[int]]:
        """Generated tokens in each of some spans: one copy."""
        lengths = [stop - start for _, start, stop in spans]
        slots = np.repeat([slot for slot, *_ in spans], lengths)
        places = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        places += self._states.prompt_len.np[slots]
        found = self._tokens[_on(self.device, slots), _on(self.device, places)].cpu()
        return [part.tolist() for part in found.split(lengths)]

    @property
    def _tokens(self) -> Tensor:
        """(slots, places) of prompts and what was generated."""
        tokens: Tensor = self._states.all_token_ids.gpu
        return tokens


class _Watch:
    """Watches requests in slots, decides about their thoughts and closes them.

    Args:
        head: The policy.
        rules: How thoughts are read and closed.
        num_slots: S.
        vocab_size: V.
        device: The LM's.
        tells: Whether to log what happens.
    """

    def __init__(
        self,
        head: HaltHead,
        rules: ThoughtRules,
        num_slots: int,
        vocab_size: int,
        device: torch.device,
        tells: bool,
    ) -> None:
        self._rules, self._device, self._tells = rules, device, tells
        self._markers = _single_tokens(rules)
        signals = signals_of(head.config.observing.groups)
        self._monitor = HaltMonitor(head, num_slots)
        self._meter = SignalReducer(rules, signals, num_slots, device)
        self._close = torch.tensor(rules.close_ids, device=device)
        self.counts = HaltCounts()
        self._thoughts: list[Thought | None] = [None] * num_slots
        #: (S,) tokens generated at the newest row of each slot; -1 before the first.
        self.num_tokens: Index = np.full(num_slots, -1)
        # (S,) whether the head decides; whether it or the cap may still close the thought; the
        # cap; and where the thought was closed, or -1.
        self._decides: Bools = np.zeros(num_slots, dtype=np.bool_)
        self._open: Bools = np.zeros(num_slots, dtype=np.bool_)
        self._max_tokens = np.full(num_slots, np.inf)
        self._halted_at: Index = np.full(num_slots, -1)
        # (S,) whether something else than the close text came; (S, V) what the next token is
        # drawn from.
        self._strays = torch.zeros(num_slots, dtype=torch.bool, device=device)
        width = vocab_size if self._meter.needs_logits else 0
        self._logits = torch.zeros(num_slots, width, device=device)

    def join(self, slot: int, terms: Terms) -> bool:
        """Gives a slot to a new request; whether anything can halt that."""
        row = np.array([slot])
        self._monitor.reset(row, terms)
        self._meter.reset(row)
        self._thoughts[slot] = None
        self.num_tokens[slot] = self._halted_at[slot] = -1
        self._max_tokens[slot] = np.inf if terms.max_tokens is None else terms.max_tokens
        self._strays[slot] = False
        self._decides[slot] = terms.price > 0
        self._open[slot] = terms.price > 0 or terms.max_tokens is not None
        return bool(self._open[slot])

    @torch.inference_mode()
    def step(self, rows: _Rows, source: _V1Slots | _V2Slots, logits: Tensor) -> None:
        """Between the LM and the choice of its next tokens: may change logits (rows, V)."""
        is_active = self._is_active(rows.slots)
        self.num_tokens[rows.slots[~is_active]] = rows.num_tokens[~is_active]
        rows = rows.only(is_active)
        if not len(rows.index):
            return
        is_new = self._take_in(rows)
        self._decide(rows, is_new, source, logits)
        self._keep(rows, logits)
        self._force(rows, logits)

    def _is_active(self, slots: Index) -> Bools:
        """Which slots (B,) are watched or being closed."""
        halted_at = self._halted_at[slots]
        closing = (halted_at >= 0) & (self.num_tokens[slots] - halted_at < len(self._close))
        active: Bools = self._open[slots] | closing
        return active

    def _take_in(self, rows: _Rows) -> Bools:
        """Measures the newest tokens; (B,) which rows have had none of them before."""
        before = self.num_tokens[rows.slots]
        grown = rows.num_tokens == before + 1
        self._lose(rows.slots[~grown & (rows.num_tokens != before)])
        self._lose(rows.slots[~rows.known])
        self._open[rows.slots[~rows.known]] = False
        self.num_tokens[rows.slots] = rows.num_tokens
        self.counts.num_requests += int((grown & (before < 0)).sum())
        is_new: Bools = grown & (before >= 0)
        measured = np.flatnonzero(is_new & self._decides[rows.slots])
        if len(measured):
            slots = rows.slots[measured]
            led = self._logits[self._on(slots)]
            newest = rows.newest[self._on(rows.index[measured])]
            self._meter.add(slots, led, newest.long())
        return is_new

    def _decide(
        self, rows: _Rows, is_new: Bools, source: _V1Slots | _V2Slots, logits: Tensor
    ) -> None:
        """Halts those rows at decision points that the head wants to halt, or at their cap."""
        every, num = self._rules.every, rows.num_tokens
        may_be_point = self._decides[rows.slots] & (num % every == 0 if every else True)
        capped = self._open[rows.slots] & (num >= self._max_tokens[rows.slots])
        looked = np.flatnonzero(is_new & may_be_point | capped)
        if not len(looked):
            return
        slots, num = rows.slots[looked], num[looked]
        thoughts = self._catch_up(slots, num, source)
        self._end(slots[[thought.closed for thought in thoughts]])
        at_point = np.flatnonzero([thought.at_point for thought in thoughts])
        at_point = at_point[self._decides[slots[at_point]]]
        if len(at_point):
            passed = [thoughts[i] for i in at_point.tolist()]
            self._ask(slots[at_point], passed, logits[self._on(rows.index[looked[at_point]])])
        at_cap = capped[looked] & [thought.begun and not thought.closed for thought in thoughts]
        self._monitor.cap(slots[at_cap], num[at_cap])
        for i in np.flatnonzero(self._monitor.halted[slots]).tolist():
            self._halt(int(slots[i]), thoughts[i])

    def _catch_up(
        self, slots: Index, num_tokens: Index, source: _V1Slots | _V2Slots
    ) -> list[Thought]:
        """The thoughts of some slots, up to their newest tokens."""
        thoughts = []
        for slot in slots.tolist():
            thought = self._thoughts[slot]
            if thought is None:
                text = self._end_of_prompt(source.prompt(slot))
                thought = self._thoughts[slot] = Thought(self._rules, text)
            thoughts.append(thought)
        starts = [thought.num_tokens for thought in thoughts]
        spans = list(zip(slots.tolist(), starts, num_tokens.tolist(), strict=True))
        for thought, tokens in zip(thoughts, source.generated(spans), strict=True):
            for token in tokens:
                thought.add(token)
        return thoughts

    def _end_of_prompt(self, prompt: list[int]) -> str:
        """Enough of a prompt's text to tell whether it ends in a thought."""
        if not self._rules.think_start:
            return ""
        if len(self._markers) < 2:
            return self._rules.decode(prompt, skip_special_tokens=False)
        return next((self._markers[t] for t in reversed(prompt) if t in self._markers), "")

    def _ask(self, slots: Index, thoughts: list[Thought], logits: Tensor) -> None:
        """Asks the head about slots (B,) at decision points."""
        signals = self._meter.read(slots, thoughts, logits)
        self._meter.reset(slots)
        before = self._monitor.num_bad_signals[slots].sum()
        self._monitor.observe(signals, slots)
        self.counts.num_bad_signals += int(self._monitor.num_bad_signals[slots].sum() - before)

    def _halt(self, slot: int, thought: Thought) -> None:
        """Begins to close a thought."""
        self._halted_at[slot] = self.num_tokens[slot]
        self._end(np.array([slot]))
        is_capped = bool(thought.position >= self._max_tokens[slot])
        self.counts.num_capped += is_capped
        self.counts.num_halted += not is_capped
        if self._tells:
            _log.info(
                "haltwise %s a thought at %d tokens, decision point %d, price %g "
                "(so far %d halted and %d capped, of %d requests)",
                "capped" if is_capped else "halted",
                thought.position,
                thought.num_points,
                self._monitor.price[slot],
                self.counts.num_halted,
                self.counts.num_capped,
                self.counts.num_requests,
            )

    def _keep(self, rows: _Rows, logits: Tensor) -> None:
        """Keeps what the next tokens are drawn from, where they will be measured."""
        kept = np.flatnonzero(self._decides[rows.slots])
        if len(kept) and self._meter.needs_logits:
            self._logits[self._on(rows.slots[kept])] = logits[self._on(rows.index[kept])]

    def _force(self, rows: _Rows, logits: Tensor) -> None:
        """Lets nothing but the close text follow a halted thought.

        Where its next token is comes from the number of tokens, never from what they are: those
        that vLLM shows may be old. Nothing more is forced where another token came.
        """
        place = rows.num_tokens - self._halted_at[rows.slots]
        closing = (self._halted_at[rows.slots] >= 0) & (place >= 0) & (place < len(self._close))
        chosen = np.flatnonzero(closing)
        if not len(chosen):
            return
        slots, index = self._on(rows.slots[chosen]), self._on(rows.index[chosen])
        at, newest = self._on(place[chosen]), rows.newest[index]
        came = (at == 0) | (newest < 0) | (newest == self._close[at - 1])
        self._strays[slots] |= ~came
        token = self._close[at]
        own = logits[index, token]
        forced = ~self._strays[slots] & (own != -torch.inf)
        logits[index] = torch.where(forced[:, None], -torch.inf, logits[index])
        logits[index, token] = torch.where(forced, 0.0, own)

    def _lose(self, slots: Index) -> None:
        """Leaves the thoughts of some slots to the LM and their caps."""
        self.counts.num_lost += int(self._decides[slots].sum())
        self._decides[slots] = False
        for slot in slots.tolist():
            self._thoughts[slot] = None

    def _end(self, slots: Index) -> None:
        """Looks at some slots no more."""
        self._decides[slots] = self._open[slots] = False

    def _on(self, index: Index) -> Tensor:
        return _on(self._device, index)


def _single_tokens(rules: ThoughtRules) -> dict[int, str]:
    """The markers of a thought that are one token each."""
    markers = {}
    for text in (rules.think_start, rules.think_end):
        tokens = rules.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) == 1:
            markers[tokens[0]] = text
    return markers


def _on(device: torch.device, index: Index) -> Tensor:
    """On a device, without waiting for it."""
    host = torch.from_numpy(index)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
