"""Halting as one of `generate`'s logits processors.

    processor = HaltProcessor(HaltHead.load(folder), model, tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, logits_processor=[processor])
    processor.report

A head that does not look at answers needs no more than what the LM computes anyway: the cache is
never touched, so any will do, and the LM answers by itself: with its likeliest tokens, as the
answers behind halted thoughts that the head has been trained and certified on.

Shapes: R rows in the batch, T tokens in each, V vocabulary, D size of a hidden state.
"""

import weakref
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from haltwise import Control, HaltHead, InputError, ThoughtReport
from haltwise.engine.hidden_states import HiddenStateHook
from haltwise.engine.token_rules import TokenRules, check_tokenizer, end_tokens
from haltwise.session.session import check_asked
from haltwise.transformers.generated_rows import GeneratedRows

# Medians of next-token scores that differ by less than this are the same, nats.
_SAME = 1e-3


class HaltProcessor(LogitsProcessor):
    """Lets a head halt the rows of one `generate` call: pass it in `logits_processor`.

    A row whose thought is closed, since the head halts it or at its cap, is given the close text,
    token by token. Then its LM answers with the likeliest tokens, also where the call samples;
    other rows are sampled as ever. It works with greedy decoding and sampling, any cache, other
    processors in front of it, streamers and left padding. Make one for each call: it looks at the
    LM from then on until the last thought has ended, or until it is gone. Calls in other threads
    do not disturb it.

    Args:
        head: The policy; its probing is at_halt.
        model: The LM.
        tokenizer: The LM's tokenizer.
        price: The price in exact match per 1,000 tokens: one, or one for each row; by default the
            head's own. At a price of 0 the head never halts a row.
        min_tokens: The head does not halt before this many thinking tokens: one number, or one for
            each row.
        max_tokens: A thought is closed at this many thinking tokens, whatever the head says: one
            number, or one for each row; None for no such cap.
        eos_token_id: The end tokens of the call, if it names others than the LM's own.
        control: It sets terms and prices; by default those that are asked for are constant.
        free_answers: Whether the answer of a row whose thought was closed is sampled as the call
            has it. What a certificate says is about likeliest answers.

    Raises:
        InputError: If the head looks at answers, the tokenizer is not the one that it was trained
            with, its halting conditions cannot be run, or what is asked makes no sense.
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
        control: Control | None = None,
        free_answers: bool = False,
    ) -> None:
        """Begins to look at the LM."""
        if head.config.halting.probing != "at_halt":
            raise InputError(
                "the head looks at answers while it thinks: "
                "use haltwise.transformers.ProbingGeneration"
            )
        check_tokenizer(head, tokenizer)
        check_asked(head, price, min_tokens, max_tokens)
        self._head, self._control, self._free_answers = head, control, free_answers
        self._rules = TokenRules(tokenizer, head.config.halting)
        self._asked = (price, min_tokens, max_tokens)
        self._eos_ids = end_tokens(model.generation_config, eos_token_id)
        self._rows: GeneratedRows | None = None
        self._reports: list[ThoughtReport] = []
        # (R, T) all tokens, and (R, V) logits of what follows them, as of the latest call.
        self._newest: LongTensor
        self._logits: Tensor
        # (R, T) what the thoughts have been told of those tokens.
        self._known: LongTensor
        self._num_prompt = 0
        self._passes = _PassWatcher(model, "hidden" in head.config.observing.signals)
        # The rows, for when the processor is gone and nobody has read its report.
        self._unreported: list[GeneratedRows] = []
        weakref.finalize(self, _let_go, self._passes, self._unreported)

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Takes in the newest tokens and halts rows, before `generate` chooses the next tokens.

        Args:
            input_ids: (R, T) all tokens so far.
            scores: (R, V) what the next tokens are chosen by.

        Returns:
            Scores (R, V) that leave a row whose thought was closed no choice but the close text,
            and behind it the likeliest token.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        if self._rows is None:
            self._rows = GeneratedRows(
                self._head,
                self._rules,
                input_ids,
                self._asked,
                self._control,
                self._free_answers,
            )
            self._unreported.append(self._rows)
            self._num_prompt, self._known = input_ids.shape[1], input_ids
        elif input_ids.shape != (len(self._rows.thoughts), self._newest.shape[1] + 1):
            raise _other_rows()
        self._newest = input_ids
        if self._rows.session.open.any():
            self._look(self._rows, input_ids, scores)
        else:
            self._passes.close()
        return self._rows.force_next(scores)

    @property
    def report(self) -> list[ThoughtReport]:
        """What happened to each row. Read it once the call is over: it ends the watch.

        The call's last token is not in it, since no processor sees that. A thought that is still
        open counts as one that has met the call's token budget.
        """
        if self._rows and not self._reports:
            self._read(self._rows, self._newest)
            for thought in self._rows.thoughts:
                if not thought.ended:
                    thought.end(by_lm=False)
            self._reports = self._rows.finish()
            self._passes.close()
        return self._reports

    def _look(self, rows: GeneratedRows, input_ids: LongTensor, scores: Tensor) -> None:
        """Measures the newest tokens, and halts rows where it is time to decide."""
        num = input_ids.shape[1] - self._num_prompt
        logits, hidden = self._passes.take(scores.device, num == 0)
        if num == 0:
            _refuse_beams(logits[0], scores[0])
        else:
            # A copy, lest the reducer keep all tokens of every step.
            rows.measure(self._logits, input_ids[:, -1].clone())
        self._logits = logits
        if num and num >= rows.session.next_look.min():
            self._read(rows, input_ids)
            for row in rows.decide(range(len(rows.thoughts)), logits, hidden):
                rows.close(row)

    def _read(self, rows: GeneratedRows, input_ids: LongTensor) -> None:
        """Brings the thoughts up to the newest tokens (R, T): one copy to the host."""
        start = self._known.shape[1]
        moved = (input_ids[:, :start] != self._known).any(dim=1, keepdim=True)
        news = torch.cat([moved.long(), input_ids[:, start:]], dim=1).tolist()
        for thought, (has_moved, *tokens) in zip(rows.thoughts, news, strict=True):
            if has_moved:
                raise _other_rows()
            for token in tokens:
                if thought.is_over:
                    break
                thought.add(token)
                if token in self._eos_ids:
                    thought.end(by_lm=True)
        self._known = input_ids


class _PassWatcher:
    """Sees the logits that an LM gives for the newest tokens, and perhaps their hidden states.

    Other processors have changed the scores before a processor of one's own is called; so this
    looks at the LM itself. Each thread sees its own passes alone.
    """

    def __init__(self, model: PreTrainedModel, hidden: bool) -> None:
        """Begins to look at an LM, and at its hidden states if they are wanted.

        Raises:
            InputError: If they are wanted and cannot be seen.
        """
        self._states = HiddenStateHook(model) if hidden else None  # may refuse: before any hook
        self._looking = ExitStack()
        self._looking.callback(model.register_forward_hook(self._see).remove)
        if self._states:
            self._looking.enter_context(self._states)
        # The number of passes since the latest `take`, and the newest logits, of each thread.
        self._nums: dict[int, int] = {}
        self._logits: dict[int, Tensor] = {}
        self._thread: int | None = None

    def close(self) -> None:
        """Ends the watch, and leaves no mark on the LM."""
        self._looking.close()

    def take(self, device: torch.device, is_first: bool) -> tuple[Tensor, Tensor | None]:
        """Returns logits (R, V), float32, and hidden states (R, D) of the newest tokens.

        Args:
            device: The device on which they are wanted.
            is_first: Whether the newest token is the last of the prompt, which may have been read
                in several passes.

        Raises:
            InputError: If there was not one pass for the newest token.
        """
        self._thread = get_ident()
        num = self._nums.pop(self._thread, 0)
        if num != 1 and not (num and is_first):
            raise InputError(
                f"the processor's LM ran {num} times for a token, expected once: greedy decoding "
                "or sampling, not compiled (disable_compile=True), no guidance and no assistant"
            )
        self._logits = {self._thread: self._logits[self._thread]}
        newest = self._logits[self._thread]
        # On a GPU the LM may write its next logits to the same place.
        logits = newest.to(device, torch.float32, copy=newest.device.type != "cpu")
        return logits, self._states.latest if self._states else None

    def _see(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        """Keeps the logits of the newest tokens; PyTorch calls it after each pass of the LM."""
        thread = get_ident()
        if self._thread not in (None, thread):
            return
        self._nums[thread] = self._nums.get(thread, 0) + 1
        # The LM may run for others too before the processor is gone: no graph is kept.
        if hasattr(output, "logits"):
            self._logits[thread] = output.logits[:, -1].detach()


def _refuse_beams(logits: Tensor, scores: Tensor) -> None:
    """Refuses the scores (V,) of a beam search, by the LM's own logits (V,) of the same row.

    Beam search passes log probabilities where greedy decoding and sampling pass logits. Medians
    tell, since other processors change few of the scores.

    Raises:
        InputError: If the scores are log probabilities.
    """
    shift = logits.logsumexp(dim=-1)
    off = logits.median() - scores.median() - shift
    if off.abs() < _SAME < shift.abs():
        raise InputError("scores are of a beam search: expected greedy decoding or sampling")


def _let_go(passes: _PassWatcher, unreported: list[GeneratedRows]) -> None:
    """Leaves no mark on the LM, and ends the requests that nobody has ended."""
    passes.close()
    for rows in unreported:
        rows.finish()


def _other_rows() -> InputError:
    """Returns what is raised when the rows of a call do not continue those of the call before."""
    return InputError(
        "rows are not what they were and one more token: expected greedy decoding or sampling, and "
        "a HaltProcessor of its own for each call of generate"
    )
