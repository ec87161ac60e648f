"""Does the clock save what the tokens save? The embedded LM's test questions, greedily.

One question at a time, many in slots that are refilled, and in fixed batches, which run until
their longest row. Greedy, so that all contestants think the same thoughts, up to where they are
halted. Everything runs on one thread and waits for nothing, so time is its CPU time, which is the
wall clock's on an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.timing import Result
from haltwise import HaltHead
from haltwise.session.report import ThoughtReport
from haltwise.transformers import HaltProcessor, ProbingGeneration, generate_all
from lms.embedded import EMBEDDED, prompt_of
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import questions
from runs import Run

_CHECKPOINTS = EMBEDDED.parent
_HEADS = {"probing head": "embedded-head", "head that does not probe": "embedded-blind-head"}

Work = Callable[[], int]
"""Answers all questions, and returns the tokens that were generated for them, probes included."""


@dataclass(frozen=True)
class WallClockConfig:
    """Time saved against tokens saved."""

    num_questions: int = 64
    """Of the embedded LM's test questions."""
    num_slots: int = 32
    """Of the loop that is refilled."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Fixed batches."""
    max_tokens: int = 512
    """Of each answer."""


def measure(config: WallClockConfig, repeats: int) -> list[Result]:
    """Savings of tokens and of time, and what share of the one the other is."""
    lm = LanguageModel.load(EMBEDDED)
    lm.tokenizer.padding_side = "left"
    asked = questions("all", "test", config.num_questions)
    heads = {name: _head(folder) for name, folder in _HEADS.items()}
    results: list[Result] = []
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
    """A head, and its price for losing one point at most."""
    run = Run(_CHECKPOINTS / folder)
    price = run.operating_points()[0.01]["head"]
    assert price is not None
    return run.head(), price


def _compare(label: str, works: Mapping[str, Work], repeats: int) -> list[Result]:
    """What each saves of the first one's tokens and time; contestants take turns."""
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
            Result("wall_clock", f"{title}: tokens saved", "%", (100 * saved,)),
            Result("wall_clock", f"{title}: time saved", "%", percent),
            Result("wall_clock", f"{title}: time saved / tokens saved", "x", ratio),
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
    """`generate`, so many questions a call."""
    model: Any = lm.model  # its `generate` has no type
    num = 0
    for start in range(0, len(asked), size):
        prompts = [prompt_of(question) for question in asked[start : start + size]]
        inputs = lm.tokenizer(prompts, return_tensors="pt", padding=True)
        ids = inputs["input_ids"]
        arguments, halter = _arguments(lm, head, price)
        out = model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_tokens,
            **arguments,
        )
        reports: list[ThoughtReport | None] = [*halter.report] if halter else [None] * len(prompts)
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
    halter = ProbingGeneration(head, lm.tokenizer, price)
    return {"custom_generate": halter}, halter


def _num_tokens(lm: LanguageModel, row: list[int], report: ThoughtReport | None) -> int:
    """Tokens generated for a row.

    Args:
        lm: Whose pad token fills up rows.
        row: All that follows the prompt.
        report: Of a head that probes: it has generated a halted row's answer when it probed.
    """
    if report is not None and report.halted:
        return report.position + report.num_probe_tokens
    num_probe_tokens = 0 if report is None else report.num_probe_tokens
    return num_probe_tokens + sum(1 for token in row if token != lm.tokenizer.pad_token_id)


def _refilled(
    lm: LanguageModel, asked: list[Question], config: WallClockConfig, head: HaltHead, price: float
) -> int:
    """The loop whose slots are refilled, with a head."""
    prompts = [prompt_of(question) for question in asked]
    answers = generate_all(
        lm.model, lm.tokenizer, head, prompts, config.num_slots, config.max_tokens, price
    )
    probes = head.config.halting.probing == "always"
    return sum(_num_tokens(lm, done.ids, done.report if probes else None) for done in answers)
