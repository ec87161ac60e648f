"""Records traces: an LM answers questions, with a forced answer at every decision point.

    python collect.py --task all --num 1000 --out checkpoints/traces
    python collect.py --json-lines FILE --out checkpoints/traces

A killed recording goes on where it stopped: run the same command again.

The second form takes traces that somebody else has recorded: one JSON object a line, by column
name of the trace schema, the same columns in every line. A first line {"haltwise.recorder": {...}}
may tell how they were recorded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from command import run
from haltwise import InputError, Signals
from haltwise.decoder import Decoder, Generation
from haltwise.thought import Probe, ThoughtRules
from lms.ask import AskConfig, questions
from lms.language_model import LanguageModel
from lms.questions import Question
from traces import SIGNALS, import_json_lines, read_ids, write_shard

Row = dict[str, Any]
Work = tuple[Question, int]


@dataclass(frozen=True, kw_only=True)
class CollectConfig(AskConfig):
    """What to record."""

    out: Path
    """Folder for the traces; a recording that is there already is completed."""
    json_lines: Path | None = None
    """Take the traces from this file, one JSON object a line, and record none. Of the other
    settings only --out and --shard-size count then; the folder must be new or empty."""
    num: int = 1000
    """Questions of each split, at most."""
    split: tuple[str, ...] = ("train", "dev", "test")
    """Splits to record."""
    seed: int = 0
    """Of the questions, and of the first answer to each."""
    num_seeds: int = 1
    """Answers to each question."""
    batch_size: int = 64
    """Questions at once."""
    shard_size: int = 256
    """Traces in a file; so many at most are lost by a kill."""
    hidden: bool = False
    """Record last-layer states too: two bytes times the LM's width at every decision point."""

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If a count is below 1, a seed negative or too large, a split not named or
                named twice, or the folder is a file.
        """
        if not 0 <= self.seed <= 2**31 - 1 - self.num_seeds:
            raise InputError(f"seed is {self.seed}, expected 0 or more, and with num_seeds int32")
        if len(set(self.split)) < len(self.split):
            raise InputError(f"split is {self.split}, expected each split once")
        if self.out.is_file():
            raise InputError(f"{self.out} is a file, expected a folder to record into")
        for name in ("num", "num_seeds", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.split:
            raise InputError("no split to record: expected one of train, dev, test or more")


@dataclass
class Recording:
    """A trace that is being recorded in one slot."""

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

    def row(self, model: str, rules: ThoughtRules, generation: Generation) -> Row:
        """The finished trace, by column name."""
        question, thought = self.question, generation.thought
        probes = self.probes
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
            "num_tokens": generation.num_tokens,
            "finished": generation.finished,
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


def trace_id(model: str, question: Question, seed: int) -> str:
    """Names the trace of a question answered once by an LM."""
    return f"{model}/{question.question_id}/{seed}"


def record(lm: LanguageModel, decoder: Decoder, work: Iterable[Work]) -> Iterator[Row]:
    """Answers questions in refilled slots and yields each trace as it ends.

    Args:
        lm: The LM.
        decoder: What runs it; all of its slots are used. What it measures is recorded.
        work: Questions with sampling seeds.
    """
    waiting = iter(work)
    running: dict[int, Recording] = {}
    while True:
        free = [slot for slot in range(decoder.num_slots) if slot not in running]
        fresh = {
            slot: Recording(*job, signals={name: [] for name in decoder.measured})
            for slot, job in zip(free, waiting, strict=False)
        }
        decoder.start(
            np.array(list(fresh), dtype=np.int64),
            [lm.prompt(recording.question.text) for recording in fresh.values()],
            [recording.seed for recording in fresh.values()],
        )
        running |= fresh
        if not running:
            return
        slots = np.array(list(running))
        at_point = decoder.advance(slots)
        here = slots[at_point]
        probes = decoder.force(here)
        signals = decoder.signals(here, probes)
        for i, (slot, probe) in enumerate(zip(here.tolist(), probes, strict=True)):
            running[slot].see(probe, signals, i)
        for slot in slots[~at_point].tolist():
            generation = decoder.generations[slot]
            if generation.ended:
                yield running.pop(slot).row(lm.name, decoder.rules, generation)


def recorder_of(lm: LanguageModel, decoder: Decoder) -> dict[str, Any]:
    """What is kept beside the traces: all that decides what a question and a seed give."""
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    halting = decoder.halting
    return {
        "lm": lm.name,
        "revision": lm.revision,
        "tokenizer": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "temperature": decoder.temperature,
        "max_tokens": decoder.max_tokens,
        "probing": halting.probing,
        "decision_rule": halting.decision_rule,
        "close_text": halting.close_text,
        "close_tokens": len(decoder.rules.close_ids),
        "max_answer_tokens": halting.max_answer_tokens,
        "answer_rule": halting.answer_rule,
        "answer_end": halting.answer_end,
        "think_start": halting.think_start,
        "think_end": halting.think_end,
        "confidence_rule": halting.confidence_rule,
        "signals": list(decoder.measured),
        "code_version": project["version"],
    }


def recorded(out: Path, recorder: dict[str, Any]) -> set[str]:
    """The trace ids that a folder holds already.

    Raises:
        InputError: If it was recorded under other settings.
    """
    if not any(out.glob("*.parquet")):
        return set()
    ids, known = read_ids(out)
    for name, expected in recorder.items():
        if name == "code_version":  # another version of haltwise records the same
            continue
        found = known.get(name)
        if found != expected:
            raise InputError(
                f"{out} was recorded with {name} {found!r}, not {expected!r}: "
                "choose another --out, or delete it"
            )
    return ids


def write_shards(
    out: Path, rows: Iterable[Row], recorder: dict[str, Any], shard_size: int
) -> Iterator[Row]:
    """Writes traces to numbered files as they come, and passes them on."""
    for leftover in out.glob(".*.part"):  # of a killed recording
        leftover.unlink()
    pending: list[Row] = []
    number = 1 + max((int(path.stem) for path in out.glob("[0-9]*.parquet")), default=-1)
    try:
        for row in rows:
            pending.append(row)
            if len(pending) == shard_size:
                write_shard(out / f"{number:05d}.parquet", pending, recorder)
                number, pending = number + 1, []
            yield row
    finally:  # an interrupt loses nothing either
        if pending:
            write_shard(out / f"{number:05d}.parquet", pending, recorder)


def work(config: CollectConfig) -> Iterator[Work]:
    """All that is to be recorded, in order."""
    for question in questions(config, config.split, config.num, config.seed):
        for seed in range(config.seed, config.seed + config.num_seeds):
            yield question, seed


def main(config: CollectConfig) -> None:
    """Records what is not yet in the folder, or imports a file.

    Raises:
        InputError: If the LM, the questions, the file or the folder cannot be used.
    """
    config.check()
    if config.json_lines:
        num_traces = import_json_lines(config.json_lines, config.out, config.shard_size)
        print(f"{config.out}: {num_traces:,} traces")
        return
    lm = LanguageModel.load(config.lm, config.device, config)
    halting = config.halting(lm.chat, config.open())
    temperature = lm.temperature if config.temperature is None else config.temperature
    decoder = Decoder(
        lm.model,
        lm.tokenizer,
        halting,
        config.batch_size,
        config.budget(),
        temperature,
        signals=[name for name in SIGNALS if name != "hidden" or config.hidden],
    )
    recorder = recorder_of(lm, decoder)
    done = recorded(config.out, recorder)
    num_done = sum(trace_id(lm.name, *job) in done for job in work(config))
    missing = (job for job in work(config) if trace_id(lm.name, *job) not in done)
    rows = write_shards(config.out, record(lm, decoder, missing), recorder, config.shard_size)
    total = len(config.split) * config.num * config.num_seeds
    # The time left follows from the mean speed of this process.
    with tqdm(rows, config.out.name, total, initial=num_done, unit="trace", smoothing=0) as bar:
        tokens = 0
        for row in bar:
            tokens += row["num_tokens"] + sum(row["probe_tokens"])
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)


if __name__ == "__main__":
    run(main, CollectConfig)
