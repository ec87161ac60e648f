"""Time saved against tokens saved, on the embedded LM's test questions.

The questions are asked one at a time, many at once in slots that are refilled, and in fixed
batches, which run until their longest row has ended. Decoding is greedy, so that all contestants
think the same thoughts, up to where they are halted. Everything runs on one thread and waits for
nothing: time is CPU time, which is the wall clock's on an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.timing import BenchResult
from haltwise import HaltHead
from haltwise.session.request import ThoughtReport
from haltwise.transformers import HaltProcessor, ProbingGeneration, generate_all
from lms.embedded import EMBEDDED, prompt_of
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import questions
from runs import Run

_CHECKPOINTS = EMBEDDED.parent
_HEADS = {"probing head": "embedded-head", "head that does not probe": "embedded-blind-head"}

AnsweringWork = Callable[[], int]
"""Answers all questions and returns the number of tokens generated, probes included."""


@dataclass(frozen=True)
class WallClockConfig:
    """How much time a head saves against the tokens that it saves."""

    num_questions: int = 64
    """The number of the embedded LM's test questions."""
    num_slots: int = 32
    """The number of slots that are refilled."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """The sizes of fixed batches."""
    max_tokens: int = 512
    """The token budget of each question."""


def measure(config: WallClockConfig, repeats: int) -> list[BenchResult]:
    """Measures the savings of tokens and of time, and the ratio of the two."""
    lm = LanguageModel.load(EMBEDDED)
    lm.tokenizer.padding_side = "left"
    asked = questions("all", "test", config.num_questions)
    heads = {name: _head(folder) for name, folder in _HEADS.items()}
    results: list[BenchResult] = []
    for size in (1, *config.batch_sizes):
        works = {
            name: partial(_in_batches, lm, asked, size, config.max_tokens, *head)
            for name, head in ({"never halted": (None, 0.0)} | heads).items()
        }
        results += _compare(f"batch {size}", works, repeats)
    # At a price of 0 nothing is measured or probed.
    never = (heads["head that does not probe"][0], 0.0)
    works = {
        name: partial(_refilled, lm, asked, config, *head)
        for name, head in ({"never halted": never} | heads).items()
    }
    return results + _compare(f"{config.num_slots} refilled slots", works, repeats)


def _head(folder: str) -> tuple[HaltHead, float]:
    """Returns a head, and its price for losing at most one point of EM."""
    run = Run(_CHECKPOINTS / folder)
    price = run.operating_points()[0.01]["head"]
    assert price is not None
    return run.head(), price


def _compare(label: str, works: Mapping[str, AnsweringWork], repeats: int) -> list[BenchResult]:
    """Measures what each contestant saves of the first one's tokens and time; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    tokens: dict[str, int] = {}
    for i in range(repeats):
        for name in list(works)[:: -1 if i % 2 else 1]:
            start = time.process_time()
            tokens[name] = works[name]()
            seconds[name].append(time.process_time() - start)
    plain, *others = works
    results = []
    for name in others:
        saved = 1 - tokens[name] / tokens[plain]
        of_time = [
            1 - mine / theirs for mine, theirs in zip(seconds[name], seconds[plain], strict=True)
        ]
        percent = tuple(100 * share for share in of_time)
        ratio = tuple(share / saved for share in of_time)
        title = f"{label}, {name}"
        results += [
            BenchResult("wall_clock", f"{title}: tokens saved", "%", (100 * saved,)),
            BenchResult("wall_clock", f"{title}: time saved", "%", percent),
            BenchResult("wall_clock", f"{title}: time saved / tokens saved", "x", ratio),
        ]
    return results


def _in_batches(
    lm: LanguageModel,
    asked: list[Question],
    size: int,
    max_tokens: int,
    head: HaltHead | None,
    price: float,
) -> int:
    """Answers questions by `generate`, `size` of them a call; None is no head."""
    model: Any = lm.model  # its `generate` has no type
    num = 0
    for start in range(0, len(asked), size):
        prompts = [prompt_of(question) for question in asked[start : start + size]]
        inputs = lm.tokenizer(prompts, return_tensors="pt", padding=True)
        ids = inputs["input_ids"]
        arguments, generation = _arguments(lm, head, price)
        out = model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_tokens,
            **arguments,
        )
        reports: list[ThoughtReport | None] = (
            [*generation.report] if generation else [None] * len(prompts)
        )
        for row, report in zip(out[:, ids.shape[1] :].tolist(), reports, strict=True):
            num += _num_tokens(lm, row, report)
    return num


def _arguments(
    lm: LanguageModel, head: HaltHead | None, price: float
) -> tuple[dict[str, Any], ProbingGeneration | None]:
    if head is None:
        return {}, None
    if head.config.halting.probing == "at_halt":
        return {"logits_processor": [HaltProcessor(head, lm.model, lm.tokenizer, price)]}, None
    generation = ProbingGeneration(head, lm.tokenizer, price)
    return {"custom_generate": generation}, generation


def _num_tokens(lm: LanguageModel, row: list[int], report: ThoughtReport | None) -> int:
    """Returns the number of tokens generated for a row, probes included.

    Args:
        lm: The LM, whose pad token fills up rows.
        row: All tokens that follow the prompt.
        report: The report of a head that probes: it has generated a halted row's answer when it
            probed. None for any other contestant.
    """
    if report is not None and report.halted:
        return report.position + report.num_probe_tokens
    num_probe_tokens = 0 if report is None else report.num_probe_tokens
    return num_probe_tokens + sum(1 for token in row if token != lm.tokenizer.pad_token_id)


def _refilled(
    lm: LanguageModel, asked: list[Question], config: WallClockConfig, head: HaltHead, price: float
) -> int:
    """Answers questions in slots that are refilled, with a head at a price."""
    prompts = [prompt_of(question) for question in asked]
    answers = generate_all(
        lm.model, lm.tokenizer, head, prompts, config.num_slots, config.max_tokens, price
    )
    probes = head.config.halting.probing == "always"
    return sum(_num_tokens(lm, done.ids, done.report if probes else None) for done in answers)
