"""Many prompts by a few slots: a slot whose answer is known goes to the next prompt at once.

A fixed batch runs until its longest row has ended, whatever the others save; here time follows
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haltwise.engine.decoder import Decoder
from haltwise.engine.fingerprint import check_tokenizer
from haltwise.errors import InputError
from haltwise.policy.features import signals_of
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index
from haltwise.session.monitor import HaltMonitor
from haltwise.session.rows import Reason, RowReport
from haltwise.session.terms import Terms
from haltwise.session.thought import Probe


@dataclass(frozen=True)
class BatchAnswer:
    """One prompt's answer."""

    index: int
    """Of the prompt."""
    ids: list[int]
    """All that follows the prompt, up to the end token."""
    report: RowReport


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: HaltHead,
    prompts: Iterable[str],
    num_slots: int,
    max_new_tokens: int,
    price: float | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[BatchAnswer]:
    """Answers prompts in refilled slots, with a head that halts their thoughts.

    What a prompt gets depends on itself and the seed alone, not on the other slots. A row that is
    not halted gets the tokens of a plain `generate`, if greedy.

    Args:
        model: The LM: decoder-only, with full attention in every layer.
        tokenizer: Its tokenizer.
        head: The policy.
        prompts: The LM's whole inputs; taken one by one as slots become free.
        num_slots: Prompts at once.
        max_new_tokens: Tokens of an answer, thought included.
        price: In exact match per 1,000 tokens; default the head's own. At 0 the head never halts.
        min_tokens: Thinking tokens before which the head does not halt.
        max_tokens: Thinking tokens at which a thought is closed, whatever the head says.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling.

    Returns:
        Each answer as soon as it is known.

    Raises:
        InputError: If a setting makes no sense, the LM or the head cannot be run, the tokenizer is
            not the head's, or a prompt is empty or too long.
    """
    for name, count in (("num_slots", num_slots), ("max_new_tokens", max_new_tokens)):
        if count < 1:
            raise InputError(f"{name} is {count}, expected at least 1")
    check_tokenizer(head, tokenizer)
    terms = Terms(head.config.default_price if price is None else price, min_tokens, max_tokens)
    decoder = Decoder(
        model,
        tokenizer,
        head.config.halting,
        num_slots,
        max_new_tokens,
        temperature,
        signals=signals_of(head.config.observing.groups) if terms.price else (),
    )
    return _Job(head, decoder, terms).run(prompts, seed)


class _Job:
    """A decoder whose slots are halted by a head, and refilled."""

    def __init__(self, head: HaltHead, decoder: Decoder, terms: Terms) -> None:
        self._decoder, self._terms = decoder, terms
        self._monitor = HaltMonitor(head, decoder.num_slots)
        self._looks = head.config.halting.probing == "always"
        # Slots in use, by number, with the prompt that each works on.
        self._running: dict[int, BatchAnswer] = {}

    def run(self, prompts: Iterable[str], seed: int) -> Iterator[BatchAnswer]:
        """Yields each answer as soon as it is known."""
        waiting = enumerate(prompts)
        while True:
            self._refill(waiting, seed)
            if not self._running:
                return
            slots = np.array(list(self._running))
            at_point = self._decoder.advance(slots)
            answers = self._halt(slots, at_point)
            for slot in slots.tolist():
                if slot in answers or self._decoder.generations[slot].ended:
                    yield self._finish(slot, answers.get(slot))

    def _refill(self, waiting: Iterator[tuple[int, str]], seed: int) -> None:
        """Gives free slots to the next prompts."""
        free = [slot for slot in range(self._decoder.num_slots) if slot not in self._running]
        fresh = dict(zip(free, waiting, strict=False))
        slots, prompts = np.array(list(fresh), dtype=np.int64), [text for _, text in fresh.values()]
        self._decoder.start(slots, prompts, [seed] * len(slots), self._terms.max_tokens)
        self._monitor.reset(slots, self._terms)
        for slot, (index, _) in fresh.items():
            self._running[slot] = BatchAnswer(index, [], RowReport(self._terms.price))

    def _halt(self, slots: Index, at_point: NDArray[np.bool_]) -> dict[int, Probe]:
        """Halts some of slots (B,); their answers, by slot, if they are known by that."""
        generations, probes = self._decoder.generations, dict[int, Probe]()
        capped = [slot for slot in slots.tolist() if generations[slot].at_cap]
        here, halted = slots[at_point], []
        # At a price of 0 nobody asks the head.
        if len(here) and self._terms.price:
            if self._looks:
                probes = self._force(here)
            signals = self._decoder.signals(here, list(probes.values()) if self._looks else None)
            halted = here[self._monitor.observe(signals, here)].tolist()
        halting = list(dict.fromkeys([*halted, *capped]))
        for slot in halting:
            reason: Reason = "capped" if slot in capped else "halted"
            self._running[slot].report.reason = reason
        if not self._looks:
            self._decoder.close(np.array(halting, dtype=np.int64))
            return {}
        unseen = [slot for slot in halting if slot not in probes]
        probes |= self._force(np.array(unseen, dtype=np.int64))
        return {slot: probes[slot] for slot in halting}

    def _force(self, slots: Index) -> dict[int, Probe]:
        """Forces the answers of slots (B,)."""
        probes = dict(zip(slots.tolist(), self._decoder.force(slots), strict=True))
        for slot, probe in probes.items():
            self._running[slot].report.num_probe_tokens += probe.num_tokens
        return probes

    def _finish(self, slot: int, probe: Probe | None) -> BatchAnswer:
        """Frees a slot whose LM has ended, or whose forced answer is known."""
        done, generation = self._running.pop(slot), self._decoder.generations[slot]
        thought, report = generation.thought, done.report
        done.ids.extend(thought.tokens)
        if probe:
            report.answer = probe.answer
            done.ids.extend(
                [*self._decoder.rules.close_ids, *probe.tokens, self._decoder.eos_ids[0]]
            )
        elif not report.halted and (thought.closed or generation.finished):
            report.reason = "closed by the LM"
        del done.ids[self._decoder.max_tokens :]
        report.position = thought.position
        report.num_bad_signals = int(self._monitor.num_bad_signals[slot])
        return done
