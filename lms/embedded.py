"""The embedded LM: where it lies, the words it knows and the thoughts it learns from.

A thought attempts the question step by step and writes a result. Then it checks: it computes
everything again and writes "ok" if the result is the same, else "wait". It ends once a result is
confirmed and some needless checks are done, when it has tried often enough, or out of impatience.
Steps slip now and then, so a result can be wrong and a later check can correct it. A decision
point every 12 tokens and the default temperature suit the shipped weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lms.questions import Question
from lms.tasks import LETTERS, LIMIT, apply

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints" / "embedded"

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
THINK, CLOSE = "<think>", "</think>"
VOCABULARY = (
    *(PAD, EOS, UNKNOWN, THINK, CLOSE),
    *("sum", "let", "leap", ":", ";", ",", "=", "+", "-"),
    *("so", ".", "check", "ok", "wait"),
    *LETTERS,
    *(str(n) for n in range(LIMIT)),
)


# A question stands in its own words, and its thought follows. llama.cpp can take a thought up again
# only if both places spell its start alike.
CHAT_TEMPLATE = """
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {{- " <think>" + (message.reasoning_content or "") + "</think>" + message.content + "<eos>" -}}
  {%- else -%}
    {{- message.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- " <think>" -}}
{%- endif -%}
"""


def prompt_of(question: Question) -> str:
    """Returns what the embedded LM reads of a question: the same as its chat template gives."""
    return f"{question.text} {THINK}"


@dataclass(frozen=True)
class Habits:
    """How the LM thinks about one task, and what it believes when it is forced to answer."""

    slip_first: float
    """The probability that a step of the first attempt is wrong."""
    slip_check: float
    """The probability that a step of a check is wrong."""
    reach: int
    """The largest error of a wrong step: it is off by 1 to `reach`, either way."""
    needless: int
    """The largest number of checks after the result is confirmed."""
    attempts: int
    """The largest number of attempts, checks included."""
    impatient: float
    """The probability that the thought ends on a result that has just been found to differ from
    the one before."""
    stubborn: float
    """The share of forced answers that repeat the latest result, right or wrong, once there is
    one; the others are the gold answer, which calibrates the LM's confidence."""


# At temperature 0.75 slips and impatience are rarer than they are here.
HABITS = {
    "sum": Habits(
        slip_first=0.08,
        slip_check=0.03,
        reach=1,
        needless=8,
        attempts=11,
        impatient=0.12,
        stubborn=0.0,
    ),
    "let": Habits(
        slip_first=0.30,
        slip_check=0.03,
        reach=1,
        needless=7,
        attempts=10,
        impatient=0.12,
        stubborn=0.88,
    ),
    "leap": Habits(
        slip_first=0.36,
        slip_check=0.36,
        reach=3,
        needless=1,
        attempts=6,
        impatient=0.0,
        stubborn=0.0,
    ),
}


@dataclass(frozen=True)
class WorkedThought:
    """A written thought about one question, from which the embedded LM learns."""

    words: tuple[str, ...]
    """The words from the first step to the last verdict, without think markers."""
    results: tuple[tuple[int, str], ...]
    """The index in `words` and the value of each result, in order; the last is the answer."""

    def result_at(self, num_words: int) -> str | None:
        """Returns the latest result within the first `num_words` words; None if there is none."""
        return next((r for i, r in reversed(self.results) if i < num_words), None)


def _steps(question: Question) -> Iterator[tuple[list[str], str, int]]:
    """Yields the steps of a question; the first one sets the total.

    A step is the words that lead to the new total, the operator and the operand.
    """
    words = question.text.split()[2:]
    if question.task != "let":
        yield [], "+", int(words[0])
        for i in range(1, len(words), 2):
            yield [*words[i : i + 2], "="], words[i], int(words[i + 1])
        return
    lines = sorted(" ".join(words[: words.index(";")]).split(" , "))
    yield lines[0].split()[:2], "+", int(lines[0].split()[2])
    for line in lines[1:]:
        *_, operator, operand = line.split()
        yield [",", *line.split(), "="], operator, int(operand)


def attempt(question: Question, slip: float, reach: int, rng: np.random.Generator) -> list[str]:
    """Computes the answer once, step by step.

    Args:
        question: A question of any task.
        slip: The probability of each step to be wrong.
        reach: The largest error of a wrong step.
        rng: Decides which steps are wrong; it is moved on.

    Returns:
        The words of the attempt; the last is its result.
    """
    total, words = 0, []
    for i, (leading, operator, operand) in enumerate(_steps(question)):
        total = apply(total, operator, operand)
        if i and rng.random() < slip:  # the first step only copies
            total += int(rng.integers(1, reach + 1)) * int(rng.choice([-1, 1]))
        total = min(max(total, 0), LIMIT - 1)
        words += [*leading, str(total)]
    return [*words, "so", str(total)]


def think(question: Question, habits: Habits, rng: np.random.Generator) -> WorkedThought:
    """Writes one thought with its slips, checks and corrections.

    Args:
        question: A question of any task.
        habits: The habits of thinking about that task.
        rng: Decides on slips and on the end; it is moved on.
    """
    words = attempt(question, habits.slip_first, habits.reach, rng)
    results = [(len(words) - 1, words[-1])]
    words.append(".")
    needless = int(rng.integers(habits.needless + 1))
    confirmed = 0
    while confirmed <= needless and len(results) < habits.attempts:
        words += ["check", *attempt(question, habits.slip_check, habits.reach, rng)]
        agrees = words[-1] == results[-1][1]
        results.append((len(words) - 1, words[-1]))
        words.append("ok" if agrees else "wait")
        confirmed = confirmed + 1 if agrees else 0
        if not agrees and rng.random() < habits.impatient:
            break
    return WorkedThought(tuple(words), tuple(results))
