"""Recording with vLLM: whole thoughts first, then an answer forced at every decision point.

vLLM gives the log probabilities of a thought's tokens and of the 20 likeliest in their places; the
stepwise signals follow from them. A forced answer is a request of its own: prompt, thought up to
the point and close text. vLLM still has most of its keys and values in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from haltwise import InputError, Signals
from haltwise.engine.token_rules import TokenRules, end_tokens
from haltwise.errors import reason_of
from haltwise.policy.signals import signals_from
from haltwise.session.signal_collector import NUM_TOP, SignalCollector
from haltwise.session.thought import ForcedAnswer, Probe, Thought
from lms.ask import check_closes, check_room
from lms.language_model import source_of
from lms.left_out import left_out
from lms.tried import misspelt
from recording.config import EngineConfig, TaskFormat
from recording.trace_row import (
    PromptedQuestion,
    SeededQuestion,
    TraceRow,
    UnfinishedTrace,
    fitting_prompts,
    judged_trial,
    known_lm,
    recorder_metadata,
    sampling_seed,
    with_prompts,
)
from recording.weightless import load_weightless

_SIGNALS = signals_from("token_logprobs", "text")
# The tokens that a prompt may have: vLLM sets aside memory for the longest sequence that there can
# be, and an LM's whole context may be more than a GPU holds.
_PROMPT_ROOM = 4096
# The most forced answers in one call: each comes with its whole prompt, as Python integers.
_MOST_FORCED = 1024


@dataclass
class _ThoughtToProbe:
    """A thought that has ended, and is still to be probed at its decision points."""

    recording: UnfinishedTrace
    """The trace that the probes are to complete."""
    prompt: list[int]
    """The tokens of the prompt."""
    thought: Thought
    """The thought, with all of its tokens."""
    seen: list[Signals]
    """The signals that are seen at each decision point, (1,) each."""


class VllmEngine:
    """The `recording.engine.RecordingEngine` that runs the LM in vLLM.

    Args:
        config: Which LM runs where, and how it is asked.
        task_format: How the task's answers are asked for and read.

    Raises:
        InputError: If the LM cannot be loaded or run, or this vLLM runs on another device.
    """

    def __init__(self, config: EngineConfig, task_format: TaskFormat) -> None:
        """Starts the engine."""
        _check_device(config.device)
        self._lm = lm = load_weightless(config)
        halting = config.halting(lm.chat, task_format)
        self._halting, self._rules = halting, TokenRules(lm.tokenizer, halting)
        self._eos_ids = end_tokens(lm.model.generation_config)
        self._batch_size, self._max_tokens = config.batch_size, config.budget(lm.context)
        self._temperature = lm.temperature if config.temperature is None else config.temperature
        lm_config = lm.model.config.get_text_config(decoder=True)
        self._num_top = min(NUM_TOP, lm_config.vocab_size)
        num_forced = len(self._rules.close_ids) + halting.max_answer_tokens
        check_room(lm.context, self._max_tokens, num_forced)
        after_prompt = self._max_tokens + num_forced
        max_length = int(min(lm.context, after_prompt + _PROMPT_ROOM))
        self._max_prompt = max_length - after_prompt
        self._llm = _start(config, str(lm.model.dtype).removeprefix("torch."), max_length)
        self.recorder = recorder_metadata(
            "vllm",
            known_lm(lm),
            halting,
            len(self._rules.close_ids),
            self._max_tokens,
            self._temperature,
            _SIGNALS,
            task_format.instruction,
        )
        self.description = lm.chat.describe()

    def record(self, work: Iterable[SeededQuestion]) -> Iterator[TraceRow]:
        """Answers questions batch by batch, and yields each trace.

        A question that is too long for the LM is left out, with a message.

        Raises:
            InputError: If a question cannot be asked, or vLLM does not give what it was asked for.
        """
        waiting = with_prompts(self._lm, work, self._max_prompt)
        while batch := list(islice(waiting, self._batch_size)):
            yield from self._answer(batch, self._max_tokens)

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions in one batch, and returns a report for a person.

        Raises:
            InputError: If halting this LM cannot work.
        """
        check_closes(self._halting)
        budget = min(self._max_tokens, max_tokens or self._max_tokens)
        fitting = fitting_prompts(self._lm, work, self._max_prompt)
        prompts = {question.question_id: prompt for (question, _), prompt in fitting}
        rows = list(self._answer(fitting, budget))
        warnings = [
            *misspelt(self._halting.close_text, self._rules.spelt_close()),
            *left_out(self._lm.model.generation_config, self._temperature),
        ]
        return judged_trial(rows, prompts, self.description, self._halting, warnings)

    def close(self) -> None:
        """Ends the engine's processes."""
        del self._llm

    def _answer(self, batch: Sequence[PromptedQuestion], max_tokens: int) -> Iterator[TraceRow]:
        """Answers a batch of questions with their prompts, and yields their traces."""
        thinking = self._think(batch, max_tokens)
        answers = self._force(thinking)
        for one in thinking:
            for signals, probe in zip(one.seen, islice(answers, len(one.seen)), strict=True):
                one.recording.see(probe, signals, 0)
            yield one.recording.row(self._lm.name, self._rules, one.thought)

    def _think(self, batch: Sequence[PromptedQuestion], max_tokens: int) -> list[_ThoughtToProbe]:
        """Lets the LM think about a batch of questions to the end."""
        encode = self._lm.tokenizer.encode
        prompts = [encode(text, add_special_tokens=False) for _, text in batch]
        params = [
            self._params(
                max_tokens,
                self._num_top,
                temperature=self._temperature,
                seed=sampling_seed(text, seed),
            )
            for (_, seed), text in batch
        ]
        thinking = []
        outputs = self._generate(prompts, params)
        for (job, text), prompt, output in zip(batch, prompts, outputs, strict=True):
            tokens, logprobs = self._read(output, max_tokens, self._num_top)
            thought = Thought(self._rules, text)
            seen = self._seen(thought, tokens, logprobs)
            thought.end(by_lm=tokens[-1] in self._eos_ids)
            recording = UnfinishedTrace(*job, signals={name: [] for name in _SIGNALS})
            thinking.append(_ThoughtToProbe(recording, prompt, thought, seen))
        return thinking

    def _force(self, thinking: Sequence[_ThoughtToProbe]) -> Iterator[Probe]:
        """Yields the forced answers at all decision points of some thoughts, in order."""
        prompts = (
            [*one.prompt, *one.thought.tokens[: seen.position.item()], *self._rules.close_ids]
            for one in thinking
            for seen in one.seen
        )
        length = self._halting.max_answer_tokens
        params = self._params(length, 1, temperature=0.0)
        while batch := list(islice(prompts, _MOST_FORCED)):
            for output in self._generate(batch, [params] * len(batch)):
                tokens, logprobs = self._read(output, length, 1)
                yield self._rules.read(self._cut(tokens, logprobs[:, 0]))

    def _cut(self, tokens: Sequence[int], logprobs: NDArray[np.float64]) -> ForcedAnswer:
        """Returns the forced answer that some tokens begin with."""
        answer = ForcedAnswer([], [], 0)
        for token, logprob in zip(tokens, logprobs.tolist(), strict=True):
            answer.num_tokens += 1
            if token in self._eos_ids:
                break
            answer.tokens.append(token)
            answer.logprobs.append(logprob)
            if self._rules.is_complete(answer.tokens):
                break
        return answer

    def _params(self, max_tokens: int, num_top: int, **sampling: Any) -> Any:
        """Returns vLLM's sampling parameters.

        It ends where we say, and tells probabilities as at temperature 1.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=num_top,
            flat_logprobs=True,
            stop_token_ids=self._eos_ids,
            ignore_eos=True,
            detokenize=False,
            **sampling,
        )

    def _generate(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, list(params), use_tqdm=False)
        if len(outputs) != len(requests):
            raise InputError(f"vLLM answered {len(outputs)} of {len(requests)} requests")
        return [output.outputs[0] for output in outputs]

    def _read(
        self, output: Any, max_tokens: int, num_top: int
    ) -> tuple[list[int], NDArray[np.float64]]:
        """Returns the tokens (T,) of an output and their log probabilities (T, 1 + num_top), nats.

        The first one is that of the token itself, then come those of the likeliest in its place.

        Raises:
            InputError: If tokens or probabilities are missing, or are not numbers.
        """
        tokens = list(output.token_ids)
        ended = bool(tokens) and tokens[-1] in self._eos_ids
        if not 0 < len(tokens) <= max_tokens or (len(tokens) < max_tokens and not ended):
            raise InputError(
                f"vLLM gave {len(tokens)} tokens without an end ({output.finish_reason!r}), "
                f"expected {max_tokens}, or the LM's end token before"
            )
        flat = output.logprobs
        found = 0 if flat is None else len(flat.logprobs)
        if found != len(tokens) * (1 + num_top):
            raise InputError(
                f"vLLM gave {found} log probabilities with {len(tokens)} tokens, expected "
                f"{1 + num_top} a token"
            )
        logprobs = np.array(flat.logprobs, dtype=np.float64).reshape(len(tokens), 1 + num_top)
        if np.isnan(logprobs).any():
            position = int(np.isnan(logprobs).any(axis=1).argmax())
            raise InputError(f"LM gave NaN logits at position {position}")
        return tokens, logprobs

    def _seen(
        self, thought: Thought, tokens: Sequence[int], logprobs: NDArray[np.float64]
    ) -> list[Signals]:
        """Gives a thought its tokens, and returns the signals at each point before the end.

        Args:
            thought: The thought before its first token.
            tokens: All tokens (N,) of the thought.
            logprobs: (N, 1 + number of likeliest tokens) the log probabilities of each token, as
                `_read` gives them, nats.
        """
        collector, seen = SignalCollector(self._rules, _SIGNALS, 1), []
        missing = ((0, 0), (0, NUM_TOP - self._num_top))
        top = np.pad(logprobs[:, 1:], missing, constant_values=-np.inf)
        for num, token in enumerate(tokens, start=1):
            thought.add(token)
            if thought.at_point and num < len(tokens):
                since = slice(num - thought.gap, num)
                rows = np.zeros(thought.gap, dtype=np.int64)
                collector.add(rows, logprobs[since, 0], top[since])
                seen.append(collector.collect(rows[:1], [thought]))
        return seen


def _check_device(device: str) -> None:
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        reason = reason_of(error)
        raise InputError(f"cannot use device {device!r}: {reason}") from None
    if asked.index is not None:
        raise InputError(
            f"device is {device!r}: expected {asked.type!r}, choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if asked.type != current_platform.device_type:
        raise InputError(
            f"device is {device!r}, but this vLLM runs on {current_platform.device_type!r}"
        )


def _start(config: EngineConfig, dtype: str, max_length: int) -> Any:
    """Starts vLLM and returns its engine.

    Raises:
        InputError: If vLLM does not know the LM, or has no room for it.
    """
    try:
        return LLM(
            model=source_of(config.lm),
            dtype=dtype,
            max_model_len=max_length,
            tensor_parallel_size=config.tensor_parallel,
            distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
            enforce_eager=config.device == "cpu",
            enable_prefix_caching=True,
            generation_config="vllm",
            max_logprobs=NUM_TOP,
            logprobs_mode="raw_logprobs",
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        reason = reason_of(error)
        raise InputError(f"vLLM does not start with {config.lm!r}: {reason}") from None
