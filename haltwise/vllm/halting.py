"""Requests in the slots of a vLLM engine: what they show, and how their thoughts are closed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haltwise import Control, HaltHead, Session, Signals, ThoughtRequest
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Bools, Index
from haltwise.session.control import ConstantControl
from haltwise.session.thought import LONGEST_OPENING, NEVER, Thought
from haltwise.vllm.slots import StepRows, V1Slots, V2Slots, on_device

# Under vLLM's own logger: it is the one that vLLM shows.
log = logging.getLogger("vllm.haltwise")


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


class SlotHalting:
    """Shows a session what requests in slots generate, and closes the thoughts that it halts.

    Args:
        head: The policy.
        rules: How thoughts are read and closed.
        num_slots: S.
        vocab_size: V.
        device: The LM's.
        tells: Whether to log what happens.
        control: Sets terms and prices.
        free_answers: Whether answers behind thoughts that were closed here are left to requests'
            own sampling, instead of being the likeliest tokens.
    """

    def __init__(
        self,
        head: HaltHead,
        rules: TokenRules,
        num_slots: int,
        vocab_size: int,
        device: torch.device,
        tells: bool,
        control: Control,
        free_answers: bool,
    ) -> None:
        """Starts without a request."""
        self._rules, self._device, self._tells = rules, device, tells
        self._free_answers = free_answers
        self._markers = _single_tokens(rules)
        # The marker with which a thought begins, if it is one token.
        self._start = next((t for t, s in self._markers.items() if s == rules.think_start), None)
        self._session = Session(head, num_slots, control)
        self._reducer = SignalReducer(rules, head.config.observing.signals, num_slots, device)
        self._close = torch.tensor(rules.close_ids, device=device)
        self.counts = HaltCounts()
        # vLLM's sampling parameters of the request in each slot: they say where it ends.
        self._params: dict[int, Any] = {}
        #: (S,) tokens generated at the newest row of each slot; -1 before the first.
        self.num_tokens: Index = np.full(num_slots, -1)
        # (S,) tokens after which the close text begins, or -1.
        self._halted_at: Index = np.full(num_slots, -1)
        # (S,) whether what follows the close text is to be the likeliest tokens, and is not anyway.
        self._likeliest: Bools = np.zeros(num_slots, dtype=np.bool_)
        # (S,) whether the thought is closed as soon as it begins, which the device sees by itself;
        # and the tokens after which it did, where the device can see them.
        self._armed: Bools = np.zeros(num_slots, dtype=np.bool_)
        self._opened_at = torch.full((num_slots,), NEVER, device=device)
        # (S,) whether something else than the close text came; (S, V) what the next token is
        # drawn from.
        self._strays = torch.zeros(num_slots, dtype=torch.bool, device=device)
        width = vocab_size if self._reducer.needs_logits else 0
        self._logits = torch.zeros(num_slots, width, device=device)

    def leave(self, slot: int, source: V1Slots | V2Slots) -> None:
        """Tells how a request has ended that has left its slot; one that is not over may come back.

        Args:
            slot: There may have been none.
            source: Still has its tokens.
        """
        num = int(self.num_tokens[slot])
        if slot not in self._session.running or num < 0:
            return
        thought, is_armed = self._session.running[slot].thought, bool(self._armed[slot])
        if is_armed or not isinstance(self._session.control, ConstantControl):
            self._catch_up(np.array([slot]), np.array([num + 1]), source)
        if is_armed and thought.at_cap and thought.num_tokens <= num:  # the device closed it there
            self._session.note_halted(slot, "capped")
            self._halt(slot)
        elif not thought.ended and num + 1 >= (self._params[slot].max_tokens or NEVER):
            thought.end(by_lm=False)
        if thought.is_over or self._session.running[slot].report.decided:
            self._session.finish(slot)

    def join(self, slot: int, request: ThoughtRequest, params: Any) -> bool:
        """Gives a slot to a new request; returns whether anything can halt that.

        Args:
            slot: Another request that is there is told of as broken off, if it is still running.
            request: What is asked.
            params: vLLM's sampling parameters.
        """
        self._params[slot] = params
        self._reducer.reset(np.array([slot]))
        self.num_tokens[slot] = self._halted_at[slot] = -1
        self._armed[slot], self._opened_at[slot], self._strays[slot] = False, NEVER, False
        self._likeliest[slot] = not self._free_answers and params.temperature > 0
        return self._session.join(slot, request, Thought(self._rules))

    @torch.inference_mode()
    def step(self, rows: StepRows, source: V1Slots | V2Slots, logits: Tensor) -> None:
        """Runs between the LM and the choice of its next tokens: may change logits (rows, V)."""
        is_active = self._is_active(rows.slots)
        self.num_tokens[rows.slots[~is_active]] = rows.num_tokens[~is_active]
        rows = rows.only(is_active)
        if len(rows.index):
            self._take_in(rows)
            self._decide(rows, source, logits)
            self._keep(rows, logits)
            self._force(rows, logits)

    def _is_active(self, slots: Index) -> Bools:
        """Returns which slots (B,) are watched, being closed, or given likeliest tokens."""
        halted_at = self._halted_at[slots]
        closing = self.num_tokens[slots] - halted_at < len(self._close)
        return self._session.open[slots] | (halted_at >= 0) & (closing | self._likeliest[slots])

    def _take_in(self, rows: StepRows) -> None:
        """Measures the newest tokens."""
        before = self.num_tokens[rows.slots]
        grown = rows.num_tokens == before + 1
        lost = rows.slots[~grown & (rows.num_tokens != before) | ~rows.known]
        for slot in lost[self._session.open[lost]].tolist():  # left to the LMs and their caps
            self.counts.num_lost += int(self._session.watched[slot])
            self._session.lose(slot)
        for slot in rows.slots[~rows.known & self._session.open[rows.slots]].tolist():
            self._session.release(slot)
        self.num_tokens[rows.slots] = rows.num_tokens
        self.counts.num_requests += int((grown & (before < 0)).sum())
        measured = np.flatnonzero(grown & (before >= 0) & self._session.watched[rows.slots])
        if len(measured):
            slots = rows.slots[measured]
            led = self._logits[self._on(slots)]
            newest = rows.newest[self._on(rows.index[measured])]
            self._reducer.add(slots, led, newest.long())

    def _decide(self, rows: StepRows, source: V1Slots | V2Slots, logits: Tensor) -> None:
        """Lets the session decide about rows that may wait, and begins to close those it halts."""
        session, num, every = self._session, rows.num_tokens, self._rules.every
        due = session.open[rows.slots] & (num >= session.next_look[rows.slots])
        if every:  # what is armed needs the host no more than anything else
            due &= ~self._armed[rows.slots] | (num % every == 0)
        looked = np.flatnonzero(due)
        if not len(looked):
            return
        slots = rows.slots[looked]
        self._catch_up(slots, num[looked], source)

        def read(points: Index, thoughts: list[Thought]) -> Signals:
            index = rows.index[looked[np.isin(slots, points)]]
            return self._reducer.read(points, thoughts, logits[self._on(index)])

        for slot in session.decide(slots.tolist(), read):
            self._halt(slot)
        self.counts.num_bad_signals = session.num_bad_signals
        self._settle(slots)

    def _catch_up(self, slots: Index, num_tokens: Index, source: V1Slots | V2Slots) -> None:
        """Brings the thoughts of some slots up to their newest tokens, or to their cap."""
        thoughts = [self._session.running[slot].thought for slot in slots.tolist()]
        for slot, thought in zip(slots.tolist(), thoughts, strict=True):
            if not thought.tokens:
                thought.read_prompt(self._end_of_prompt(source.prompt(slot)))
        starts = [thought.num_tokens for thought in thoughts]
        spans = list(zip(slots.tolist(), starts, num_tokens.tolist(), strict=True))
        generated = source.generated(spans)
        for slot, thought, tokens in zip(slots.tolist(), thoughts, generated, strict=True):
            params = self._params[slot]
            ends = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
            for token in tokens:
                closes = self._armed[slot] and thought.at_cap  # the device does, from there on
                if closes or thought.ended or token < 0:  # a V1 request's last may not be shown
                    break
                thought.add(token)
                if token in ends:
                    thought.end(by_lm=True)

    def _end_of_prompt(self, prompt: list[int]) -> str:
        """Returns enough of a prompt's text to tell whether it ends in a thought."""
        if not self._rules.think_start:
            return ""
        if len(self._markers) < 2:
            return self._rules.decode(prompt, skip_special_tokens=False)
        return next((self._markers[t] for t in reversed(prompt) if t in self._markers), "")

    def _settle(self, slots: Index) -> None:
        """Notes which of some slots are armed, and finishes those with nothing more to decide."""
        for slot in slots.tolist():
            thought = self._session.running[slot].thought
            waits_to_open = thought.cap is not None and thought.num_tokens >= thought.cap
            is_open = bool(self._session.open[slot])
            can_arm = self._start is not None and not thought.begun
            self._armed[slot] = can_arm and is_open and waits_to_open
            if not is_open:
                self._session.finish(slot)

    def _halt(self, slot: int) -> None:
        """Begins to close a thought."""
        running = self._session.running[slot]
        self._halted_at[slot] = running.thought.num_tokens
        capped = running.report.decided == "capped"
        self.counts.num_capped += capped
        self.counts.num_halted += not capped
        if self._tells:
            log.info(
                "haltwise %s a thought at %d tokens, decision point %d, price %g "
                "(so far %d halted and %d capped, of %d requests)",
                running.report.decided,
                running.thought.position,
                running.thought.num_points,
                running.report.price,
                self.counts.num_halted,
                self.counts.num_capped,
                self.counts.num_requests,
            )

    def _keep(self, rows: StepRows, logits: Tensor) -> None:
        """Keeps what the next tokens are drawn from, where they will be measured."""
        kept = np.flatnonzero(self._session.watched[rows.slots])
        if len(kept) and self._reducer.needs_logits:
            self._logits[self._on(rows.slots[kept])] = logits[self._on(rows.index[kept])]

    def _force(self, rows: StepRows, logits: Tensor) -> None:
        """Lets nothing but the close text follow a halted thought, and then the likeliest tokens.

        Where its next token is comes from the number of tokens, never from what they are: those
        that vLLM shows may be old. Nothing more is forced where another token came.
        """
        place, length = rows.num_tokens - self._halted_at[rows.slots], len(self._close)
        halted = (self._halted_at[rows.slots] >= 0) & (place >= 0)
        halted &= (place < length) | self._likeliest[rows.slots]
        chosen = np.flatnonzero(halted | self._armed[rows.slots])
        if not len(chosen):
            return
        slots, index = self._on(rows.slots[chosen]), self._on(rows.index[chosen])
        newest, at = rows.newest[index], self._on(np.where(halted, place, -1)[chosen])
        if self._armed[rows.slots].any():
            at = torch.maximum(at, self._place_since_opened(rows, chosen, newest))
        before = self._close[(at - 1).clamp(0, length - 1)]
        came = (at <= 0) | (at > length) | (newest < 0) | (newest == before)
        self._strays[slots] |= ~came
        closes, given = (at >= 0) & (at < length), logits[index]
        answers = (at >= length) & self._on(self._likeliest[rows.slots[chosen]])
        token = torch.where(closes, self._close[at.clamp(0, length - 1)], given.argmax(dim=-1))
        own = logits[index, token]
        forced = (closes | answers) & ~self._strays[slots] & (own != -torch.inf)
        logits[index] = torch.where(forced[:, None], -torch.inf, given)
        logits[index, token] = torch.where(forced, 0.0, own)

    def _place_since_opened(self, rows: StepRows, chosen: Index, newest: Tensor) -> Tensor:
        """Returns tokens (B,) since armed thoughts have begun, negative before: no host copy."""
        armed = self._armed[rows.slots[chosen]]
        slots, num = self._on(rows.slots[chosen]), self._on(rows.num_tokens[chosen])
        early = rows.num_tokens[chosen] <= LONGEST_OPENING  # later the marker is only mentioned
        opens = self._on(armed & early) & (newest == self._start)
        self._opened_at[slots] = torch.where(
            opens, torch.minimum(self._opened_at[slots], num), self._opened_at[slots]
        )
        return torch.where(self._on(armed), num - self._opened_at[slots], -1)

    def _on(self, index: Index | Bools) -> Tensor:
        return on_device(self._device, index)


def _single_tokens(rules: TokenRules) -> dict[int, str]:
    """Returns the markers of a thought that are one token each."""
    markers = {}
    for text in (rules.think_start, rules.think_end):
        tokens = rules.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) == 1:
            markers[tokens[0]] = text
    return markers
