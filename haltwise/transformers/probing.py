"""Halting inside transformers' `generate`, with a head that looks at answers.

    generation = ProbingGeneration(HaltHead.load(folder), tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, custom_generate=generation)
    generation.report

Rows that are not halted get exactly the tokens that `generate` gives by itself.
"""

from collections.abc import Callable, Sequence
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

from haltwise import Control, HaltHead, InputError, ThoughtReport
from haltwise.engine.forced_answers import greedy_answers, one_by_one
from haltwise.engine.fork import Fork, check_forkable
from haltwise.engine.hidden_states import HiddenStateHook
from haltwise.engine.token_rules import TokenRules, check_tokenizer, end_tokens
from haltwise.session.session import check_asked
from haltwise.session.thought import Probe
from haltwise.transformers.generated_rows import GeneratedRows


class ProbingGeneration:
    """Lets a head halt the rows of `generate`: pass it as `custom_generate`.

    It works with greedy decoding and sampling, any cache, any logits processors and stopping
    criteria, and left padding. A halted row gets the close text, the answer that was probed, and
    the end token; max_new_tokens holds for them too. transformers passes no streamer on. For a
    head that does not look at answers see also `HaltProcessor`, which lets the LM answer by itself.

    Args:
        head: The policy.
        tokenizer: The LM's tokenizer.
        price: The price in exact match per 1,000 tokens: one, or one for each row; by default the
            head's own. At a price of 0 the head never halts a row.
        min_tokens: The head does not halt before this many thinking tokens: one number, or one for
            each row.
        max_tokens: A thought is closed at this many thinking tokens, whatever the head says: one
            number, or one for each row; None for no such cap.
        control: It sets terms and prices; by default those that are asked for are constant.
        accepts: Tells of the text of an answer whether it can be given; by default of one that the
            head's answer rule can read. Where the head has halted a row and it cannot, the thought
            goes on to its end.

    Raises:
        InputError: If the tokenizer is not the one that the head was trained with, the head's
            halting conditions cannot be run, or what is asked makes no sense.
    """

    def __init__(
        self,
        head: HaltHead,
        tokenizer: PreTrainedTokenizerBase,
        price: Any = None,
        min_tokens: Any = 0,
        max_tokens: Any = None,
        control: Control | None = None,
        accepts: Callable[[str], bool] | None = None,
    ) -> None:
        """Checks that head and tokenizer fit."""
        check_tokenizer(head, tokenizer)
        check_asked(head, price, min_tokens, max_tokens)
        self.head = head
        self.asked = (price, min_tokens, max_tokens)
        self.rules = TokenRules(tokenizer, head.config.halting)
        self.control = control
        self.accepts = accepts or self.rules.is_readable
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

        Args:
            model: The LM.
            input_ids: (R, T) the prompts.
            logits_processor: The call's processors.
            stopping_criteria: The call's criteria.
            generation_config: The call's settings.
            model_kwargs: What else the LM is given, such as the cache.

        Returns:
            What `model._sample` returns: the tokens, or more if the call asks for it.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        if (generation_config.num_beams or 1) > 1:
            found = generation_config.num_beams
            raise InputError(f"num_beams is {found}: expected greedy decoding or sampling")
        check_forkable(model, model_kwargs.get("past_key_values"))
        rows = _ProbedRows(self, model, input_ids, generation_config, model_kwargs)
        # transformers' own loop runs: one that is watched, and told what to take.
        processors = LogitsProcessorList([_RawLogits(rows), *logits_processor, rows])
        try:
            with rows.states or nullcontext():
                out: Any = GenerationMixin._sample(
                    cast(Any, model),
                    input_ids,
                    logits_processor=processors,
                    stopping_criteria=_WatchedCriteria(stopping_criteria, rows),
                    generation_config=generation_config,
                    **model_kwargs,
                )
            return rows.append_known(out, stopping_criteria) if rows.ends_early else out
        finally:
            self.report = rows.finish()


class _ProbedRows(GeneratedRows, LogitsProcessor):
    """Rows whose answers are forced beside the call, and which are told these when they halt.

    It is the last of the call's processors: it decides just before the next tokens are chosen.
    """

    def __init__(
        self,
        generation: ProbingGeneration,
        model: PreTrainedModel,
        input_ids: LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        """Begins the thoughts; the arguments are those of `ProbingGeneration.__call__`."""
        head = generation.head
        # These may refuse: before any request has joined.
        sees_hidden = "hidden" in head.config.observing.signals
        self.states = HiddenStateHook(model) if sees_hidden else None
        self.eos_ids = end_tokens(generation_config)
        of_call = (generation.rules, input_ids, generation.asked, generation.control)
        super().__init__(head, *of_call, free_answers=True)  # behind pending ones there is none
        self.model, self.halting = model, head.config.halting
        self.accepts = generation.accepts
        self.cache, self.mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        pad = generation_config._pad_token_tensor
        assert pad is not None  # transformers pads with the end token if there is no other
        self.pad_id = int(pad)
        # If not, scores and the like are wanted for every step.
        self.ends_early = not generation_config.return_dict_in_generate

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Halts rows that wait; returns scores (R, V) that force what is known of halted rows."""
        if waiting := self.session.waiting(range(len(self.thoughts))):
            self.halt_waiting(waiting)
        return self.force_next(scores)

    @property
    def is_known(self) -> bool:
        """Whether what follows needs no LM in any row."""
        running = self.session.running.values()
        return all(one.thought.ended or one.report.decided for one in running)

    def see(self, logits: Tensor) -> None:
        """Keeps what the LM itself gives (R, V), before anything is done to it."""
        # A processor may write into it.
        self.logits = logits.clone() if self.reducer.needs_logits else logits
        self.hidden = self.states.latest if self.states else None

    def take_in(self, tokens: list[int], done: list[int]) -> None:
        """Reads the newest token of every row, and whether the row ends with it."""
        for thought, token, ends in zip(self.thoughts, tokens, done, strict=True):
            if thought.ended:
                continue
            if not thought.closed:
                thought.add(token)
            if ends:
                thought.end(by_lm=token in self.eos_ids)

    def halt_waiting(self, waiting: Sequence[int]) -> None:
        """Decides about rows that wait, and closes the thoughts of those that are halted.

        A row whose forced answer is unsound, or cannot be given, goes on.
        """
        looks = self.halting.probing == "always"
        probes = self.probe(waiting) if looks else {}
        asked = list(probes) if looks else waiting
        halted = self.decide(asked, self.logits, self.hidden, probes if looks else None)
        if not looks:
            probes = self.probe(halted)
        for row in halted:
            report = self.session.running[row].report
            if row not in probes:
                self.session.undo(row)
            elif report.decided == "halted" and not self.accepts(probes[row].text):
                self.session.resume(row)
            else:
                report.answer = probes[row].answer
                self.close(row, [*probes[row].tokens, self.eos_ids[0]])

    def probe(self, rows: Sequence[int]) -> dict[int, Probe]:
        """Forces the answers of some rows; those whose logits are not numbers are left out."""
        if not rows:
            return {}
        fork = Fork(self.model, self.cache, self.mask, np.array(rows))
        logits = fork.feed(np.arange(len(rows)), np.tile(self.rules.close_ids, (len(rows), 1)))
        next_tokens = one_by_one(logits, fork.step)
        answers = greedy_answers(len(rows), next_tokens, self.rules, self.eos_ids)
        sound = {}
        for row, answer in zip(rows, answers, strict=True):
            self.session.running[row].report.num_probe_tokens += answer.num_tokens
            if np.isfinite(answer.logprobs).all():
                sound[row] = self.rules.read(answer)
            else:
                self.session.skip(row)
        return sound

    def append_known(self, ids: Tensor, criteria: StoppingCriteriaList) -> Tensor:
        """Adds to tokens (R, T) what is pending in each row, without running the LM for it."""
        ended = [thought.ended for thought in self.thoughts]
        while True:
            for tokens, is_over in zip(self.pending, ended, strict=True):
                if is_over:
                    tokens.clear()
            if not any(self.pending):
                return ids
            column = [tokens.popleft() if tokens else self.pad_id for tokens in self.pending]
            ids = torch.cat([ids, ids.new_tensor(column)[:, None]], dim=1)
            ended = criteria(ids, cast(Any, None)).tolist()


class _RawLogits(LogitsProcessor):
    """Stands before all other processors and shows rows what the LM itself gives."""

    def __init__(self, rows: _ProbedRows) -> None:
        """Takes the rows that are shown it."""
        self._rows = rows

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Returns the scores (R, V) as they are; probes do not come by here."""
        self._rows.see(scores)
        return scores


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that show rows what is generated, and stop them all when all is known."""

    def __init__(self, criteria: StoppingCriteriaList, rows: _ProbedRows) -> None:
        """Takes the call's own criteria, and the rows that are shown the newest tokens."""
        super().__init__(criteria)
        self._rows = rows

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Returns after each step which rows (R,) are to stop, given all tokens (R, T)."""
        rows, done = self._rows, super().__call__(input_ids, scores, **kwargs)
        newest = torch.stack([input_ids[:, -1], done.long()])
        rows.measure(rows.logits, newest[0])
        rows.take_in(*newest.tolist())
        return done | rows.ends_early & rows.is_known
