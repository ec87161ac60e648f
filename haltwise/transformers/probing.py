"""Halting inside transformers' `generate`, with a head that looks at answers.

    generation = ProbingGeneration(HaltHead.load(folder), tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, custom_generate=generation)
    generation.report

Rows that are not halted get exactly the tokens that `generate` gives by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
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

from haltwise import Control, HaltHead, InputError, Session, ThoughtReport
from haltwise.engine.decoder import end_tokens
from haltwise.engine.fingerprint import check_tokenizer
from haltwise.engine.forced_answers import greedy_answers, one_by_one
from haltwise.engine.fork import Fork, check_forkable
from haltwise.engine.hidden_states import HiddenStateHook
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.features import signals_of
from haltwise.session.forced_answer import Probe
from haltwise.session.session import requests_of
from haltwise.session.thought import Thought
from haltwise.transformers.processor import force_next


class ProbingGeneration:
    """Lets a head halt the rows of `generate`: pass it as `custom_generate`.

    It works with greedy decoding and sampling, any cache, any logits processors and stopping
    criteria, and left padding. A halted row gets the close text, the answer that was probed, and
    the end token; max_new_tokens holds for them too. transformers passes no streamer on. For a
    head that does not look at answers see also `HaltProcessor`, which lets the LM answer by itself.

    Args:
        head: The policy.
        tokenizer: The LM's.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own. At a
            price of 0 the head never halts a row.
        min_tokens: Thinking tokens before which the head does not halt: one, or one a row.
        max_tokens: Thinking tokens at which a thought is closed, whatever the head says: one, or
            one a row; None for no such cap.
        control: Sets terms and prices; by default those that are asked for are constant.

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
        control: Control | None = None,
    ) -> None:
        """Checks that head and tokenizer fit."""
        check_tokenizer(head, tokenizer)
        self.head = head
        self.asked = (price, min_tokens, max_tokens)
        self.rules = TokenRules(tokenizer, head.config.halting)
        self.control = control
        #: What happened to each row of the latest call.
        self.report: list[ThoughtReport] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Generates as `model._sample` does; `generate` calls it.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        if (generation_config.num_beams or 1) > 1:
            found = generation_config.num_beams
            raise InputError(f"num_beams is {found}: expected greedy decoding or sampling")
        check_forkable(model, model_kwargs.get("past_key_values"))
        batch = _Batch(self, model, input_ids, generation_config, model_kwargs)
        # transformers' own loop runs: one that is watched, and told what to take.
        try:
            with batch.states or nullcontext():
                out: Any = GenerationMixin._sample(
                    cast(Any, model),
                    input_ids,
                    logits_processor=LogitsProcessorList([_Raw(batch), *logits_processor, batch]),
                    stopping_criteria=_Watched(stopping_criteria, batch),
                    generation_config=generation_config,
                    **model_kwargs,
                )
            return batch.append_known(out, stopping_criteria) if batch.ends_early else out
        finally:
            self.report = [batch.session.finish(row) for row in range(len(input_ids))]


class _Batch(LogitsProcessor):
    """A batch that transformers generates: shows its session what comes, and forces tokens."""

    def __init__(
        self,
        generation: ProbingGeneration,
        model: PreTrainedModel,
        input_ids: LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        head, self.rules, num_rows = generation.head, generation.rules, len(input_ids)
        self.session = Session(head, num_rows, generation.control)
        prompts = [self.rules.decode(row, skip_special_tokens=False) for row in input_ids.tolist()]
        self.thoughts = [Thought(self.rules, prompt) for prompt in prompts]
        for row, request in enumerate(requests_of(head, num_rows, *generation.asked)):
            self.session.join(row, request, self.thoughts[row])
        signals = signals_of(head.config.observing.groups)
        self.reducer = SignalReducer(self.rules, signals, num_rows, model.device)
        self.everyone = np.arange(num_rows)
        self.states = HiddenStateHook(model) if self.reducer.needs_hidden else None
        self.model, self.halting = model, head.config.halting
        self.cache, self.mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        self.eos_ids = end_tokens(generation_config)
        pad = generation_config._pad_token_tensor
        assert pad is not None  # transformers pads with the end token if there is no other
        self.pad_id = int(pad)
        # Scores and the like are wanted for every step.
        self.ends_early = not generation_config.return_dict_in_generate
        # Tokens of halted rows that are known but not generated.
        self.pending: list[deque[int]] = [deque() for _ in prompts]

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Called between the LM and the choice of its next tokens."""
        if waiting := self.session.waiting(range(len(self.thoughts))):
            self.decide(waiting)
        return force_next(scores, self.pending)

    @property
    def is_known(self) -> bool:
        """Whether what follows needs no LM in any row."""
        running = self.session.running.values()
        return all(one.thought.ended or one.report.decided for one in running)

    def see(self, logits: Tensor) -> None:
        """Keeps what the LM itself gives (B, V), before anything is done to it."""
        # A processor may write into it.
        self.logits = logits.clone() if self.reducer.needs_logits else logits
        self.hidden = self.states.latest if self.states else None

    def measure(self, tokens: Tensor) -> None:
        """Measures the newest token (B,) of every row."""
        self.reducer.add(self.everyone, self.logits, tokens)

    def take_in(self, tokens: list[int], done: list[int]) -> None:
        """Reads the newest token of every row, and whether the row ends with it."""
        for thought, token, ends in zip(self.thoughts, tokens, done, strict=True):
            if thought.ended:
                continue
            if not thought.closed:
                thought.add(token)
            if ends:
                thought.end(by_lm=token in self.eos_ids)

    def decide(self, waiting: Sequence[int]) -> None:
        """Lets the session decide about rows that wait; those whose probes are unsound go on."""
        looks = self.halting.probing == "always"
        probes = self.probe(waiting) if looks else {}
        asked = [row for row in waiting if row in probes] if looks else waiting
        signals, points = None, self.session.points(asked)
        if len(points):
            signals = self.reducer.read(
                points,
                [self.thoughts[row] for row in points.tolist()],
                self.logits[points],
                None if self.hidden is None else self.hidden[points],
                [probes[row] for row in points.tolist()] if looks else None,
            )
        halted = self.session.decide(asked, signals)
        if not looks:
            probes = self.probe(halted)
        for row in halted:
            self.halt(row, probes.get(row))

    def halt(self, row: int, probe: Probe | None) -> None:
        """Closes the thought of a row with the answer that was tried out, if that is sound."""
        if probe is None:
            self.session.undo(row)
            return
        self.thoughts[row].closed = True
        self.session.running[row].report.answer = probe.answer
        self.pending[row].extend([*self.rules.close_ids, *probe.tokens, self.eos_ids[0]])

    def probe(self, rows: Sequence[int]) -> dict[int, Probe]:
        """Forces the answers of some rows; those whose logits are not numbers are left out."""
        if not rows:
            return {}
        fork = Fork(self.model, self.cache, self.mask, np.array(rows))
        logits = fork.feed(np.arange(len(rows)), np.tile(self.rules.close_ids, (len(rows), 1)))
        next_tokens, length = one_by_one(logits, fork.step), self.halting.max_answer_tokens
        answers = greedy_answers(len(rows), next_tokens, length, self.eos_ids, self.rules)
        sound = {}
        for row, answer in zip(rows, answers, strict=True):
            self.session.running[row].report.num_probe_tokens += answer.num_tokens
            if np.isfinite(answer.logprobs).all():
                sound[row] = self.rules.read(answer)
            else:
                self.session.skip(row)
        return sound

    def append_known(self, ids: Tensor, criteria: StoppingCriteriaList) -> Tensor:
        """Adds what is pending in each row (B, T), without running the LM for it."""
        ended = [thought.ended for thought in self.thoughts]
        while any(tokens and not over for tokens, over in zip(self.pending, ended, strict=True)):
            column = [
                tokens.popleft() if tokens and not over else self.pad_id
                for tokens, over in zip(self.pending, ended, strict=True)
            ]
            ids = torch.cat([ids, ids.new_tensor(column)[:, None]], dim=1)
            done = criteria(ids, cast(Any, None)).tolist()
            ended = [over or stops for over, stops in zip(ended, done, strict=True)]
        return ids


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
