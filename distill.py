"""Teaches an LM to think no longer than a head would have let it.

    python distill.py --head RUN --traces FILE_OR_FOLDER --out NEW_LM
    python distill.py --head RUN --traces FILE_OR_FOLDER --out NEW_LM --grpo.steps 200

The LM's own thoughts, cut where the head would have halted them and closed by the answer that was
forced there, are what it is fine-tuned on, where that answer is right. After that, or instead of
it, the LM can learn from what its own new answers return: exact match less the price of their
tokens. The result is an LM folder like any other: it is recorded, evaluated and halted with the
same commands.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import installed  # noqa: F401, tells what is missing

import numpy as np

from command import run, whole_folder, write_json
from haltwise import HaltHead, InputError
from haltwise.errors import check_ranges
from lms.chat import RecordedChat
from lms.fine_tune import Example, FineTuneConfig, fine_tune, save_lm
from lms.grpo import GrpoConfig, reinforce
from lms.held_out import HeldOut
from lms.language_model import LanguageModel, check_device
from lms.questions import Question
from recording.cut_thoughts import cut_thoughts
from recording.own_return import OwnReturn, recorded_questions
from traces import Traces, check_recorded, read_traces


@dataclass(frozen=True)
class DistillConfig:
    """Teach an LM to think no longer than a head would have let it."""

    head: Path
    """A head that was trained on this LM: a run folder, or one of a head alone."""
    traces: Path
    """Recorded traces of this LM with their texts, a file or a folder; only train questions are
    learned from."""
    out: Path
    """The folder for the new LM; it must not exist."""
    lm: str = "embedded"
    """The LM: a hub name, a folder, or "embedded"."""
    price: float | None = None
    """The price of tokens, in exact match per 1,000, at which the head cuts and answers are worth
    what they return; default: the head's own. At 0 no thought is cut."""
    held_out: float = 0.0
    """Share of the questions that tell when the LM has learned enough, by what its own answers
    return; nothing is learned from them. The learning rate then falls only where they are at a
    plateau. At 0 all are learned from, and all steps are done."""
    least_gain: float = 0.01
    """The gain in their mean return that is asked of each twentieth of the steps."""
    device: str = "cpu"
    """The device to train on, as PyTorch names it."""
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """How the LM is fine-tuned on cut thoughts."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """How it is trained on its own answers then."""

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If one is out of its range, or nothing is to be learned.
        """
        price = self.price
        is_price = price is None or 0 <= price < math.inf
        ranges = {
            "price": (is_price, "0 or more, and finite"),
            "held_out": (0 <= self.held_out < 1, "0 or more, below 1"),
            "least_gain": (0 < self.least_gain < math.inf, "above 0, and finite"),
        }
        check_ranges(self, ranges)
        self.fine_tune.check("fine_tune.")
        self.grpo.check("grpo.")
        if not (self.fine_tune.epochs or self.grpo.steps):
            raise InputError(
                "--fine-tune.epochs and --grpo.steps are 0: expected something to learn"
            )
        check_device(self.device)


def main(config: DistillConfig) -> Path:
    """Cuts the thoughts, trains the LM, and writes it.

    Returns:
        The new folder.

    Raises:
        InputError: If the head, the traces and the LM cannot be used or are not of one LM, or
            nothing is right to learn from.
    """
    config.check()
    if config.out.exists():
        raise InputError(f"{config.out} exists: expected a new folder")
    head, traces = HaltHead.load(config.head), read_traces(config.traces)
    traces = traces.select(traces.split == "train")
    if not len(traces):
        raise InputError(f"{config.traces} has no train questions, expected some to learn from")
    lm = LanguageModel.load(config.lm, config.device, RecordedChat.of(traces.recorder))
    check_recorded(head.config, traces.recorder, config.traces)
    _check_one_lm(head, str(traces.recorder.get("tokenizer", "")), lm)
    lesson = _Lesson(config, head, lm, traces)
    started = time.monotonic()
    told: dict[str, Any] = {"lm": config.lm, "head": head.digest, "price": lesson.price}
    told |= {"traces": str(config.traces)}
    told |= {"fine_tune": asdict(config.fine_tune), "grpo": asdict(config.grpo)}
    if config.fine_tune.epochs:
        told["fine_tune"] |= lesson.of_cut_thoughts()
    if config.grpo.steps:
        told["grpo"] |= lesson.of_own_answers()
    minutes = (time.monotonic() - started) / 60
    with whole_folder(config.out) as folder:
        save_lm(lm, folder)
        write_json(folder / "distilled.json", told | {"minutes": round(minutes, 1)})
    print(f"wrote {config.out} after {minutes:.1f} minutes")
    return config.out


class _Lesson:
    """What an LM is taught by a head and recorded traces of train questions.

    Args:
        config: The settings.
        head: The head.
        lm: The LM, which is trained in place.
        traces: What to learn from.

    Raises:
        InputError: If questions are to be held out, and none or all are.
    """

    def __init__(
        self, config: DistillConfig, head: HaltHead, lm: LanguageModel, traces: Traces
    ) -> None:
        """Holds out what tells when the LM has learned enough."""
        self._config, self._head, self._lm = config, head, lm
        self.price = head.config.default_price if config.price is None else config.price
        #: The token budget of a question, as it was recorded.
        self._most = int(traces.recorder.get("max_tokens") or traces.num_tokens.max())
        self._traces, kept_back = _without_held_out(traces, config)
        self._held_out = self._of(kept_back) if len(kept_back) else None

    def of_cut_thoughts(self) -> dict[str, Any]:
        """Trains the LM on its thoughts as the head cuts them, and returns what came of it."""
        config, traces = self._config, self._traces
        cut = cut_thoughts(config.traces, traces, self._head, self.price, self._lm)
        before = np.mean([one.num_tokens for one in cut])
        after = np.mean([len(one.completion) for one in cut])
        print(
            f"{len(cut)} of {len(traces)} thoughts are right where they end or are cut: "
            f"{before:.0f} tokens each, {after:.0f} once they are cut"
        )
        examples = [Example(one.prompt, one.completion) for one in cut]
        told = fine_tune(self._lm, examples, config.fine_tune, self._held_out)
        return {"thoughts": len(cut)} | told

    def of_own_answers(self) -> dict[str, Any]:
        """Trains the LM on what its own answers return, and returns what came of it."""
        config, asked = self._config, self._questions(self._traces)
        told = reinforce(
            self._lm,
            asked,
            self._judge.of_answer,
            self._most,
            config.grpo,
            config.fine_tune,
            self._held_out,
        )
        print(
            f"answers to {len(asked)} questions return {told['first_return']:.3f} in the first "
            f"tenth of {told['steps']} steps, {told['last_return']:.3f} in the last"
        )
        return told

    @cached_property
    def _judge(self) -> OwnReturn:
        return OwnReturn(self._lm, self._head.config.halting, self._most, self.price)

    def _of(self, traces: Traces) -> HeldOut:
        returns_of = partial(self._judge.of_lm, self._questions(traces))
        return HeldOut(returns_of, 1 + self.price * self._most / 1000, self._config.least_gain)

    def _questions(self, traces: Traces) -> list[Question]:
        rule = self._head.config.halting.answer_rule
        return recorded_questions(self._config.traces, traces, rule)


def _without_held_out(traces: Traces, config: DistillConfig) -> tuple[Traces, Traces]:
    """Returns traces to learn from, and those of the questions that are held out.

    Raises:
        InputError: If there is no question for one of both, where some are to be held out.
    """
    question = np.unique(traces.question_id)
    num = round(config.held_out * len(question))
    if config.held_out and not 0 < num < len(question):
        raise InputError(
            f"--held-out is {config.held_out} of {len(question)} questions, expected at least 1"
        )
    chosen = np.random.default_rng(config.fine_tune.seed).permutation(question)[:num]
    out = np.isin(traces.question_id, chosen)
    return traces.select(~out), traces.select(out)


def _check_one_lm(head: HaltHead, recorded: str, lm: LanguageModel) -> None:
    """Refuses a head or traces of another LM than the one that is to be trained.

    Raises:
        InputError: If their tokenizers differ.
    """
    for name, found in (("head", head.config.tokenizer), ("traces", recorded)):
        if found and found != lm.fingerprint:
            raise InputError(
                f"the {name} is of an LM with tokenizer {found}, {lm.name} has {lm.fingerprint}: "
                "expected those of one LM"
            )


if __name__ == "__main__":
    run(main, DistillConfig)
