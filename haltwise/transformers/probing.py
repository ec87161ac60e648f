"""Halting inside transformers' `generate`.

    halter = ProbingGeneration(HaltHead.load(folder), tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, custom_generate=halter)
    halter.report

Rows that are not halted get exactly the tokens that `generate` gives without a halter.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from haltwise.engine.decoder import end_tokens
from haltwise.engine.fingerprint import check_tokenizer, tokenizer_fingerprint
from haltwise.engine.fork import Fork, check_forkable
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.slots import HiddenTap, greedy_answers
from haltwise.errors import InputError
from haltwise.policy.features import signals_of
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index
from haltwise.session.rows import RowReport, monitor_of, row_terms
from haltwise.session.terms import Terms
from haltwise.session.thought import Probe, Thought, ThoughtRules
from haltwise.transformers.processor import HaltProcessor, force_next

__all__ = ["HaltProcessor", "ProbingGeneration", "RowReport", "tokenizer_fingerprint"]


class ProbingGeneration:
    """Lets a head halt the rows of `generate`: pass it as `custom_generate`.

    Works with greedy decoding and sampling, any cache, any logits processors and stopping criteria,
    and left padding. A halted row gets the close text, the answer that was probed, and the end
    token; max_new_tokens holds for them too. transformers passes no streamer on. For a head that
    does not look at answers see also `HaltProcessor`, which lets the LM answer by itself.

    Args:
        head: The policy.
        tokenizer: The LM's.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own. A row
            at a price of 0 is never halted by the head.
        min_tokens: Thinking tokens before which the head does not halt: one, or one a row.
        max_tokens: Thinking tokens at which a thought is closed, whatever the head says: one, or
            one a row; None for no such cap.

    Raises:
        InputError: If the tokenizer is not the one that the head was trained with, or the head's
            halting conditions cannot be run.
    """

    def __init__(
        self,
        head: HaltHead,
        tokenizer: PreTrainedTokenizerBase,
        price: Any = None,
        min_tokens: Any = 0,
        max_tokens: Any = None,
    ) -> None:
        """Checks that head and tokenizer fit."""
        check_tokenizer(head, tokenizer)
        self.head = head
        self.asked = (price, min_tokens, max_tokens)
        self.rules = ThoughtRules(tokenizer, head.config.halting)
        #: One entry a row, of the latest call.
        self.report: list[RowReport] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Generates as `model._sample` does; called by `generate`.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        if (generation_config.num_beams or 1) > 1:
            found = generation_config.num_beams
            raise InputError(f"num_beams is {found}: a halter needs greedy decoding or sampling")
        check_forkable(model, model_kwargs.get("past_key_values"))
        batch = _Batch(self, model, input_ids, generation_config, model_kwargs)
        # transformers' own loop runs: one that is watched, and told what to take.
        with batch.tap or nullcontext():
            out: Any = GenerationMixin._sample(
                cast(Any, model),
                input_ids,
                logits_processor=LogitsProcessorList([_Raw(batch), *logits_processor, batch]),
                stopping_criteria=_Watched(stopping_criteria, batch),
                generation_config=generation_config,
                **model_kwargs,
            )
        if batch.ends_early:
            out = batch.append_known(out, stopping_criteria)
        self.report = batch.report()
        return out


@dataclass
class _Row:
    """One row of a batch."""

    thought: Thought
    report: RowReport
    terms: Terms
    pending: deque[int] = field(default_factory=deque)
    """Tokens of a halted row that are known but not generated."""
    ended: bool = False
    """Whether a stopping criterion has been met."""

    @property
    def is_known(self) -> bool:
        """Whether what follows needs no LM."""
        return self.ended or self.report.halted

    @property
    def at_point(self) -> bool:
        """Whether there is something to decide; at a price of 0 there never is."""
        return self.thought.at_point and not self.is_known and self.terms.price > 0

    @property
    def at_cap(self) -> bool:
        """Whether an open thought has reached its cap."""
        is_open = self.thought.begun and not (self.thought.closed or self.is_known)
        cap = self.terms.max_tokens
        return is_open and cap is not None and self.thought.position >= cap


class _Batch(LogitsProcessor):
    """A batch that transformers generates: decides at its decision points and forces tokens."""

    def __init__(
        self,
        halter: ProbingGeneration,
        model: PreTrainedModel,
        input_ids: LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        head, self.rules = halter.head, halter.rules
        terms = row_terms(head, len(input_ids), *halter.asked)
        self.monitor = monitor_of(head, terms)
        self.meter = SignalReducer(
            self.rules, signals_of(head.config.observing.groups), len(input_ids), model.device
        )
        self.everyone = np.arange(len(input_ids))
        self.meter.reset(self.everyone)
        self.tap = HiddenTap(model) if self.meter.needs_hidden else None
        self.model, self.halting = model, head.config.halting
        self.cache, self.mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        self.eos_ids = end_tokens(generation_config)
        pad = generation_config._pad_token_tensor
        assert pad is not None  # transformers pads with the end token if there is no other
        self.pad_id = int(pad)
        # Scores and the like are wanted for every step.
        self.ends_early = not generation_config.return_dict_in_generate
        prompts = [self.rules.decode(row, skip_special_tokens=False) for row in input_ids.tolist()]
        self.rows = [
            _Row(Thought(self.rules, prompt), RowReport(term.price), term)
            for prompt, term in zip(prompts, terms, strict=True)
        ]

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Called between the LM and the choice of its next tokens."""
        points = [i for i, row in enumerate(self.rows) if row.at_point]
        if points:
            self.decide(np.array(points))
        # A cap may lie between decision points.
        capped = np.array([i for i, row in enumerate(self.rows) if row.at_cap], dtype=np.int64)
        self.halt(capped, self.probe(capped))
        return force_next(scores, [row.pending for row in self.rows])

    @property
    def is_known(self) -> bool:
        """Whether what follows needs no LM in any row."""
        return all(row.is_known for row in self.rows)

    def see(self, logits: Tensor) -> None:
        """Keeps what the LM itself gives (B, V), before anything is done to it."""
        # A processor may write into it.
        self.logits = logits.clone() if self.meter.needs_logits else logits
        self.hidden = self.tap.latest if self.tap else None

    def measure(self, tokens: Tensor) -> None:
        """Measures the newest token (B,) of every row."""
        self.meter.add(self.everyone, self.logits, tokens)

    def take_in(self, tokens: list[int], done: list[int]) -> None:
        """Reads the newest token of every row, and whether the row ends with it."""
        for row, token, ends in zip(self.rows, tokens, done, strict=True):
            if not row.is_known:
                row.thought.add(token)
            row.ended |= bool(ends)

    def decide(self, points: Index) -> None:
        """Halts those rows at decision points that the head wants to halt."""
        looks = self.halting.probing == "always"
        passed, probes = points, {}
        if looks:
            probes = self.probe(points)
            points = np.array(list(probes), dtype=np.int64)
        signals = self.meter.read(
            points,
            [self.rows[i].thought for i in points.tolist()],
            self.logits[points],
            None if self.hidden is None else self.hidden[points],
            list(probes.values()) if looks else None,
        )
        self.meter.reset(passed)
        halting = points[self.monitor.observe(signals, points)]
        self.halt(halting, probes if looks else self.probe(halting))

    def halt(self, rows: Index, probes: dict[int, Probe]) -> None:
        """Closes the thoughts of rows (B,) with the answers that were tried out, if sound."""
        for i in rows.tolist():
            if i in probes:
                row, probe = self.rows[i], probes[i]
                row.report.reason = "capped" if row.at_cap else "halted"
                row.report.answer = probe.answer
                row.pending.extend([*self.rules.close_ids, *probe.tokens, self.eos_ids[0]])

    def probe(self, rows: Index) -> dict[int, Probe]:
        """Forces the answers of some rows; those whose logits are not numbers are left out."""
        if not len(rows):
            return {}
        fork = Fork(self.model, self.cache, self.mask, rows)
        logits = fork.feed(np.arange(len(rows)), np.tile(self.rules.close_ids, (len(rows), 1)))
        answers = greedy_answers(
            logits, fork.step, self.halting.max_answer_tokens, self.eos_ids, self.rules
        )
        sound = {}
        for i, answer in zip(rows.tolist(), answers, strict=True):
            report = self.rows[i].report
            report.num_probe_tokens += answer.num_tokens
            if np.isfinite(answer.logprobs).all():
                sound[i] = self.rules.read(answer)
            else:
                report.num_bad_signals += 1
        return sound

    def append_known(self, ids: Tensor, criteria: StoppingCriteriaList) -> Tensor:
        """Adds what is pending in each row (B, T), without running the LM for it."""
        while any(row.pending and not row.ended for row in self.rows):
            column = [
                row.pending.popleft() if row.pending and not row.ended else self.pad_id
                for row in self.rows
            ]
            ids = torch.cat([ids, ids.new_tensor(column)[:, None]], dim=1)
            self.take_in(column, criteria(ids, None).tolist())
        return ids

    def report(self) -> list[RowReport]:
        """The final report, one entry a row."""
        for row, num in zip(self.rows, self.monitor.num_bad_signals.tolist(), strict=True):
            thought, row.report.position = row.thought, row.thought.position
            row.report.num_bad_signals += num
            if not row.report.halted and (thought.closed or thought.tokens[-1] in self.eos_ids):
                row.report.reason = "closed by the LM"
        return [row.report for row in self.rows]


class _Raw(LogitsProcessor):
    """Stands before all other processors and shows a batch what the LM itself gives."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Called after each forward pass of the batch, not of its probes."""
        self._batch.see(scores)
        return scores


class _Watched(StoppingCriteriaList):
    """Stopping criteria that show a batch what it has generated, and stop it when all is known."""

    def __init__(self, criteria: StoppingCriteriaList, batch: _Batch) -> None:
        super().__init__(criteria)
        self._batch = batch

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Called after each step: which rows to stop, (B,)."""
        done = super().__call__(input_ids, scores, **kwargs)
        newest = torch.stack([input_ids[:, -1], done.long()])
        self._batch.measure(newest[0])
        self._batch.take_in(*newest.tolist())
        return done | self._batch.ends_early & self._batch.is_known
