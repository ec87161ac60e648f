"""What an LM's own answers return: exact match less a price on their tokens, never halted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from haltwise import Halting, InputError
from haltwise.engine.decoder import Decoder
from haltwise.engine.token_rules import TokenRules
from haltwise.session.thought import Thought
from lms.language_model import LanguageModel
from lms.questions import Question
from recording.hf_engine import record
from traces import Traces
from traces.store import read_tables, shards_of

# The questions that are answered at once.
_SLOTS = 64


class OwnReturn:
    """Judges what an LM answers by itself, as a recording of it would be judged.

    Args:
        lm: The LM, which may learn in the meantime.
        halting: How answers are read.
        max_tokens: The token budget of a question, its answer included.
        price: What tokens cost, in exact match per 1,000.
    """

    def __init__(self, lm: LanguageModel, halting: Halting, max_tokens: int, price: float) -> None:
        """Reads the rules by which answers are read."""
        self._lm, self._max_tokens, self._price = lm, max_tokens, price
        # No thought has a decision point: nothing is forced.
        no_point = f"every {max_tokens + 1} tokens"
        self._halting = replace(halting, probing="at_halt", decision_rule=no_point)
        self._rules = TokenRules(lm.tokenizer, self._halting)

    @cached_property
    def _decoder(self) -> Decoder:
        """What lets the LM answer; it is made once it is asked for, as it takes memory."""
        lm = self._lm
        return Decoder(
            lm.model, lm.tokenizer, self._halting, _SLOTS, self._max_tokens, lm.temperature
        )

    def of_answer(self, question: Question, tokens: Sequence[int]) -> float:
        """Returns what an answer is worth.

        Args:
            question: What was asked.
            tokens: The ids of all that the LM has said, its end token included.
        """
        thought = Thought(self._rules, self._lm.prompt(question.text))
        for token in tokens:
            thought.add(token)
        answer = self._rules.read_answer(thought.answer_text())
        return self._worth(question.is_right(answer), thought.num_tokens)

    def of_lm(self, questions: Sequence[Question]) -> list[float]:
        """Lets the LM answer questions, and returns what each answer is worth.

        The same draws decide on the tokens each time.

        Args:
            questions: All different.
        """
        answers = record(self._lm, self._decoder, [(question, 0) for question in questions])
        found = {
            row["question_id"]: self._worth(row["final_correct"], row["num_tokens"])
            for row in answers
        }
        return [found[question.question_id] for question in questions]

    def _worth(self, is_right: bool, num_tokens: int) -> float:
        return is_right - self._price * num_tokens / 1000


def recorded_questions(path: Path, traces: Traces, scorer: str) -> list[Question]:
    """Returns the questions of traces that have a gold answer, each once, in the files' order.

    Args:
        path: The file or folder that the traces are from, which has what was asked.
        traces: The traces.
        scorer: The rule by which answers are read and compared.

    Raises:
        InputError: If no question has a gold answer.
    """
    names = ("question_id", "task", "segment", "question", "gold", "split")
    asked = set(traces.question_id[traces.labelled].tolist())
    found: dict[str, Question] = {}
    for shard in shards_of(path):
        for table in read_tables(shard, names):
            if "question" in table.column_names:
                for row in zip(*(table[name].to_pylist() for name in names), strict=True):
                    question_id, task, segment, text, gold, split = row
                    if question_id in asked:
                        found[question_id] = Question(
                            question_id, task, segment, text, gold, split, scorer
                        )
    if not found:
        raise InputError(
            f"{path}: no train question has a gold answer, expected some to be judged by"
        )
    return list(found.values())
