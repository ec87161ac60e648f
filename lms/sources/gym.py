"""Questions that reasoning-gym makes up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from haltwise import InputError
from lms.questions import Question, digest_of, split_of
from lms.scorers import needed, scorer_of
from lms.sources.task import asked, check_draw

PREFIX = "reasoning_gym:"

_NO_GOLD = "has no reference answer"
_GUESSED = "has two answers: half of all guesses are right"
_MANY = "has many right answers, of which one is the reference"
_SPELLED = "has its answers in another spelling than it asks for"
#: Generators of no use for exact match, and why.
REFUSED = {
    "boxnet": _NO_GOLD,
    "graph_color": _NO_GOLD,
    "propositional_logic": _NO_GOLD,
    "rubiks_cube": _NO_GOLD,
    "rush_hour": _NO_GOLD,
    "circuit_logic": _GUESSED,
    "course_schedule": _GUESSED,
    "game_of_life_halting": _GUESSED,
    "isomorphic_strings": _GUESSED,
    "ransom_note": _GUESSED,
    "syllogism": _GUESSED,
    "countdown": _MANY,
    "jugs": _MANY,
    "knight_swap": _MANY,
    "n_queens": _MANY,
    "palindrome_generation": _MANY,
    "puzzle24": _MANY,
    "sokoban": _MANY,
    "word_ladder": _MANY,
    "coin_flip": _SPELLED,
    "complex_arithmetic": _SPELLED,
    "fraction_simplification": _SPELLED,
    "number_format": _SPELLED,
    "power_function": _SPELLED,
    "prime_factorization": _SPELLED,
    "ab": "has answers without a letter",
    "codeio": "asks something else every time, seed or not",
    "composite": "needs other generators",
}

# "Give only the result" forbids to reason before it.
_ONLY = re.compile(
    r"\b(Give|Provide|Return|Respond|Reply)( with|) only\b|\bOnly (?=reply)|"
    r", no other text or formatting"
)
_CHUNK = 256
# Questions of one seed and of the next are so far apart: an item's own seed is seed + place.
_SPACING = 10**9
_PATIENCE = 1000
# More values than this are no groups.
_WIDEST = 20


@dataclass(frozen=True)
class Gym:
    """A generator of reasoning-gym; the hash of a question decides its split."""

    generator: str
    scorer: str
    instruction: str

    def __post_init__(self) -> None:
        """Checks the generator.

        Raises:
            InputError: If there is none of that name, it is of no use, or the package is missing.
        """
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise InputError(needed("reasoning-gym", "gym")) from None
        if self.generator in REFUSED:
            raise InputError(f"{self.name} {REFUSED[self.generator]}: expected another")
        if self.generator not in DATASETS:
            known = ", ".join(sorted(set(DATASETS) - set(REFUSED)))
            raise InputError(f"no generator {self.generator!r}, expected one of {known}")

    @property
    def name(self) -> str:
        """The task's."""
        return PREFIX + self.generator

    @property
    def cue(self) -> str:
        """See `Task`."""
        return scorer_of(self.scorer).cue

    @property
    def answer_end(self) -> str:
        """See `Task`."""
        return scorer_of(self.scorer).answer_end

    def describe(self) -> str:
        """See `Task`."""
        return (
            f"{self.name}: drawn without end; scorer {self.scorer}; "
            f"instruction {self.instruction!r}"
        )

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """See `Task`.

        Raises:
            InputError: Besides, if there are fewer than `num` questions.
        """
        check_draw(split, num)
        seen: set[str] = set()
        num_found = num_repeats = 0
        for item in _each_item(self.generator, seed):
            question = self._question(item)
            repeats = question.question_id in seen
            num_repeats = num_repeats + 1 if repeats else 0
            if num_repeats == _PATIENCE:
                raise InputError(
                    f"{self.name} has about {len(seen):,} questions, {num_found:,} of split "
                    f"{split}: expected at least {num:,}"
                )
            seen.add(question.question_id)
            if question.split == split and not repeats:
                num_found += 1
                yield question
                if num_found == num:
                    return

    def _question(self, item: Mapping[str, Any]) -> Question:
        gold, text = item["answer"], _ONLY.sub(r"\1\2", item["question"]).strip()
        if not isinstance(gold, str):
            raise InputError(f"{self.name} answered {text!r} with {gold!r}, expected a text")
        digest = digest_of(" ".join(text.split()))
        question = Question(
            question_id=f"{self.name}-{digest[:16]}",
            task=self.name,
            segment=segment_of(item["metadata"]),
            text=asked(text, self.instruction),
            gold=gold.strip(),
            split=split_of(digest),
            scorer=self.scorer,
        )
        question.is_right("")  # refuses a gold answer that is none
        return question


def _each_item(generator: str, seed: int) -> Iterator[Mapping[str, Any]]:
    from reasoning_gym import create_dataset

    first = seed * _SPACING
    while True:
        yield from create_dataset(generator, size=_CHUNK, seed=first)
        first += _CHUNK


def segment_of(metadata: Mapping[str, Any]) -> str:
    """An item's difficulty, as far as one word and one number tell it."""
    difficulty = metadata.get("difficulty")
    if not isinstance(difficulty, Mapping):
        return "" if difficulty is None else str(difficulty)
    for name, span in difficulty.items():
        # What the item has is one of what its generator draws from, or there is no such group.
        found = metadata.get(name)
        if isinstance(found, int) and isinstance(span, tuple) and span[-1] - span[0] <= _WIDEST:
            return f"{name} {found}"
    return ""
