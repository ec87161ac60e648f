"""The thoughts in the slots of a decoder, whatever runs the LM."""

from collections.abc import Sequence

import numpy as np

from haltwise import InputError
from haltwise.engine.token_rules import TokenRules
from haltwise.session.thought import Thought


class SlotThoughts:
    """What each slot has generated, and which of them cannot go on.

    Args:
        rules: How thoughts are read and closed.
        eos_ids: Each of these tokens ends an answer.
        num_slots: The number of slots.
        max_tokens: The most tokens of an answer, its thought included.
        temperature: The temperature of sampling; 0 takes the likeliest token.
        context: The most tokens of a prompt with all that follows.
        keeps_on: Whether a slot that cannot go on only stands still, see `troubles`. Otherwise
            that is an error, which ends the work of all slots.
        free_answers: Whether answers behind thoughts that were closed here are sampled too,
            instead of being the likeliest tokens.

    Raises:
        InputError: If a setting makes no sense.
    """

    def __init__(
        self,
        rules: TokenRules,
        eos_ids: Sequence[int],
        num_slots: int,
        max_tokens: int,
        temperature: float,
        context: float,
        keeps_on: bool,
        free_answers: bool,
    ) -> None:
        """Starts with every slot empty."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}, expected at least 1")
        if not 0 <= temperature < np.inf:
            raise InputError(f"temperature is {temperature}, expected 0 or more")
        self.rules, self.eos_ids, self.num_slots = rules, list(eos_ids), num_slots
        self.max_tokens, self.temperature = max_tokens, temperature
        #: What each started slot has generated.
        self.thoughts: dict[int, Thought] = {}
        #: Why slots cannot go on: prompts that do not fit, logits that are not numbers.
        self.troubles: dict[int, str] = {}
        #: The most tokens that a prompt can have.
        self.max_prompt = context - max_tokens - len(rules.close_ids) - rules.max_answer_tokens
        #: Tokens that a look at an answer takes beside those of the answer.
        self.tokens_beside = 0
        self._keeps_on, self._free_answers = keeps_on, free_answers
        # What the thoughts that were closed here were before that.
        self._open: dict[int, Thought] = {}

    def begin(self, slot: int, prompt: str) -> list[int]:
        """Gives a slot to a new prompt; returns the prompt's tokens, none if it cannot be run.

        Raises:
            InputError: If it is empty or too long, and this is everybody's trouble.
        """
        ids: list[int] = self.rules.tokenizer.encode(prompt, add_special_tokens=False)
        self.thoughts[slot] = Thought(self.rules, prompt)
        self.troubles.pop(slot, None)
        self._open.pop(slot, None)
        if 0 < len(ids) <= self.max_prompt:
            return ids
        self._cannot_go_on(
            slot,
            f"prompt {prompt!r:.40} has {len(ids)} tokens, expected 1 to {self.max_prompt}: the "
            "LM's context less max_tokens and a forced answer",
        )
        return []

    def is_going(self, slot: int) -> bool:
        """Tells whether a slot generates more tokens."""
        return slot not in self.troubles and not self.thoughts[slot].ended

    def temperature_of(self, slot: int) -> float:
        """Returns the temperature of a slot's next token: 0 behind a thought closed here."""
        return 0.0 if slot in self._open and not self._free_answers else self.temperature

    def add(self, slot: int, token: int) -> None:
        """Adds the next token to the thought in a slot, which may end with it."""
        thought = self.thoughts[slot]
        thought.add(token)
        by_lm = token in self.eos_ids
        if by_lm or thought.num_tokens == self.max_tokens:
            thought.end(by_lm)

    def close_thought(self, slot: int) -> None:
        """Closes the thought of a slot with the close text, as far as the budget goes."""
        thought = self.thoughts[slot]
        self._open[slot] = thought.copy()
        thought.closed = True
        for token in self.rules.close_ids[: self.max_tokens - thought.num_tokens]:
            thought.add(token)
        if thought.num_tokens == self.max_tokens:
            thought.end(by_lm=False)

    def reopen_thought(self, slot: int) -> int:
        """Takes back that the thought of a slot was closed here, and all that has followed.

        Returns:
            How many tokens of an answer are dropped.
        """
        num_closed, thought = self.thoughts[slot].num_tokens, self._open.pop(slot)
        self.thoughts[slot] = thought
        return max(num_closed - thought.num_tokens - len(self.rules.close_ids), 0)

    def _cannot_go_on(self, slot: int, why: str) -> None:
        """Leaves a slot as it is from here on, or gives up.

        Raises:
            InputError: If one slot's trouble is everybody's.
        """
        if not self._keeps_on:
            raise InputError(why)
        self.troubles[slot] = why

    def _has_no_logits(self, slot: int) -> None:
        """Leaves a slot as it is: the token after its thought cannot be chosen."""
        position = self.thoughts[slot].num_tokens
        self._cannot_go_on(slot, f"LM gave NaN logits at position {position}")
