"""A dry run of an LM: a few questions, and whether halting it can work at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from haltwise import Halting, InputError
from haltwise.engine.decoder import Decoder
from haltwise.engine.token_rules import TokenRules
from haltwise.session.thought import LONGEST_OPENING, Probe, Thought
from lms.ask import check_closes
from lms.chat import MARKERS
from lms.language_model import LanguageModel
from lms.left_out import left_out
from lms.questions import Question
from lms.tried import Tried, misspelt, never_right, report, short

# The decision points of a thought that are probed: to look at more would teach nothing new.
_POINTS = 8


@dataclass
class TriedQuestion:
    """A question that the LM has been tried with, and what came of it."""

    question: Question
    """The question."""
    prompt: str
    """The LM's whole input."""
    thought: Thought
    """The thought and what followed it, not halted."""
    answer: str
    """The LM's own answer, as it was read."""
    probes: list[Probe] = field(default_factory=list)
    """The forced answers at the first decision points of the thought."""

    @property
    def is_right(self) -> bool:
        """Whether the LM's own answer is the gold answer."""
        return self.question.is_right(self.answer)

    @property
    def told(self) -> Tried:
        """What a person is told of it."""
        return Tried(
            self.prompt,
            self.thought.text(),
            self.answer,
            self.question.gold,
            self.is_right,
            self.thought.finished,
            self.thought.num_tokens,
            [probe.answer for probe in self.probes],
            self.probes[0].text if self.probes else "",
        )


@dataclass
class SelfTest:
    """What a dry run has found; `str()` of it is for a person."""

    chat: str
    """A description of how the LM is asked and how it thinks."""
    close_text: str
    """The text that was appended to thoughts to force answers."""
    answered: list[TriedQuestion]
    """Every question that was asked."""
    warnings: list[str]
    """Sentences about what may be wrong, one for each finding."""

    @property
    def probes(self) -> list[Probe]:
        """The forced answers of all questions."""
        return [probe for one in self.answered for probe in one.probes]

    def share(self, holds: Callable[[TriedQuestion], bool]) -> float:
        """Returns the share of the questions of which something holds."""
        return sum(map(holds, self.answered)) / len(self.answered)

    def __str__(self) -> str:
        """Returns about ten lines for a person, and one for each warning."""
        begun = self.share(lambda one: one.thought.begun)
        tried = [one.told for one in self.answered]
        return report(self.chat, self.close_text, tried, self.warnings, begun)


def self_test(
    lm: LanguageModel,
    questions: Iterable[Question],
    halting: Halting,
    *,
    max_tokens: int,
    temperature: float,
    num: int = 4,
) -> SelfTest:
    """Asks a few questions and forces answers, before hours are spent on many.

    Args:
        lm: The LM to try.
        questions: Questions, of which the first ones are asked.
        halting: How the LM will be halted.
        max_tokens: The token budget of a question, its answer included.
        temperature: The temperature of sampling; 0 is greedy.
        num: The number of questions to ask, all at once.

    Raises:
        InputError: If halting cannot work: no thought begins, no thought has a decision point, no
            forced answer can be read, or the close text closes nothing.
    """
    check_closes(halting)
    asked = list(islice(questions, num))
    if not asked:
        raise InputError("no question to try the LM with: expected at least 1")
    decoder = Decoder(lm.model, lm.tokenizer, halting, len(asked), max_tokens, temperature)
    answered = _answer(lm, decoder, asked)
    _check_thoughts(answered, halting)
    probes = [probe for one in answered for probe in one.probes]
    if not any(probe.answer for probe in probes):
        raise InputError(
            f"none of {len(probes)} forced answers can be read by the rule "
            f"{halting.answer_rule!r}, such as {short(probes[0].text)}: set --close-text to what "
            "leads the LM to its answer, or raise --max-answer-tokens"
        )
    warnings = [
        *misspelt(halting.close_text, decoder.rules.spelt_close()),
        *_warn_of_ends(answered, decoder),
        *_warn_of_markers(answered, halting),
        *never_right([one.told for one in answered]),
        *left_out(lm.model.generation_config, temperature),
    ]
    return SelfTest(lm.chat.describe(), halting.close_text, answered, warnings)


def _answer(lm: LanguageModel, decoder: Decoder, asked: Sequence[Question]) -> list[TriedQuestion]:
    """Answers all questions at once, and forces answers at their first decision points."""
    slots = np.arange(len(asked))
    prompts = [lm.prompt(question.text) for question in asked]
    decoder.start(slots, prompts, [0] * len(asked))
    probes: list[list[Probe]] = [[] for _ in asked]
    while len(slots):
        at_point = decoder.advance(slots)
        here = np.array([s for s in slots[at_point] if len(probes[s]) < _POINTS], dtype=np.int64)
        for slot, probe in zip(here, decoder.force(here), strict=True):
            probes[slot].append(probe)
        slots = slots[[not decoder.thoughts[int(slot)].ended for slot in slots]]
    thoughts = [decoder.thoughts[slot] for slot in range(len(asked))]
    answers = [decoder.rules.read_answer(thought.answer_text()) for thought in thoughts]
    return list(map(TriedQuestion, asked, prompts, thoughts, answers, probes))


def _check_thoughts(answered: Sequence[TriedQuestion], halting: Halting) -> None:
    """Refuses an LM whose thoughts do not begin, or have no decision point.

    Raises:
        InputError: If no thought has begun, or no thought has come to a decision point.
    """
    begun = [one.thought for one in answered if one.thought.begun]
    if not begun:
        text = answered[0].thought.text()
        raise InputError(
            f"no thought begins: {halting.think_start!r} neither ends the prompt nor is among the "
            f"first {LONGEST_OPENING} tokens, which are {short(text)}; set --think-start and "
            "--think-end, both empty if the LM reasons in the open"
        )
    if not any(one.probes for one in answered):
        longest = max(thought.position for thought in begun)
        raise InputError(
            f"no thought comes to a decision point: the longest has {longest} tokens, points are "
            f"{halting.decision_rule!r}; lower --every or raise --max-tokens"
        )


def _warn_of_ends(answered: Sequence[TriedQuestion], decoder: Decoder) -> list[str]:
    """Returns warnings if only budgets end the thoughts, or the forced answers."""
    warnings = []
    thoughts = [one.thought for one in answered]
    if not any(t.finished or (decoder.rules.think_end and t.closed) for t in thoughts):
        warnings.append(
            f"no thought and no answer ended within {decoder.max_tokens} tokens: raise "
            "--max-tokens, or it is the budget that ends them all"
        )
    probes = [probe for one in answered for probe in one.probes]
    if not any(_has_ended(probe, decoder.rules) for probe in probes):
        warnings.append(
            f"no forced answer came to its end within {decoder.halting.max_answer_tokens} tokens: "
            "raise --max-answer-tokens, or set --answer-end to what follows an answer"
        )
    return warnings


def _has_ended(probe: Probe, rules: TokenRules) -> bool:
    return probe.num_tokens > len(probe.tokens) or rules.is_complete(probe.tokens)


def _warn_of_markers(answered: Sequence[TriedQuestion], halting: Halting) -> list[str]:
    """Returns a warning if an LM that is said to reason in the open writes think markers."""
    if halting.think_start:
        return []
    for one in answered:
        thought = one.thought
        for start, end in MARKERS:
            if start in thought.text() or end in thought.text():
                return [
                    f"the LM reasons in the open, but writes {start!r} or {end!r}: if that is how "
                    f"it thinks, set --think-start '{start}' --think-end '{end}'"
                ]
    return []
