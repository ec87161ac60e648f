"""What becomes of one question while it is recorded, and what is kept beside all of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from haltwise import Halting, InputError, Signals
from haltwise.engine.token_rules import TokenRules
from haltwise.session.forced_answer import Probe
from haltwise.session.thought import Thought
from lms.language_model import LanguageModel
from lms.questions import Question

Row = dict[str, Any]
#: A question with a sampling seed.
Work = tuple[Question, int]

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass
class Recording:
    """A trace that is being recorded."""

    question: Question
    seed: int
    position: list[int] = field(default_factory=list)
    """Of each decision point."""
    probes: list[Probe] = field(default_factory=list)
    """The forced answer at each decision point."""
    signals: dict[str, list[Any]] = field(default_factory=dict)
    """What else was measured at each decision point, by column name."""

    def see(self, probe: Probe, signals: Signals, i: int) -> None:
        """Takes in a decision point: its forced answer and row i of some signals."""
        self.position.append(int(signals.position[i]))
        self.probes.append(probe)
        for name, values in self.signals.items():
            value = getattr(signals, name)[i]
            # A copy, lest a vector keep those of the whole batch.
            values.append(value.astype(np.float16) if name == "hidden" else value)

    def row(self, model: str, rules: TokenRules, thought: Thought) -> Row:
        """The finished trace, by column name.

        Args:
            model: Name of the LM.
            rules: How an answer is read.
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


def asked(lm: LanguageModel, work: Iterable[Work], max_prompt: float) -> Iterator[tuple[Work, str]]:
    """Questions with their prompts; those that are too long are told and left out.

    Args:
        lm: The LM.
        work: Questions with sampling seeds.
        max_prompt: Tokens of a prompt at most.
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


def tried(lm: LanguageModel, work: Sequence[Work], max_prompt: float) -> list[tuple[Work, str]]:
    """Those of some questions that can be tried; as `asked`.

    Raises:
        InputError: If all of them are too long.
    """
    fitting = list(asked(lm, work, max_prompt))
    if not fitting:
        raise InputError(
            f"none of {len(work)} questions has at most {max_prompt:,} tokens, the LM's context "
            "less max_tokens and a forced answer: expected shorter ones, or lower --max-tokens"
        )
    return fitting


def trace_id(model: str, question: Question, seed: int) -> str:
    """Names the trace of a question answered once by an LM."""
    return f"{model}/{question.question_id}/{seed}"


def recorder_of(
    engine: str,
    lm: LanguageModel,
    halting: Halting,
    rules: TokenRules,
    max_tokens: int,
    temperature: float,
    signals: Sequence[str],
    instruction: str,
) -> dict[str, Any]:
    """What is kept beside the traces: all that decides what a question and a seed give.

    Args:
        engine: What runs the LM.
        lm: The LM.
        halting: How it is halted.
        rules: The same, for this LM.
        max_tokens: Token budget of a question.
        temperature: Of sampling.
        signals: Names of what is measured.
        instruction: Follows every question.
    """
    project = tomllib.loads(_PROJECT.read_text())["project"]
    return {
        "engine": engine,
        "lm": lm.name,
        "revision": lm.revision,
        "tokenizer": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "messages": list(lm.chat.before),
        "instruction": instruction,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "probing": halting.probing,
        "decision_rule": halting.decision_rule,
        "close_text": halting.close_text,
        "close_tokens": len(rules.close_ids),
        "max_answer_tokens": halting.max_answer_tokens,
        "answer_rule": halting.answer_rule,
        "answer_end": halting.answer_end,
        "think_start": halting.think_start,
        "think_end": halting.think_end,
        "confidence_rule": halting.confidence_rule,
        "signals": list(signals),
        "code_version": project["version"],
    }
