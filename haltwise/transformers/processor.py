"""Halting as one of `generate`'s logits processors.

    processor = HaltProcessor(HaltHead.load(folder), model, tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, logits_processor=[processor])
    processor.report

A head that does not look at answers needs no more than what the LM computes anyway: the cache is
never touched, so any will do, and the LM answers by itself.

Shapes: R rows in the batch, V vocabulary, D size of a hidden state.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from haltwise.engine.decoder import end_tokens
from haltwise.engine.fingerprint import check_tokenizer
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.slots import HiddenTap
from haltwise.errors import InputError
from haltwise.policy.features import signals_of
from haltwise.policy.head import HaltHead
from haltwise.session.rows import RowReport, monitor_of, row_terms
from haltwise.session.thought import Thought, ThoughtRules

# Medians of next-token scores closer than this are the same, nats.
_SAME = 1e-3


class HaltProcessor(LogitsProcessor):
    """Lets a head halt the rows of one `generate` call: pass it in `logits_processor`.

    A halted row is given the close text, token by token; then its LM answers as the call has it.
    Works with greedy decoding and sampling, any cache, other processors, streamers and left
    padding. Make one for each call: it looks at the LM from then on until the last thought has
    ended, or until it is gone.

    Args:
        head: The policy; one whose probing is at_halt.
        model: The LM.
        tokenizer: The LM's.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own.
        min_tokens: Thinking tokens before which the head does not halt: one, or one a row.
        max_tokens: Thinking tokens at which a thought is closed, whatever the head says: one, or
            one a row; None for no such cap.
        eos_token_id: The call's, if it names other end tokens than the LM's own.

    Raises:
        InputError: If the head looks at answers, the tokenizer is not the one that it was trained
            with, or its halting conditions cannot be run.
    """

    def __init__(
        self,
        head: HaltHead,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        price: Any = None,
        min_tokens: Any = 0,
        max_tokens: Any = None,
        eos_token_id: int | list[int] | None = None,
    ) -> None:
        """Begins to look at the LM."""
        if head.config.halting.probing != "at_halt":
            raise InputError(
                "the head looks at answers while it thinks: "
                "use haltwise.transformers.ProbingGeneration"
            )
        check_tokenizer(head, tokenizer)
        self._head = head
        self._rules = ThoughtRules(tokenizer, head.config.halting)
        self._asked = (price, min_tokens, max_tokens)
        self._eos_ids = end_tokens(model.generation_config, eos_token_id)
        self._rows: list[_Row] = []
        # (R, T) all tokens, and (R, V) logits of what follows them, as of the latest call.
        self._newest: LongTensor
        self._logits: Tensor
        self._signals = signals_of(head.config.observing.groups)
        self._tap = _Tap(model, "hidden" in self._signals)
        weakref.finalize(self, self._tap.close)

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Called between the LM and the choice of its next tokens.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        if not self._rows:
            self._begin(input_ids, scores)
        elif input_ids.shape != (len(self._rows), self._newest.shape[1] + 1):
            raise _other_rows()
        self._newest = input_ids
        if any(row.is_open for row in self._rows):
            self._look(input_ids, scores)
        return force_next(scores, [row.pending for row in self._rows])

    @property
    def report(self) -> list[RowReport]:
        """One entry a row. The call's last token is not in it: no processor sees that."""
        if self._rows:
            self._read(self._newest)
        return [self._report(i, row) for i, row in enumerate(self._rows)]

    def _begin(self, input_ids: LongTensor, scores: Tensor) -> None:
        """Reads the prompts (R, T)."""
        num_rows = len(input_ids)
        terms = row_terms(self._head, num_rows, *self._asked)
        self._caps = [term.max_tokens for term in terms]
        self._monitor = monitor_of(self._head, terms)
        self._meter = SignalReducer(self._rules, self._signals, num_rows, scores.device)
        self._everyone = np.arange(num_rows)
        prompts = [self._rules.decode(row, skip_special_tokens=False) for row in input_ids.tolist()]
        self._rows = [_Row(Thought(self._rules, prompt)) for prompt in prompts]
        self._num_prompt = input_ids.shape[1]
        # What has been read of the rows.
        self._known = input_ids

    def _look(self, input_ids: LongTensor, scores: Tensor) -> None:
        """Measures the newest tokens, and halts rows."""
        num = input_ids.shape[1] - self._num_prompt
        logits, hidden = self._tap.take(scores.device, num == 0)
        if num == 0:
            _refuse_beams(logits[0], scores[0])
        else:
            # A copy, lest the meter keep all tokens of every step.
            self._meter.add(self._everyone, self._logits, input_ids[:, -1].clone())
        self._logits = logits
        if num and (not self._rules.every or num % self._rules.every == 0 or num in self._caps):
            self._read(input_ids)
            self._decide(logits, hidden)
            if not any(row.is_open for row in self._rows):
                self._tap.close()

    def _read(self, input_ids: LongTensor) -> None:
        """Brings the thoughts up to the newest tokens (R, T): one copy to the host."""
        start = self._known.shape[1]
        moved = (input_ids[:, :start] != self._known).any()
        new = torch.cat([input_ids[:, start:].flatten(), moved[None].long()]).tolist()
        if new.pop():
            raise _other_rows()
        num = input_ids.shape[1] - start
        for i, row in enumerate(self._rows):
            self._take_in(row, new[i * num : (i + 1) * num])
        self._known = input_ids

    def _take_in(self, row: _Row, tokens: Sequence[int]) -> None:
        """Reads a row's newest tokens, up to the end of its thought."""
        for token in tokens:
            if not row.is_open:
                return
            row.thought.add(token)
            row.ended = token in self._eos_ids

    def _decide(self, logits: Tensor, hidden: Tensor | None) -> None:
        """Halts those rows that the head wants to halt, or that have reached their cap."""
        is_open = [i for i, row in enumerate(self._rows) if row.is_open]
        points = np.array([i for i in is_open if self._rows[i].thought.at_point], dtype=np.int64)
        if len(points):
            signals = self._meter.read(
                points,
                [self._rows[i].thought for i in points.tolist()],
                logits[points],
                None if hidden is None else hidden[points],
            )
            self._meter.reset(points)
            self._monitor.observe(signals, points)
        begun = np.array([i for i in is_open if self._rows[i].thought.begun], dtype=np.int64)
        positions = np.array([self._rows[i].thought.position for i in begun], dtype=np.int64)
        for i in begun[self._monitor.cap(begun, positions)].tolist():
            self._rows[i].halted = True
            self._rows[i].pending.extend(self._rules.close_ids)

    def _report(self, i: int, row: _Row) -> RowReport:
        report = RowReport(
            price=float(self._monitor.price[i]),
            position=row.thought.position,
            num_bad_signals=int(self._monitor.num_bad_signals[i]),
        )
        if row.halted:
            cap = self._caps[i]
            report.reason = "capped" if cap is not None and report.position >= cap else "halted"
        elif row.ended or row.thought.closed:
            report.reason = "closed by the LM"
        return report


@dataclass
class _Row:
    """One row of a batch."""

    thought: Thought
    pending: deque[int] = field(default_factory=deque)
    """Tokens of the close text that are still to be forced."""
    halted: bool = False
    ended: bool = False
    """Whether the LM has ended the row."""

    @property
    def is_open(self) -> bool:
        """Whether there is still something to decide."""
        return not (self.halted or self.ended or self.thought.closed)


class _Tap:
    """Sees the logits that an LM gives for the newest tokens, and perhaps their hidden states.

    Other processors have changed the scores before a processor of one's own is called; so this
    looks at the LM itself.
    """

    def __init__(self, model: PreTrainedModel, hidden: bool) -> None:
        """Begins to look."""
        self._hidden = HiddenTap(model) if hidden else None  # may refuse: before there is a hook
        self._looking = ExitStack()
        self._looking.callback(model.register_forward_hook(self._see).remove)
        if self._hidden:
            self._looking.enter_context(self._hidden)
        self._num_passes = 0

    def close(self) -> None:
        """Leaves no mark on the LM."""
        self._looking.close()

    def take(self, device: torch.device, is_first: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (R, V), float32, and hidden states (R, D) of the newest tokens.

        Args:
            device: Where they are wanted.
            is_first: A prompt may have been read in several passes.

        Raises:
            InputError: If there was not one pass for the newest token.
        """
        num, self._num_passes = self._num_passes, 0
        if num != 1 and not (num and is_first):
            raise InputError(
                f"the processor's LM ran {num} times for a token, expected once: greedy decoding "
                "or sampling, not compiled (disable_compile=True), no guidance and no assistant"
            )
        # On a GPU the LM may write its next logits to the same place.
        copy = self._logits.device.type != "cpu"
        logits = self._logits.to(device, torch.float32, copy=copy)
        return logits, self._hidden.latest if self._hidden else None

    def _see(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self._num_passes += 1
        # The LM may run for others too before the processor is gone: no graph is kept.
        if hasattr(output, "logits"):
            self._logits = output.logits[:, -1].detach()


def force_next(scores: Tensor, pending: Sequence[deque[int]]) -> Tensor:
    """Scores (R, V) that leave rows with pending tokens no choice but the first of them."""
    forced = [i for i, tokens in enumerate(pending) if tokens]
    if forced:
        scores = scores.clone()  # `generate` may keep what it passed
        scores[forced] = -torch.inf
        scores[forced, [pending[i].popleft() for i in forced]] = 0.0
    return scores


def _refuse_beams(logits: Tensor, scores: Tensor) -> None:
    """Beam search passes log probabilities where greedy decoding and sampling pass logits (V,).

    Medians tell, since other processors change few of the scores.
    """
    shift = logits.logsumexp(dim=-1)
    off = logits.median() - scores.median() - shift
    if off.abs() < _SAME < shift.abs():
        raise InputError("scores are of a beam search: expected greedy decoding or sampling")


def _other_rows() -> InputError:
    return InputError(
        "rows are not what they were and one more token: expected greedy decoding or sampling, and "
        "a HaltProcessor of its own for each call of generate"
    )
