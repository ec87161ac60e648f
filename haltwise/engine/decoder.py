"""Thinking in slots: many questions at once, from decision point to decision point.

    start -> advance -> at a decision point -> force (look at the answer) -> advance or halt
                     -> ended by the LM or by the token budget

A question's tokens depend on the question and its seed alone: not on the slot, on the other
slots, or on the answers forced on the way. (Batches of another size may round differently; that
changes a token only where two tokens are as good as tied.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from haltwise import Halting, InputError, Signals
from haltwise.engine.burst import choose
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.slots import Slots
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Index
from haltwise.session.forced_answer import Probe
from haltwise.session.thought import Thought

# Tokens that a slot advances at most when the decision rule does not say.
_STRIDE = 32
# Tokens that a GPU generates before the host looks at them.
_BURST_ON_GPU = 64


@dataclass
class Generation:
    """What one slot generates."""

    thought: Thought
    """Everything so far."""
    uniforms: NDArray[np.float32]
    """(max_tokens,) in [0, 1): what each token is sampled with."""


class Decoder:
    """Runs an LM on many questions at once and halts at decision points.

    Callers work in rounds: `advance` all running slots, `force` those at decision points in one
    batch, and go on with those that have not ended; `start` replaces whatever is in a slot.

    Args:
        model: The LM; see `Slots`.
        tokenizer: Its tokenizer.
        halting: Decision rule, close text and length of forced answers.
        num_slots: Questions at once.
        max_tokens: Token budget of a question, its answer included.
        temperature: Of sampling; 0 takes the likeliest token. Forced answers are always greedy.
        signals: Names of the signals to measure beside position and forced answer.
        burst: Tokens generated at most before the host looks at them; they are the same for any
            number. 0: the host hands on every token, and none is generated in vain. Default: 0 on
            a CPU, 64 on a GPU.

    Raises:
        InputError: If the LM or the halting conditions cannot be run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        halting: Halting,
        num_slots: int,
        max_tokens: int,
        temperature: float = 0.0,
        signals: Collection[str] = (),
        burst: int | None = None,
    ) -> None:
        """Starts with every slot empty."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}, expected at least 1")
        if not 0 <= temperature < np.inf:
            raise InputError(f"temperature is {temperature}, expected 0 or more")
        if burst is not None and burst < 0:
            raise InputError(f"burst is {burst}, expected 0 or more")
        self.halting = halting
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.eos_ids = end_tokens(model.generation_config)
        self.rules = TokenRules(tokenizer, halting)
        #: What each started slot has generated.
        self.generations: dict[int, Generation] = {}
        self._reducer = SignalReducer(self.rules, signals, num_slots, model.device)
        if burst is None:
            burst = 0 if model.device.type == "cpu" else _BURST_ON_GPU
        self._burst = burst
        self._slots = Slots(model, num_slots, self._reducer.needs_hidden, burst)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", np.inf)
        #: Tokens of a prompt at most.
        self.max_prompt = (
            context - max_tokens - len(self.rules.close_ids) - halting.max_answer_tokens
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """The signals that are measured."""
        return self._reducer.signals

    def start(self, slots: Index, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Gives slots (B,) to new questions.

        Args:
            slots: Each at most once.
            prompts: The LM's whole inputs; nothing is added to them.
            seeds: Of sampling, one a question.

        Raises:
            InputError: If a prompt is empty or too long for the LM.
        """
        if not len(slots):
            return
        tokens = [self.rules.tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if not 0 < len(ids) <= self.max_prompt:
                raise InputError(
                    f"prompt {prompt!r:.40} has {len(ids)} tokens, expected 1 to "
                    f"{self.max_prompt}: the LM's context less max_tokens and a forced answer"
                )
        for slot, prompt, seed in zip(slots, prompts, seeds, strict=True):
            thought = Thought(self.rules, prompt)
            uniforms = _uniforms(prompt, seed, self.max_tokens)
            self.generations[int(slot)] = Generation(thought, uniforms)
        self._reducer.reset(slots)
        self._slots.rollback(slots, 0)
        self._slots.prefill(slots, tokens)

    def advance(self, slots: Index) -> NDArray[np.bool_]:
        """Lets slots (B,) think until each is at its next decision point or cap, or has ended.

        A slot without a point in reach stops after some tokens too, so that the others need not
        wait for a long answer: the next call takes it further.

        Returns:
            Whether each is at a decision point (B,); of the others, `Thought.ended` tells.

        Raises:
            InputError: If the LM's logits are not numbers.
        """
        generations = [self.generations[int(slot)] for slot in slots]
        moving, num_left = np.arange(len(slots)), self.rules.every or _STRIDE
        while num_left and len(moving):
            here, num = [generations[i] for i in moving], 1
            if self._burst:
                num = min(num_left, *map(self._num_ahead, here))
                self._run(slots[moving], here, num)
            else:
                self._step(slots[moving], here)
            num_left -= num
            moving = moving[[not (g.thought.ended or g.thought.waits) for g in here]]
        return np.array([g.thought.at_point for g in generations], dtype=bool)

    def force(self, slots: Index) -> list[Probe]:
        """Forces the answers of slots (B,) in one batch; their thoughts go on as if it never was.

        Raises:
            InputError: If the LM's logits are not numbers.
        """
        if not len(slots):
            return []
        length = self.halting.max_answer_tokens
        answers = self._slots.force(slots, self.rules, length, self.eos_ids)
        for slot, answer in zip(slots, answers, strict=True):
            if not np.isfinite(answer.logprobs).all():
                raise _nan_logits(self.generations[int(slot)])
        return [self.rules.read(answer) for answer in answers]

    def close(self, slots: Index) -> None:
        """Closes the thoughts of slots (B,); their answers follow, as far as the budget goes."""
        close_ids = self.rules.close_ids
        fits = []
        for slot in slots.tolist():
            thought = self.generations[slot].thought
            thought.closed = True
            for token in close_ids[: self.max_tokens - thought.num_tokens]:
                thought.add(token)
            if thought.num_tokens == self.max_tokens:
                thought.end(by_lm=False)
            else:
                fits.append(slot)
        if fits:
            self._slots.prefill(np.array(fits), [close_ids] * len(fits))

    def signals(self, slots: Index, probes: Sequence[Probe] | None = None) -> Signals:
        """What is seen of slots (B,) at their decision points.

        Args:
            slots: Each at a decision point.
            probes: Their forced answers, if anybody looked.
        """
        thoughts = [self.generations[int(slot)].thought for slot in slots]
        logits, hidden = self._slots.next_logits(slots), self._slots.last_hidden(slots)
        return self._reducer.read(slots, thoughts, logits, hidden, probes)

    def _step(self, slots: Index, generations: Sequence[Generation]) -> None:
        """The next token of slots (B,)."""
        tokens = self._choose(slots, generations)
        for generation, token in zip(generations, tokens.tolist(), strict=True):
            self._add(generation, token)
        going = np.array([not generation.thought.ended for generation in generations])
        if going.any():
            self._slots.step(slots[going], tokens[going])

    @torch.inference_mode()
    def _choose(self, slots: Index, generations: Sequence[Generation]) -> Index:
        """The next token (B,) of some slots, measured."""
        logits, uniforms = self._slots.next_logits(slots), None
        if self.temperature:
            drawn = torch.tensor([g.uniforms[g.thought.num_tokens] for g in generations])
            uniforms = drawn.to(logits.device)
        chosen, sound = choose(logits, self.temperature, uniforms)
        tokens: Index = torch.where(sound, chosen, -1).cpu().numpy()
        if tokens.min() < 0:
            raise _nan_logits(generations[int(tokens.argmin())])
        self._reducer.add(slots, logits, chosen)
        return tokens

    def _num_ahead(self, generation: Generation) -> int:
        """Returns the tokens of a burst at most, as far as is known before it."""
        thought, num = generation.thought, generation.thought.num_tokens
        return min(self._burst, self.max_tokens - num, thought.next_look() - num)

    def _run(self, slots: Index, generations: Sequence[Generation], num: int) -> None:
        """The next tokens of slots (B,) in one burst; nobody looks at what follows an end."""
        uniforms = None
        if self.temperature:
            starts = [(g.uniforms, g.thought.num_tokens) for g in generations]
            uniforms = np.stack([drawn[start : start + num] for drawn, start in starts], axis=1)
        tokens, logprobs = self._slots.burst(
            slots, num, self.temperature, uniforms, self._reducer.num_logprobs
        )
        columns = zip(generations, tokens.T.tolist(), strict=True)
        nums = np.array([self._take(generation, column) for generation, column in columns])
        taken = np.arange(num)[:, None] < nums
        self._reducer.take(np.broadcast_to(slots, taken.shape)[taken], logprobs[taken])

    def _take(self, generation: Generation, tokens: Sequence[int]) -> int:
        """Takes in tokens up to the end; returns how many those are."""
        for num, token in enumerate(tokens, start=1):
            if token < 0:
                raise _nan_logits(generation)
            self._add(generation, token)
            if generation.thought.ended:
                return num
        return len(tokens)

    def _add(self, generation: Generation, token: int) -> None:
        """Takes in a token, perhaps the last one."""
        thought = generation.thought
        thought.add(token)
        by_lm = token in self.eos_ids
        if by_lm or thought.num_tokens == self.max_tokens:
            thought.end(by_lm)


def _nan_logits(generation: Generation) -> InputError:
    return InputError(f"LM gave NaN logits at position {generation.thought.num_tokens}")


def _uniforms(prompt: str, seed: int, num: int) -> NDArray[np.float32]:
    """One number in [0, 1) for each token (num,), from the question and its seed alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    key = np.array([seed % 2**64, int.from_bytes(digest, "big")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(num, dtype=np.float32)


def end_tokens(config: GenerationConfig, eos: int | list[int] | None = None) -> list[int]:
    """Tokens that end what an LM generates.

    Args:
        config: The LM's.
        eos: Of one call, if it names any.

    Raises:
        InputError: If there is none.
    """
    eos = config.eos_token_id if eos is None else eos
    if eos is None:
        raise InputError("the LM's generation config has no eos_token_id: nothing ends an answer")
    return list(eos) if isinstance(eos, list) else [eos]
