"""Thinking in slots: many questions at once, from decision point to decision point.

    start -> advance -> at a decision point -> force (look at the answer) -> advance or halt
                     -> ended by the LM or by the token budget

A question's tokens depend on the question and its seed alone: not on the slot, on the other
slots, or on the answers forced on the way. (Batches of another size may round differently; that
changes a token only where two tokens are as good as tied.)
"""

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haltwise import Halting, InputError, Signals
from haltwise.engine.burst import LIKELIEST, choose
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.slot_thoughts import SlotThoughts
from haltwise.engine.slots import SequenceSlots
from haltwise.engine.token_rules import TokenRules, end_tokens
from haltwise.policy.signals import Bools, Float, Index
from haltwise.session.thought import Probe, Thought

# The most tokens that a slot advances at once where the decision rule names no number.
_STRIDE = 32
# The most tokens that a GPU generates before the host looks at them.
_BURST_ON_GPU = 64


class Decoder(SlotThoughts):
    """Runs an LM on many questions at once and halts at decision points.

    Callers work in rounds: `advance` all running slots, `force` those at decision points in one
    batch, and go on with those that have not ended; `start` replaces whatever is in a slot.

    Args:
        model: The LM; see `SequenceSlots`.
        tokenizer: Its tokenizer.
        halting: It has the decision rule, the close text and the length of forced answers.
        num_slots: The number of questions at once.
        max_tokens: The token budget of a question, its answer included.
        temperature: The temperature of sampling; 0 takes the likeliest token. Forced answers are
            always greedy.
        signals: Names of the signals to measure beside position and forced answer.
        burst: The most tokens that are generated before the host looks at them; they are the same
            for any number. At 0 the host hands on every token, and none is generated in vain. The
            default is 0 on a CPU and 64 on a GPU.
        keeps_on: Whether a slot that cannot go on only stands still, see `troubles`. Otherwise
            that is an error, which ends the work of all slots.
        free_answers: Whether answers behind thoughts that `close` has closed are sampled too,
            instead of being the likeliest tokens.

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
        keeps_on: bool = False,
        free_answers: bool = False,
    ) -> None:
        """Starts with every slot empty."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", np.inf)
        super().__init__(
            TokenRules(tokenizer, halting),
            end_tokens(model.generation_config),
            num_slots,
            max_tokens,
            temperature,
            context,
            keeps_on,
            free_answers,
        )
        if burst is None:
            burst = 0 if model.device.type == "cpu" else _BURST_ON_GPU
        if burst < 0:
            raise InputError(f"burst is {burst}, expected 0 or more")
        self.halting = halting
        # The lengths that slots whose thoughts were closed here had before that.
        self._open_lengths: dict[int, int] = {}
        # (num_slots, max_tokens) in [0, 1): what each token of each slot is sampled with.
        self._uniforms = np.zeros((num_slots, max_tokens), dtype=np.float32)
        self._reducer = SignalReducer(self.rules, signals, num_slots, model.device)
        #: The signals that are measured.
        self.measured = self._reducer.signals
        self._burst = burst
        self._slots = SequenceSlots(model, num_slots, self._reducer.needs_hidden, burst)

    def start(self, slots: Index, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Gives slots (B,) to new questions.

        Args:
            slots: Each at most once.
            prompts: The LM's whole inputs; nothing is added to them.
            seeds: The seeds of sampling, one for each question.

        Raises:
            InputError: If a prompt is empty or too long for the LM.
        """
        fitting: dict[int, list[int]] = {}
        for slot, prompt, seed in zip(slots.tolist(), prompts, seeds, strict=True):
            self._uniforms[slot] = sampling_uniforms(prompt, seed, self.max_tokens)
            if ids := self.begin(slot, prompt):
                fitting[slot] = ids
        if fitting:
            rows = np.array(list(fitting))
            self._reducer.reset(rows)
            self._slots.rollback(rows, 0)
            self._slots.prefill(rows, list(fitting.values()))

    def advance(self, slots: Index) -> Bools:
        """Lets slots (B,) think until each is at its next decision point or cap, or has ended.

        A slot without a point in reach pauses after some tokens too, so that the others need not
        wait for a long answer: the next call takes it further.

        Returns:
            Whether each is at a decision point (B,); of the others, `Thought.ended` tells.

        Raises:
            InputError: If the LM's logits are not numbers.
        """
        moving, num_left = slots[self._are_going(slots)], self.rules.every_repeated or _STRIDE
        while num_left and len(moving):
            thoughts = self._thoughts_in(moving)
            if self._burst:
                num = min(num_left, *map(self._num_ahead, thoughts))
                self._generate_burst(moving, num)
            else:
                num = 1
                self._generate_one(moving)
            num_left -= num
            waits = np.array([thought.waits for thought in thoughts], dtype=bool)
            moving = moving[self._are_going(moving) & ~waits]
        at_point = [thought.at_point for thought in self._thoughts_in(slots)]
        return np.array(at_point, dtype=bool) & self._are_going(slots)

    def force(self, slots: Index) -> list[Probe]:
        """Forces the answers of slots (B,) in one batch; their thoughts go on as if it never was.

        Raises:
            InputError: If the LM's logits are not numbers.
        """
        if not len(slots):
            return []
        answers = self._slots.force(slots, self.rules, self.eos_ids)
        for slot, answer in zip(slots.tolist(), answers, strict=True):
            if not np.isfinite(answer.logprobs).all():
                self._has_no_logits(slot)
        return [self.rules.read(answer) for answer in answers]

    def close(self, slots: Index) -> None:
        """Closes the thoughts of slots (B,); their answers follow, as far as the budget goes."""
        for slot in slots.tolist():
            self._open_lengths[slot] = int(self._slots.lengths[slot])
            self.close_thought(slot)
        going = slots[self._are_going(slots)]
        if len(going):
            self._slots.prefill(going, [self.rules.close_ids] * len(going))

    def reopen(self, slot: int) -> int:
        """Takes back that the thought of a slot was closed, which goes on from there.

        Returns:
            How many tokens of an answer are dropped.
        """
        num_dropped, row = self.reopen_thought(slot), np.array([slot])
        self._slots.rollback(row, self._open_lengths.pop(slot) - 1)
        self._slots.prefill(row, [self.thoughts[slot].tokens[-1:]])
        return num_dropped

    def signals(self, slots: Index, probes: Sequence[Probe] | None = None) -> Signals:
        """Returns what is seen of slots (B,) at their decision points.

        Args:
            slots: Each is at a decision point.
            probes: Their forced answers, if anybody looked.
        """
        logits, hidden = self._slots.next_logits(slots), self._slots.last_hidden(slots)
        return self._reducer.read(slots, self._thoughts_in(slots), logits, hidden, probes)

    def _thoughts_in(self, slots: Index) -> list[Thought]:
        """Returns the thoughts in slots (B,)."""
        return [self.thoughts[slot] for slot in slots.tolist()]

    def _are_going(self, slots: Index) -> Bools:
        """Tells which of slots (B,) generate more tokens."""
        return np.array([self.is_going(slot) for slot in slots.tolist()], dtype=bool)

    def _num_ahead(self, thought: Thought) -> int:
        """Returns how many tokens a burst may have, as far as is known before it."""
        num = thought.num_tokens
        return min(self._burst, self.max_tokens - num, thought.next_look() - num)

    def _uniforms_ahead(self, slots: Index, num: int) -> Float | None:
        """Returns what the next tokens (num, B) of slots (B,) are sampled with, if they are."""
        if not self.temperature:
            return None
        nums = np.array([thought.num_tokens for thought in self._thoughts_in(slots)])
        uniforms = self._uniforms[slots, nums + np.arange(num)[:, None]]
        is_sampled = np.array([self.temperature_of(slot) > 0 for slot in slots.tolist()])
        return np.where(is_sampled, uniforms, np.float32(LIKELIEST))

    @torch.inference_mode()
    def _generate_one(self, slots: Index) -> None:
        """Generates the next token of slots (B,)."""
        logits, uniforms = self._slots.next_logits(slots), self._uniforms_ahead(slots, 1)
        drawn = None if uniforms is None else torch.from_numpy(uniforms[0]).to(logits.device)
        chosen, sound = choose(logits, self.temperature, drawn)
        tokens: Index = torch.where(sound, chosen, -1).cpu().numpy()
        self._take_in(slots, tokens[None])
        self._reducer.add(slots, logits, chosen)
        going = self._are_going(slots)
        if going.any():
            self._slots.step(slots[going], tokens[going])

    def _generate_burst(self, slots: Index, num: int) -> None:
        """Generates the next tokens of slots (B,); what follows an end is dropped."""
        tokens, logprobs = self._slots.burst(
            slots,
            num,
            self.temperature,
            self._uniforms_ahead(slots, num),
            self._reducer.num_logprobs,
        )
        taken = np.arange(num)[:, None] < self._take_in(slots, tokens)
        self._reducer.take(np.broadcast_to(slots, taken.shape)[taken], logprobs[taken])

    def _take_in(self, slots: Index, tokens: Index) -> Index:
        """Adds tokens (S, B) to the thoughts in slots (B,), up to the end of each.

        Returns:
            How many tokens each thought has taken (B,).

        A token of -1 stands for logits that were not numbers.
        """
        nums = []
        for slot, column in zip(slots.tolist(), tokens.T.tolist(), strict=True):
            thought = self.thoughts[slot]
            num_before = thought.num_tokens
            for token in column:
                if token < 0:
                    self._has_no_logits(slot)
                    break
                self.add(slot, token)
                if thought.ended:
                    break
            nums.append(thought.num_tokens - num_before)
        return np.array(nums)


def sampling_uniforms(prompt: str, seed: int, num: int) -> Float:
    """Returns a number in [0, 1) for each token (num,), from the question and its seed alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    key = np.array([seed % 2**64, int.from_bytes(digest, "big")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(num, dtype=np.float32)
