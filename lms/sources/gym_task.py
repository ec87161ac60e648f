"""Tasks whose questions the package reasoning-gym makes up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from haltwise import InputError
from lms.questions import Question, question_digest, split_of
from lms.scorers import needed, scorer_of
from lms.sources.task import NoQuestionError, check_draw, with_instruction

PREFIX = "reasoning_gym:"

_NO_GOLD = "has no reference answer"
_GUESSED = "has two answers: half of all guesses are right"
_MANY = "has many right answers, of which one is the reference"
_SPELLED = "has its answers in another spelling than it asks for"
#: The generators that are of no use for exact match, and why.
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

# Words such as "give only the result" forbid to reason before it, and are taken out.
_ONLY = re.compile(
    r"\b(Give|Provide|Return|Respond|Reply)( with|) only\b|\bOnly (?=reply)|"
    r", no other text or formatting"
)
# The number of items that are made up at a time.
_CHUNK = 256
# The distance between the first items of two draws: an item's own seed is that of its generator
# plus its place.
_SPACING = 10**9
# After so many repeated questions in a row a generator has no more.
_PATIENCE = 1000
# A difficulty with a wider range of values than this makes no groups.
_WIDEST = 20


@dataclass(frozen=True)
class ReasoningGymTask:
    """A task whose questions a generator of reasoning-gym makes up.

    The hash of a question decides on its split.
    """

    generator: str
    scorer: str
    instruction: str

    def __post_init__(self) -> None:
        """Checks the generator.

        Raises:
            InputError: If there is no generator of that name, it is of no use for exact match, or
                the package is missing.
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
        """The name of the task, as a person gives it."""
        return PREFIX + self.generator

    @property
    def cue(self) -> str:
        """The words after a closed thought that lead the LM to its answer: the scorer's."""
        return scorer_of(self.scorer).cue

    @property
    def answer_end(self) -> str:
        """The text that ends a forced answer: the scorer's."""
        return scorer_of(self.scorer).answer_end

    def describe(self) -> str:
        """Returns one line for a person: what there is, and how it is asked."""
        return (
            f"{self.name}: drawn without end; scorer {self.scorer}; "
            f"instruction {self.instruction!r}"
        )

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """Yields exactly `num` distinct questions of a split, the same for the same arguments.

        Args:
            split: train, dev or test.
            num: The number of questions, at least 1.
            seed: The number of the draw.

        Raises:
            InputError: If there is no such split, `num` is below 1, the generator has fewer
                questions, or what it makes up cannot be asked.
        """
        check_draw(split, num)
        seen: set[str] = set()
        num_found = num_repeats = 0
        for item in _each_item(self.generator, seed):
            question = self._question(item)
            repeats = question.question_id in seen
            num_repeats = num_repeats + 1 if repeats else 0
            if num_repeats == _PATIENCE:
                raise NoQuestionError(
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
        digest = question_digest(" ".join(text.split()))
        question = Question(
            question_id=f"{self.name}-{digest[:16]}",
            task=self.name,
            segment=segment_of(item["metadata"]),
            text=with_instruction(text, self.instruction),
            gold=gold.strip(),
            split=split_of(digest),
            scorer=self.scorer,
        )
        question.is_right("")  # refuses a gold answer that cannot be compared
        return question


def _each_item(generator: str, seed: int) -> Iterator[Mapping[str, Any]]:
    from reasoning_gym import create_dataset

    first = seed * _SPACING
    while True:
        yield from create_dataset(generator, size=_CHUNK, seed=first)
        first += _CHUNK


def segment_of(metadata: Mapping[str, Any]) -> str:
    """Returns an item's difficulty as far as one word and one number tell it; "" if they do not.

    Args:
        metadata: What reasoning-gym tells of the item.
    """
    difficulty = metadata.get("difficulty")
    if not isinstance(difficulty, Mapping):
        return "" if difficulty is None else str(difficulty)
    for name, span in difficulty.items():
        # An item belongs to a group if it tells which value its generator has drawn for it.
        found = metadata.get(name)
        if isinstance(found, int) and isinstance(span, tuple) and span[-1] - span[0] <= _WIDEST:
            return f"{name} {found}"
    return ""
