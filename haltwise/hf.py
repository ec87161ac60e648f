"""Halting inside transformers' `generate`.

    halter = Halter(HaltHead.load(folder), tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, custom_generate=halter)
    halter.report

Rows that are not halted get exactly the tokens that `generate` gives without a halter.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import LongTensor, Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from haltwise.answers import read_answer
from haltwise.decoder import end_tokens
from haltwise.errors import InputError
from haltwise.features import signals_of
from haltwise.head import HaltHead
from haltwise.meter import SignalMeter
from haltwise.monitor import HaltMonitor
from haltwise.signals import Index
from haltwise.slots import HiddenTap, check_supported, greedy_answers
from haltwise.thought import Probe, Thought, ThoughtRules

Reason = Literal["halted", "closed by the LM", "token budget"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every token the same id: 16 hex digits of a SHA-256."""
    vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


@dataclass
class RowReport:
    """What happened to one row of a batch."""

    price: float
    """In exact match per 1,000 tokens."""
    reason: Reason = "token budget"
    """Why the thought ended; "token budget" stands for any stopping criterion."""
    position: int = 0
    """Tokens of the thought."""
    answer: str = ""
    """The forced answer, if the row was halted."""
    num_probe_tokens: int = 0
    """Tokens generated to look at answers; they are no part of the output."""
    num_bad_signals: int = 0
    """Decision points with signals that were not finite; the row went on."""

    @property
    def halted(self) -> bool:
        """Whether the head ended the thought."""
        return self.reason == "halted"


class Halter:
    """Lets a head halt the rows of `generate`: pass it as `custom_generate`.

    Works with greedy decoding and sampling, any logits processors and stopping criteria, and left
    padding. A halted row gets the close text, the answer that was probed, and the end token;
    max_new_tokens holds for them too. transformers passes no streamer on.

    Args:
        head: The policy.
        tokenizer: The LM's.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own.
        read_answer: Reads an answer from a forced answer's text, as the training traces' recorder
            did.
        think_start: Text after which a thought begins.
        think_end: Text with which the LM itself closes a thought.

    Raises:
        InputError: If the tokenizer is not the one that the head was trained with, or the head's
            halting conditions cannot be run.
    """

    def __init__(
        self,
        head: HaltHead,
        tokenizer: PreTrainedTokenizerBase,
        price: float | NDArray[np.float64] | None = None,
        read_answer: Callable[[str], str] = read_answer,
        think_start: str = "<think>",
        think_end: str = "</think>",
    ) -> None:
        """Checks that head and tokenizer fit."""
        expected, found = head.config.tokenizer, tokenizer_fingerprint(tokenizer)
        if expected and found != expected:
            raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
        self.head = head
        self.price = price
        self.rules = ThoughtRules(
            tokenizer, head.config.halting, think_start, think_end, read_answer
        )
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
        _check(model, generation_config, model_kwargs.get("past_key_values"))
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
    pending: deque[int] = field(default_factory=deque)
    """Tokens of a halted row that are known but not generated."""
    ended: bool = False
    """Whether a stopping criterion has been met."""

    @property
    def is_known(self) -> bool:
        """Whether what follows needs no LM."""
        return self.ended or self.report.halted


class _Batch(LogitsProcessor):
    """A batch that transformers generates: decides at its decision points and forces tokens."""

    def __init__(
        self,
        halter: Halter,
        model: PreTrainedModel,
        input_ids: LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        head, self.rules = halter.head, halter.rules
        price = head.config.default_price if halter.price is None else halter.price
        if np.shape(price) not in ((), (len(input_ids),)):
            raise InputError(f"{np.size(price)} prices for {len(input_ids)} rows")
        self.monitor = HaltMonitor(head, len(input_ids), price)
        self.meter = SignalMeter(
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
            _Row(Thought(self.rules, prompt), RowReport(float(price)))
            for prompt, price in zip(prompts, self.monitor.price, strict=True)
        ]

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Called between the LM and the choice of its next tokens."""
        points = [i for i, row in enumerate(self.rows) if row.thought.at_point and not row.is_known]
        if points:
            self.decide(np.array(points))
        forced = [i for i, row in enumerate(self.rows) if row.pending]
        if forced:
            scores = scores.clone()  # `generate` may keep what it passed
            scores[forced] = -torch.inf
            scores[forced, [self.rows[i].pending.popleft() for i in forced]] = 0.0
        return scores

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
        if not looks:
            probes = self.probe(halting)
        for i in halting.tolist():
            if i in probes:
                self.halt(self.rows[i], probes[i])

    def halt(self, row: _Row, probe: Probe) -> None:
        """Closes a thought with the answer that was tried out."""
        row.report.reason, row.report.answer = "halted", probe.answer
        row.pending.extend([*self.rules.close_ids, *probe.tokens, self.eos_ids[0]])

    def probe(self, rows: Index) -> dict[int, Probe]:
        """Forces the answers of some rows; those whose logits are not numbers are left out."""
        if not len(rows):
            return {}
        fork = _Fork(self.model, self.cache, self.mask, rows)
        logits = fork.feed(np.arange(len(rows)), np.tile(self.rules.close_ids, (len(rows), 1)))
        answers = greedy_answers(logits, fork.step, self.halting.max_answer_tokens, self.eos_ids)
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
        for row in self.rows:
            thought, row.report.position = row.thought, row.thought.position
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
        self._batch.measure(input_ids[:, -1])
        newest = torch.stack([input_ids[:, -1], done.long()])
        self._batch.take_in(*newest.tolist())
        return done | self._batch.ends_early & self._batch.is_known


class _Fork:
    """Copies of some rows of a running batch, on which answers are tried out."""

    def __init__(
        self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor | None, rows: Index
    ) -> None:
        self._model = model
        self._rows = np.arange(len(rows))
        index = torch.from_numpy(rows).to(model.device)
        self._cache = DynamicCache(config=model.config)
        for i, (keys, values, *_) in enumerate(cache):
            self._cache.update(keys[index], values[index], i)
        length = cache.get_seq_length()
        # transformers drops a mask without padding.
        known = index.new_ones(len(rows), 0) if mask is None else mask[index]
        self._mask = torch.nn.functional.pad(known, (0, length - known.shape[1]), value=1)

    def feed(self, rows: Index, tokens: Index) -> Tensor:
        """Appends tokens (B, T) to rows, drops all others, and gives the next logits (B, V)."""
        device = self._model.device
        if len(rows) < len(self._rows):
            kept = torch.from_numpy(np.searchsorted(self._rows, rows)).to(device)
            self._cache.batch_select_indices(kept)
            self._mask, self._rows = self._mask[kept], rows
        num = tokens.shape[1]
        self._mask = torch.nn.functional.pad(self._mask, (0, num), value=1)
        out = self._model(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=self._mask,
            position_ids=self._mask.long().cumsum(dim=1)[:, -num:] - 1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def step(self, rows: Index, tokens: Index) -> Tensor:
        """As `feed`, with one token (B,) a row."""
        return self.feed(rows, tokens[:, None])


def _check(model: PreTrainedModel, config: GenerationConfig, cache: Any) -> None:
    check_supported(model)
    if (config.num_beams or 1) > 1:
        raise InputError(f"num_beams is {config.num_beams}: a halter needs sampling or greedy")
    if type(cache) is not DynamicCache:
        raise InputError(f"cache is {type(cache).__name__}, expected a DynamicCache, in use")
