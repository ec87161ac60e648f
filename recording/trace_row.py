"""One question while it is recorded, until it is a row of a trace file, and the file's metadata."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from haltwise import Halting, InputError, Signals
from haltwise.session.thought import PointRules, Probe, Thought
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tried import Tried, never_right, report

#: A finished trace, by the column names of `traces.SCHEMA`.
TraceRow = dict[str, Any]
#: A question with the sampling seed of one answer to it.
SeededQuestion = tuple[Question, int]
#: The same with the LM's whole input.
PromptedQuestion = tuple[SeededQuestion, str]

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass
class UnfinishedTrace:
    """A trace that is being recorded."""

    question: Question
    """The question that is answered."""
    seed: int
    """The sampling seed."""
    position: list[int] = field(default_factory=list)
    """The number of thinking tokens up to each decision point."""
    probes: list[Probe] = field(default_factory=list)
    """The forced answer at each decision point."""
    signals: dict[str, list[Any]] = field(default_factory=dict)
    """The signals that were measured at each decision point, by column name."""

    def see(self, probe: Probe, signals: Signals, i: int) -> None:
        """Takes in a decision point: its forced answer and row i of some signals."""
        self.position.append(int(signals.position[i]))
        self.probes.append(probe)
        for name, values in self.signals.items():
            value = getattr(signals, name)[i]
            # A vector is copied, lest it keep those of the whole batch in memory.
            values.append(value.astype(np.float16) if name == "hidden" else value)

    def row(self, model: str, rules: PointRules, thought: Thought) -> TraceRow:
        """Returns the finished trace.

        Args:
            model: The name of the LM.
            rules: The rules by which an answer is read.
            thought: All that was generated.
        """
        question, probes = self.question, self.probes
        final_answer = rules.read_answer(thought.answer_text())
        return {
            "trace_id": trace_id(model, question, self.seed),
            "question_id": question.question_id,
            "task": question.task,
            "segment": question.segment,
            "model": model,
            "seed": self.seed,
            "split": question.split,
            "gold": question.gold,
            "num_tokens": thought.num_tokens,
            "finished": thought.finished,
            "final_answer": final_answer,
            "final_correct": question.is_right(final_answer),
            "position": self.position,
            "probe_tokens": [probe.num_tokens for probe in probes],
            "answer": [probe.answer for probe in probes],
            "correct": [question.is_right(probe.answer) for probe in probes],
            "confidence": [probe.confidence for probe in probes],
            "answer_logprobs": [probe.logprobs for probe in probes],
            **self.signals,
            "question": question.text,
            "text": thought.text(),
        }


def with_prompts(
    lm: LanguageModel, work: Iterable[SeededQuestion], max_prompt: float
) -> Iterator[PromptedQuestion]:
    """Yields questions with their prompts; those that are too long are left out, with a message.

    Args:
        lm: The LM.
        work: The questions with their sampling seeds.
        max_prompt: The largest number of tokens of a prompt.
    """
    for job in work:
        prompt = lm.prompt(job[0].text)
        num_tokens = len(lm.tokenizer.encode(prompt, add_special_tokens=False))
        if num_tokens <= max_prompt:
            yield job, prompt
        else:
            tqdm.write(
                f"{job[0].question_id} has {num_tokens:,} tokens, expected at most "
                f"{max_prompt:,}: left out"
            )


def fitting_prompts(
    lm: LanguageModel, work: Sequence[SeededQuestion], max_prompt: float
) -> list[PromptedQuestion]:
    """Returns those of some questions whose prompts are not too long, with these prompts.

    Args:
        lm: The LM.
        work: The questions with their sampling seeds.
        max_prompt: The largest number of tokens of a prompt.

    Raises:
        InputError: If all of them are too long.
    """
    fitting = list(with_prompts(lm, work, max_prompt))
    if not fitting:
        raise InputError(
            f"none of {len(work)} questions has at most {max_prompt:,} tokens, the LM's context "
            "less max_tokens and a forced answer: expected shorter ones, or lower --max-tokens"
        )
    return fitting


def trace_id(model: str, question: Question, seed: int) -> str:
    """Returns the name of the trace of one answer to a question by an LM.

    Args:
        model: The name of the LM.
        question: The question.
        seed: The sampling seed of the answer.
    """
    return f"{model}/{question.question_id}/{seed}"


def sampling_seed(prompt: str, seed: int) -> int:
    """Returns the seed of a server's draws: the question and its sampling seed alone decide on it.

    Args:
        prompt: The LM's whole input.
        seed: The sampling seed of the answer.
    """
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def judged_trial(
    rows: Sequence[TraceRow],
    prompts: Mapping[str, str],
    description: str,
    halting: Halting,
    warnings: Sequence[str] = (),
) -> str:
    """Returns what the first traces of an engine tell, for a person.

    Args:
        rows: The traces.
        prompts: By question id, the LM's whole input.
        description: How the LM is asked and how it thinks.
        halting: How it is halted.
        warnings: Sentences about what else may be wrong.

    Raises:
        InputError: If no thought has a decision point, or no forced answer can be read.
    """
    answers = [answer for row in rows for answer in row["answer"]]
    shown = f"such as {rows[0]['text']!r:.160}"
    if not answers:
        raise InputError(
            f"no thought comes to a decision point ({halting.decision_rule!r}, thoughts "
            f"begin with {halting.think_start!r}), {shown}: see --think-start, --every "
            "and --max-tokens"
        )
    if not any(answers):
        raise InputError(
            f"none of {len(answers)} forced answers can be read by the rule "
            f"{halting.answer_rule!r}, {shown}: set --close-text to what leads the LM to "
            "its answer, or raise --max-answer-tokens"
        )
    tried = [
        Tried(
            prompts[row["question_id"]],
            row["text"],
            row["final_answer"],
            row["gold"],
            row["final_correct"],
            row["finished"],
            row["num_tokens"],
            row["answer"],
        )
        for row in rows
    ]
    return report(description, halting.close_text, tried, [*never_right(tried), *warnings])


def known_lm(lm: LanguageModel) -> dict[str, Any]:
    """Returns what is told beside traces of an LM that is loaded here."""
    return {
        "lm": lm.name,
        "revision": lm.revision,
        "tokenizer": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "messages": list(lm.chat.before),
    }


def recorder_metadata(
    engine: str,
    lm: dict[str, Any],
    halting: Halting,
    close_tokens: int | None,
    max_tokens: int,
    temperature: float,
    signals: Sequence[str],
    instruction: str,
) -> dict[str, Any]:
    """Returns the metadata beside the traces: all that decides what a question and a seed give.

    Args:
        engine: The name of what runs the LM.
        lm: What is known of the LM, and how it is asked.
        halting: How the LM is halted.
        close_tokens: The number of tokens of the close text; None if nobody tells.
        max_tokens: The token budget of a question.
        temperature: The temperature of sampling.
        signals: The names of the signals that are measured.
        instruction: The text that follows every question.
    """
    project = tomllib.loads(_PROJECT.read_text())["project"]
    return {
        "engine": engine,
        **lm,
        "instruction": instruction,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "probing": halting.probing,
        "decision_rule": halting.decision_rule,
        "close_text": halting.close_text,
        **({} if close_tokens is None else {"close_tokens": close_tokens}),
        "max_answer_tokens": halting.max_answer_tokens,
        "answer_rule": halting.answer_rule,
        "answer_end": halting.answer_end,
        "think_start": halting.think_start,
        "think_end": halting.think_end,
        "confidence_rule": halting.confidence_rule,
        "signals": list(signals),
        "code_version": project["version"],
    }
