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
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from haltwise.errors import InputError
from haltwise.halting import Halting
from haltwise.meter import SignalMeter
from haltwise.signals import Index, Signals
from haltwise.slots import Slots
from haltwise.thought import Probe, Thought, ThoughtRules

# Tokens that a slot advances at most when the decision rule does not say.
_STRIDE = 32


@dataclass
class Generation:
    """What one slot has generated."""

    thought: Thought
    uniforms: NDArray[np.float32]
    """(max_tokens,) in [0, 1): what each token is sampled with."""
    cap: int | None = None
    """Thinking tokens at which the slot stands still, to be closed; None for no such cap."""
    ended: bool = False
    """Nothing more is generated."""
    finished: bool = False
    """Ended by the LM itself, not by the token budget."""

    @property
    def num_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.thought.tokens)

    @property
    def is_waiting(self) -> bool:
        """Whether it is to be decided how the thought goes on."""
        return self.thought.at_point or self.at_cap

    @property
    def at_cap(self) -> bool:
        """Whether an open thought has reached its cap."""
        is_open = self.thought.begun and not (self.thought.closed or self.ended)
        return is_open and self.cap is not None and self.thought.position >= self.cap


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
    ) -> None:
        """Starts with every slot empty."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}, expected at least 1")
        if not 0 <= temperature < np.inf:
            raise InputError(f"temperature is {temperature}, expected 0 or more")
        self.halting = halting
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.eos_ids = end_tokens(model.generation_config)
        self.rules = ThoughtRules(tokenizer, halting)
        #: What each started slot has generated.
        self.generations: dict[int, Generation] = {}
        self._meter = SignalMeter(self.rules, signals, num_slots, model.device)
        self._slots = Slots(model, num_slots, self._meter.needs_hidden)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", np.inf)
        self._max_prompt = (
            context - max_tokens - len(self.rules.close_ids) - halting.max_answer_tokens
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """The signals that are measured."""
        return self._meter.signals

    def start(
        self,
        slots: Index,
        prompts: Sequence[str],
        seeds: Sequence[int],
        cap: int | None = None,
    ) -> None:
        """Gives slots (B,) to new questions.

        Args:
            slots: Each at most once.
            prompts: The LM's whole inputs; nothing is added to them.
            seeds: Of sampling, one a question.
            cap: Thinking tokens at which `advance` leaves a thought to be closed.

        Raises:
            InputError: If a prompt is empty or too long for the LM.
        """
        if not len(slots):
            return
        tokens = [self.rules.tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if not 0 < len(ids) <= self._max_prompt:
                raise InputError(
                    f"prompt {prompt!r:.40} has {len(ids)} tokens, expected 1 to "
                    f"{self._max_prompt}: the LM's context less max_tokens and a forced answer"
                )
        for slot, prompt, seed in zip(slots, prompts, seeds, strict=True):
            thought = Thought(self.rules, prompt)
            uniforms = _uniforms(prompt, seed, self.max_tokens)
            self.generations[int(slot)] = Generation(thought, uniforms, cap)
        self._meter.reset(slots)
        self._slots.rollback(slots, 0)
        self._slots.prefill(slots, tokens)

    def advance(self, slots: Index) -> NDArray[np.bool_]:
        """Lets slots (B,) think until each is at its next decision point or cap, or has ended.

        A slot without a point in reach stops after some tokens too, so that the others need not
        wait for a long answer: the next call takes it further.

        Returns:
            Whether each is at a decision point (B,); of the others, `Generation.ended` tells.

        Raises:
            InputError: If the LM's logits are not numbers.
        """
        generations = [self.generations[int(slot)] for slot in slots]
        left = [generation.thought.at_point for generation in generations]
        self._meter.reset(slots[np.array(left, dtype=bool)])
        moving = np.arange(len(slots))
        for _ in range(self.rules.every or _STRIDE):
            if not len(moving):
                break
            tokens = self._choose(slots[moving], [generations[i] for i in moving])
            for i, token in zip(moving, tokens.tolist(), strict=True):
                self._add(generations[i], token)
            going = [not generations[i].ended for i in moving]
            moving = moving[going]
            if len(moving):
                self._slots.step(slots[moving], tokens[going])
                moving = moving[[not generations[i].is_waiting for i in moving]]
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
            generation = self.generations[slot]
            generation.thought.closed = True
            for token in close_ids[: self.max_tokens - generation.num_tokens]:
                generation.thought.add(token)
            generation.ended = generation.num_tokens == self.max_tokens
            if not generation.ended:
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
        return self._meter.read(slots, thoughts, logits, hidden, probes)

    @torch.inference_mode()
    def _choose(self, slots: Index, generations: Sequence[Generation]) -> Index:
        """The next token (B,) of some slots, measured."""
        logits = self._slots.next_logits(slots)
        if self.temperature:
            uniforms = torch.tensor([g.uniforms[g.num_tokens] for g in generations])
            chosen, sound = sample(logits, self.temperature, uniforms.to(logits.device))
        else:
            largest, chosen = logits.max(dim=-1)
            sound = largest.isfinite()
        tokens: Index = torch.where(sound, chosen, -1).cpu().numpy()
        if tokens.min() < 0:
            raise _nan_logits(generations[int(tokens.argmin())])
        self._meter.add(slots, logits, chosen)
        return tokens

    def _add(self, generation: Generation, token: int) -> None:
        """Takes in a token; an end token, or the last one of the budget, is no decision point."""
        generation.thought.add(token)
        generation.finished = token in self.eos_ids
        generation.ended = generation.finished or generation.num_tokens == self.max_tokens
        generation.thought.at_point &= not generation.ended


def _nan_logits(generation: Generation) -> InputError:
    return InputError(f"LM gave NaN logits at position {generation.num_tokens}")


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


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

        token = the first whose cumulative probability exceeds the uniform number

    Args:
        logits: (B, V) float32.
        temperature: Above 0.
        uniforms: (B,) in [0, 1).

    Returns:
        Tokens (B,), and whether the logits made sense (B,).
    """
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1), total[:, 0].isfinite()
