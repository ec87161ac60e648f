"""A whole recording: tried on a few questions first, and gone on with where it was killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from command import alone, progress, warn
from haltwise import Halting, InputError
from haltwise.errors import check_ranges
from lms.ask import questions
from lms.language_model import check_device
from lms.questions import SPLITS
from lms.scorers import needed, scorer_of
from lms.sources import NoQuestionError
from recording.config import EngineConfig, TaskFormat
from recording.engine import RecordingEngine, open_engine
from recording.shards import recorded_ids, told_of, write_shards
from recording.trace_row import SeededQuestion, trace_id
from traces import TraceFiles, import_json_lines, read_ids
from traces.claims import broken_claims
from traces.soundness import two_verdicts

# The number of questions that the LM is tried with.
_NUM_TRIED = 8


@dataclass(frozen=True, kw_only=True)
class CollectConfig(EngineConfig):
    """Record traces: an LM answers questions, with a forced answer at every decision point."""

    out: Path | None = None
    """The folder for the traces; a recording that is there already is completed."""
    self_test: bool = False
    """Only try on a few questions whether halting this LM can work, and write nothing. A new
    recording begins with a short trial anyway."""
    json_lines: Path | None = None
    """A file, or a folder of *.jsonl files, to take the traces from instead of recording them, one
    JSON object a line. Of the other settings only --out and --shard-size count then, and the folder
    must be new or empty."""
    num: int = 1000
    """The largest number of questions of each split."""
    split: tuple[str, ...] = ("train", "dev", "test")
    """The splits to record."""
    seed: int = 0
    """The seed of the draw of questions, and of the first answer to each."""
    num_seeds: int = 1
    """The number of answers to each question."""
    shard_size: int = 256
    """The number of traces in a file, and in a worker's job; a kill loses no more than that."""
    ray: str | None = None
    """Spread the work over many workers by Ray: local starts Ray on this machine, auto or HOST:PORT
    joins a cluster."""
    workers: int | None = None
    """The number of workers, each with an LM of its own. Default: one for every GPU, or one for
    every CPU with --device cpu."""

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If a count is below 1, a seed is negative or too large, a split is unknown
                or named twice or none is named, the folder is a file or missing, a number makes no
                sense, or the engine cannot do what is asked.
        """
        super().check()
        most = 2**31 - 1 - self.num_seeds
        check_ranges(self, {"seed": (0 <= self.seed <= most, f"0 to {most}")})
        if len(set(self.split)) < len(self.split):
            raise InputError(f"--split is {' '.join(self.split)}, expected each split once")
        if unknown := set(self.split) - set(SPLITS):
            found = ", ".join(sorted(unknown))
            raise InputError(f"--split is {found}, expected some of {', '.join(SPLITS)}")
        counts = ("num", "num_seeds", "shard_size")
        check_ranges(self, {name: (getattr(self, name) >= 1, "at least 1") for name in counts})
        if self.ray is not None and self.engine == "openai":
            raise InputError("a server runs the LM itself: expected no --ray with --engine openai")
        if not self.split:
            raise InputError("no split to record: expected one of train, dev, test or more")
        self._check_place()
        if self.engine == "hf" and not (self.ray or self.json_lines):  # workers have their own
            check_device(self.device)

    def _check_place(self) -> None:
        if self.out is None and (self.json_lines or not self.self_test):
            raise InputError("no folder to record into: expected --out, or --self-test")
        if self.out:
            there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
            if not there.is_dir():
                raise InputError(f"{there} is a file, expected a folder to record into")
        if self.workers is not None and not (self.ray and self.workers >= 1):
            raise InputError(f"--workers is {self.workers}, expected at least 1, and --ray")


def seeded_questions(config: CollectConfig) -> Iterator[SeededQuestion]:
    """Yields all questions that are to be recorded, each with its sampling seeds, in order.

    Raises:
        InputError: If the questions cannot be read or asked.
    """
    for question in questions(config, config.split, config.num, config.seed):
        for seed in range(config.seed, config.seed + config.num_seeds):
            yield question, seed


def collect(config: CollectConfig) -> None:
    """Records what is not yet in the folder, or imports a file.

    Raises:
        InputError: If the LM, the questions, the file or the folder cannot be used.
    """
    config.check()
    if config.out and config.json_lines:
        num_traces = import_json_lines(config.json_lines, config.out, config.shard_size, scorer_of)
        print(f"{config.out}: {num_traces:,} traces")
        _, recorder = read_ids(config.out)
        if why_not := Halting.of_recorder(recorder).why_not_run():
            warn(f"{why_not} (docs/TRACES.md says what the first line may tell)")
        for told in broken_claims(TraceFiles.open(config.out), scorer_of):
            warn(told)
        _warn_of_scorer(config.out)
        return
    # What cannot be asked is refused before anything is told or loaded.
    if config.self_test:
        tried = _tried(config)
        with closing(_open(config)) as engine:
            print(engine.self_test(tried, None))
            print(_sampled(engine))
    elif config.out:
        for _ in questions(config, config.split, config.num, config.seed):
            pass
        with closing(_open(config)) as engine:
            _begin(config, config.out, engine)
            with alone(config.out):
                _record(config, config.out, engine)
        _warn_of_scorer(config.out)


def _warn_of_scorer(folder: Path) -> None:
    """Warns if equal answers have two verdicts in a recording."""
    if told := two_verdicts(TraceFiles.open(folder)):
        warn(told)


def _open(config: CollectConfig) -> RecordingEngine:
    """Opens the engine, or many of them by Ray.

    Raises:
        InputError: If the task or the LM cannot be used, or Ray is missing.
    """
    task = config.open()
    print(task.describe())
    task_format = TaskFormat(task.scorer, task.cue, task.answer_end, task.instruction)
    settings = {field.name: getattr(config, field.name) for field in fields(EngineConfig)}
    if (
        config.engine != "openai" and not config.is_embedded and Path(config.lm).exists()
    ):  # workers have other working folders
        settings["lm"] = str(Path(config.lm).resolve())
    if config.examples:
        settings["examples"] = config.examples.resolve()
    engine_config = EngineConfig(**settings)
    if config.ray is None:
        return open_engine(engine_config, task_format)
    if find_spec("ray") is None:
        raise InputError(needed("Ray", "ray"))
    from recording.spread import RayEngine

    return RayEngine(engine_config, task_format, config.ray, config.workers, config.shard_size)


def _tried(config: CollectConfig) -> list[SeededQuestion]:
    """Returns the first few questions of those splits that have any.

    Raises:
        InputError: If no split has any, or one that would be recorded cannot be asked.
    """
    found: list[SeededQuestion] = []
    for split in config.split:
        with suppress(NoQuestionError):
            each = seeded_questions(replace(config, split=(split,)))
            found += islice(each, _NUM_TRIED - len(found))
    return found or list(seeded_questions(config))


def _begin(config: CollectConfig, out: Path, engine: RecordingEngine) -> None:
    """Finds out whether a recording can work, and tries a few questions before a new one.

    Raises:
        InputError: If it cannot work, or the folder was recorded under other settings.
    """
    if config.num_seeds > 1 and engine.recorder["temperature"] == 0:
        raise InputError(
            f"--num-seeds is {config.num_seeds}, but the LM is greedy: expected --temperature "
            "above 0, or one seed"
        )
    if recorded_ids(out, engine.recorder):
        print(engine.description)
        return
    budget, whole = config.trial_budget(), engine.recorder["max_tokens"]
    print(engine.self_test(_tried(config), budget))
    print(_sampled(engine))
    if budget < whole:
        print(
            f"This trial gave a question {budget:,} tokens, the recording gives it {whole:,}, as "
            "--self-test does: more thoughts end by themselves then"
        )


def _sampled(engine: RecordingEngine) -> str:
    """Says how tokens are sampled, for a person who has to serve alike."""
    temperature = engine.recorder["temperature"]
    how = f"at a temperature of {temperature:g}" if temperature else "greedily, at temperature 0"
    return f"sampled:    {how}; record as you serve"


def _is_done(out: Path, done: Mapping[str, int], model: str, job: SeededQuestion) -> bool:
    """Returns whether a folder has the trace of a question and a seed.

    Args:
        out: The folder.
        done: What it has, see `recorded_ids`.
        model: The LM's name.
        job: The question and the seed.

    Raises:
        InputError: If the question has another reference answer or segment there.
    """
    question, name = job[0], trace_id(model, *job)
    if name in done and done[name] != told_of(question.gold, question.segment):
        raise InputError(
            f"{out} has {question.question_id} with another reference answer or segment than "
            f"{question.gold!r:.40} and {question.segment!r:.30}: choose another --out, or delete "
            "it"
        )
    return name in done


def _record(config: CollectConfig, out: Path, engine: RecordingEngine) -> None:
    """Records the traces that the folder lacks."""
    done = recorded_ids(out, engine.recorder)
    model = engine.recorder["lm"]
    is_done = (_is_done(out, done, model, job) for job in seeded_questions(config))
    num_done, total = 0, 0
    for each in is_done:
        num_done, total = num_done + each, total + 1
    if num_done == total:
        print(f"{out}: all {total:,} traces are there, nothing is new")
        return
    if others := len(done) - num_done:
        print(f"{out}: {others:,} traces of other questions, or of other seeds, are there and stay")
    missing = (job for job in seeded_questions(config) if trace_id(model, *job) not in done)
    rows = write_shards(out, engine.record(missing), engine.recorder, config.shard_size)
    # The time left follows from the mean speed of this process.
    with progress(rows, out.name, total, initial=num_done, unit="trace", smoothing=0) as bar:
        tokens = 0
        for row in bar:
            tokens += row["num_tokens"] + sum(row["probe_tokens"])
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            num_done += 1
    if num_done < total:
        print(f"{out}: {total - num_done:,} of {total:,} are left out, too long for the LM")
