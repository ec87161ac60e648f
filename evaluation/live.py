"""Runs the head beside its LM, to see whether the numbers from replay hold where it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from command import progress
from envs.replay import observed_features
from evaluation.intervals import interval, resample
from evaluation.outcome import Outcome, halt_outcome, saving
from evaluation.rows import Interval
from haltwise import HaltHead, InputError
from haltwise.engine.token_rules import end_tokens
from haltwise.session.request import ThoughtReport
from haltwise.session.thought import Thought
from lms.language_model import LanguageModel
from lms.questions import Question
from traces import Traces

if TYPE_CHECKING:
    from haltwise.transformers import ProbingGeneration

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Comparison:
    """One head at one price, beside the running LM and replayed, on the same questions."""

    num_questions: int
    price: float
    live_em: float
    live_tokens: float
    """The mean number of tokens a question, all probes included."""
    live_saving: float
    """The saving against the never halted traces of the same questions."""
    replay_em: float
    replay_tokens: float
    replay_saving: float
    em_difference: Interval
    """The 95 % interval of live EM minus replayed EM, paired by question."""
    saving_difference: Interval
    """The 95 % interval of live saving minus replayed saving, paired by question."""

    def __str__(self) -> str:
        """Returns two lines for a person."""
        em = [100 * end for end in self.em_difference]
        saved = [100 * end for end in self.saving_difference]
        return (
            f"Beside the running LM, {self.num_questions} questions, price {self.price:.4g}: "
            f"EM {100 * self.live_em:.2f} (replay {100 * self.replay_em:.2f}), "
            f"saving {100 * self.live_saving:.1f} (replay {100 * self.replay_saving:.1f})\n"
            f"live minus replay, 95 %: EM [{em[0]:+.2f}, {em[1]:+.2f}], "
            f"saving [{saved[0]:+.1f}, {saved[1]:+.1f}]"
        )


@dataclass(frozen=True)
class Sampling:
    """How answers are generated."""

    max_tokens: int
    """The token budget of a question, its answer included."""
    temperature: float
    """The temperature of sampling; 0 always takes the likeliest token."""
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Returns arguments for `generate`, which make it sample as plainly as the recorder does.

        The LM's own defaults have no influence then.
        """
        if not self.temperature:
            return {"max_new_tokens": self.max_tokens, "do_sample": False}
        plain = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": self.max_tokens, "temperature": self.temperature} | plain


def run_beside(
    head: HaltHead,
    lm: LanguageModel,
    asked: Sequence[Question],
    traces: Traces,
    price: float,
    seed: int = 0,
) -> Comparison:
    """Answers questions by `generate` with the head, and compares that with replaying it.

    Args:
        head: The exported head.
        lm: The LM that the traces came from.
        asked: The questions of `traces`.
        traces: One recorded trace or more of each question.
        price: The price, in exact match per 1,000 tokens.
        seed: The seed of sampling, which is another than the traces': the same questions are
            thought about anew.

    Raises:
        InputError: If head and LM do not fit each other, or no question is among the traces'.
    """
    kept = {question.question_id: question for question in asked}
    traces = traces.select(np.isin(traces.question_id, list(kept)))
    if not len(traces):
        raise InputError("none of the questions is among the traces: nothing to run beside the LM")
    observing, halting = head.config.observing, head.config.halting
    features = observed_features(traces, observing, halting)
    probing = halting.probing
    replay = halt_outcome(traces, head.halts(features, price), probing)
    in_order = [kept[name] for name in traces.question_id.tolist()]
    sampling = Sampling(traces.recorder["max_tokens"], traces.recorder["temperature"], seed)
    live = answer(head, lm, in_order, price, sampling)
    resampled = resample(traces, {"live": live, "replay": replay})
    return Comparison(
        num_questions=len(np.unique(traces.question_id)),
        price=price,
        live_em=float(live.em.mean()),
        live_tokens=float(live.cost.mean()),
        live_saving=saving(traces, live),
        replay_em=float(replay.em.mean()),
        replay_tokens=float(replay.cost.mean()),
        replay_saving=saving(traces, replay),
        em_difference=interval(resampled["live"].em_delta - resampled["replay"].em_delta),
        saving_difference=interval(resampled["live"].saving - resampled["replay"].saving),
    )


def answer(
    head: HaltHead,
    lm: LanguageModel,
    asked: Sequence[Question],
    price: float,
    sampling: Sampling,
) -> Outcome:
    """Lets an LM answer questions with a head beside it, by transformers' `generate`.

    Args:
        head: The head that decides.
        lm: The LM that thinks.
        asked: N questions.
        price: The price, in exact match per 1,000 tokens.
        sampling: How answers are generated, which is to be how the traces were recorded.

    Returns:
        The EM and the cost (all probes included) of each question (N,), and whether its thought
        was halted.

    Raises:
        InputError: If head and LM do not fit each other.
    """
    import torch

    from haltwise.transformers import ProbingGeneration

    torch.manual_seed(sampling.seed)
    # Answers are taken as they are, as replay takes them: one that cannot be read is a wrong one.
    generation = ProbingGeneration(head, lm.tokenizer, price, accepts=lambda text: True)
    lm.tokenizer.padding_side = "left"
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    columns: list[tuple[bool, int, bool]] = []
    for start in progress(range(0, len(asked), _BATCH_SIZE), "live", unit="batch"):
        batch = asked[start : start + _BATCH_SIZE]
        prompts = [lm.prompt(question.text) for question in batch]
        inputs = lm.tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(lm.model.device)
        generate = cast(Any, lm.model).generate
        ids = generate(**inputs, **sampling.arguments(), custom_generate=generation)
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        generated = [_without_padding(row, end_tokens(lm.model.generation_config)) for row in rows]
        columns += map(partial(_outcome, generation), batch, prompts, generated, generation.report)
    em_column, cost, halted = zip(*columns, strict=True)
    return Outcome(np.array(em_column), np.array(cost, dtype=np.int64), np.array(halted))


def _without_padding(tokens: list[int], eos_ids: list[int]) -> list[int]:
    """Returns the tokens up to the first end token and with it; all if there is none."""
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _outcome(
    generation: ProbingGeneration,
    question: Question,
    prompt: str,
    generated: list[int],
    report: ThoughtReport,
) -> tuple[bool, int, bool]:
    """Returns the EM and the cost of one row of a batch, and whether it was halted."""
    if report.halted:
        answer, spent = report.answer, report.position
    else:
        thought = Thought(generation.rules, prompt)
        for token in generated:
            thought.add(token)
        answer, spent = generation.rules.read_answer(thought.answer_text()), len(generated)
    return question.is_right(answer), spent + report.num_probe_tokens, report.halted
