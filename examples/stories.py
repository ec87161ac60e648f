"""Arithmetic stories: questions with words for a small chat LM that reasons in the open.

    python -m examples.stories --out FILE

Somebody has some things, and then buys, finds, gives away, loses or halves them: one to three
steps, whose number is the segment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command import run
from haltwise import InputError

# There are far more stories; so many are drawn in a second.
_MOST = 10_000

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps")
# The fewest and the most steps of a story.
_STEPS = (1, 3)


@dataclass(frozen=True)
class StoriesConfig:
    """Write arithmetic stories as questions for --task."""

    out: Path
    """The file of JSON lines with the columns question, answer and segment."""
    num: int = 600
    """The number of questions, up to 10000."""
    seed: int = 0
    """The seed of the stories."""


def stories(num: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields different stories, as rows of question, answer and segment."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    while len(seen) < num:
        num_steps = int(rng.integers(_STEPS[0], _STEPS[1] + 1))
        text, answer = _story(rng, num_steps)
        if text not in seen:
            seen.add(text)
            yield {"question": text, "answer": str(answer), "segment": f"{num_steps} steps"}


def _story(rng: np.random.Generator, num_steps: int) -> tuple[str, int]:
    """Returns a story, and how many things its hero has in the end."""
    hero, other = rng.permutation(NAMES)[:2]
    things = rng.choice(THINGS)
    num = int(rng.integers(6, 31))
    sentences = [f"{hero} has {num} {things}."]
    for _ in range(num_steps):
        sentence, num = _step(rng, str(other), num)
        sentences.append(f"Then {hero} {sentence}.")
    sentences.append(f"How many {things} does {hero} have in the end?")
    return " ".join(sentences), num


def _step(rng: np.random.Generator, other: str, num: int) -> tuple[str, int]:
    """Returns what the hero does next, and how many things are there then."""
    few, boxes = int(rng.integers(2, 10)), int(rng.integers(2, 6))
    steps = [
        (f"buys {few} more", num + few),
        (f"finds {boxes} boxes with {few} in each", num + boxes * few),
    ]
    if num > few:
        steps += [(f"gives {few} to {other}", num - few), (f"loses {few}", num - few)]
    if num % 2 == 0:
        steps.append((f"gives half of them to {other}", num // 2))
    return steps[rng.integers(len(steps))]


def main(config: StoriesConfig) -> None:
    """Writes the file.

    Raises:
        InputError: If there are to be no questions, or too many.
    """
    if not 1 <= config.num <= _MOST:
        raise InputError(f"num is {config.num}, expected 1 to {_MOST}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    rows = stories(config.num, config.seed)
    config.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    run(main, StoriesConfig)
