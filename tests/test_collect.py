from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import alone
from haltwise import MEAN_LOGPROB, HaltHead, Halting, InputError
from haltwise.engine.decoder import Decoder
from haltwise.policy.answers import read_answer
from lms.embedded import prompt_of
from lms.language_model import LanguageModel
from lms.scorers import short as exact_match
from lms.sources import DataConfig, open_task
from lms.tasks import questions
from recording.collect import CollectConfig
from recording.collect import collect as main
from recording.config import EngineConfig, TaskFormat
from recording.hf_engine import HfEngine, record
from recording.shards import write_shards
from tests.recordings import assert_same, rows_of, save_tiny_lm, small_config
from tests.tiny_lm import EOS, IDS, PAD, tiny_lm, tiny_tokenizer
from traces import SIGNALS, read_traces

ROOT = Path(__file__).parent.parent
HALTING = Halting("always", "every 4 tokens", "</think>", MEAN_LOGPROB, 3)


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lms") / "tiny")


@pytest.fixture
def config(lm_folder: Path, tmp_path: Path) -> CollectConfig:
    return small_config(lm_folder, tmp_path / "traces")


def out_of(config: CollectConfig) -> Path:
    assert config.out
    return config.out


def test_traces_say_what_the_lm_did(config: CollectConfig) -> None:
    main(config)
    rows = rows_of(config.out)
    asked = {q.question_id: q for s in config.split for q in questions("all", s, 7)}
    assert rows.keys() == {f"tiny/{question_id}/0" for question_id in asked}
    assert len(list(out_of(config).glob("*.parquet"))) == 3
    lm, tokenizer = tiny_lm(seed=1), tiny_tokenizer()
    for row in rows.values():
        question = asked[row["question_id"]]
        assert (row["question"], row["split"]) == (question.text, question.split)
        tokens = tokenizer.encode(row["text"])
        assert len(tokens) == row["num_tokens"] <= 32
        assert row["finished"] == (tokens[-1] == EOS)
        assert row["final_correct"] == exact_match(row["final_answer"], question.gold)
        assert row["position"] == list(range(4, 4 * len(row["position"]) + 1, 4))
        for i, position in enumerate(row["position"]):
            text = f"{prompt_of(question)} {tokenizer.decode(tokens[:position])} </think>"
            ids = tokenizer(text, return_tensors="pt")
            forced = lm.generate(**ids, do_sample=False, max_new_tokens=3, pad_token_id=PAD)
            answer = forced[0, ids["input_ids"].shape[1] :]
            assert row["probe_tokens"][i] == len(answer)
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            assert row["answer"][i] == read_answer(text)
            assert row["correct"][i] == exact_match(row["answer"][i], question.gold)
            logprobs = row["answer_logprobs"][i]
            assert len(logprobs) == int((answer != EOS).sum())
            expected = np.exp(np.mean(logprobs)) if logprobs else 0
            assert row["confidence"][i] == pytest.approx(expected, abs=1e-6)
    recorder = read_traces(out_of(config)).recorder
    HALTING.check_recorded(recorder, "traces")
    assert (recorder["lm"], recorder["temperature"], recorder["close_tokens"]) == ("tiny", 0.8, 1)
    assert len(recorder["tokenizer"]) == 16


def test_a_trace_is_the_same_whatever_is_recorded_with_it(config: CollectConfig) -> None:
    main(replace(config, hidden=True))
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    decoder = Decoder(lm.model, lm.tokenizer, HALTING, 1, 32, 0.8, signals=SIGNALS)
    for row in record(lm, decoder, [(q, 0) for q in questions("all", "dev", 7)]):
        assert_same(rows_of(config.out)[row["trace_id"]], row)


def test_only_what_is_missing_is_recorded(config: CollectConfig) -> None:
    main(config)
    before = {path: path.stat().st_mtime_ns for path in out_of(config).glob("*.parquet")}
    main(config)
    main(replace(config, num_seeds=2, split=("dev",)))
    after = {path: path.stat().st_mtime_ns for path in out_of(config).glob("*.parquet")}
    assert before.items() <= after.items()
    assert len(rows_of(config.out)) == 14 + 7
    assert sum(row["seed"] for row in rows_of(config.out).values()) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"every": 8},
        {"max_tokens": 33},
        {"close_text": "so </think>"},
        {"hidden": True},
    ],
)
def test_a_folder_of_other_settings_is_refused(
    config: CollectConfig, change: dict[str, Any]
) -> None:
    main(config)
    with pytest.raises(InputError, match=r"traces was recorded with .* choose another --out"):
        main(replace(config, **change))


def command(config: CollectConfig) -> list[str]:
    """Records in another process."""
    names = ("out", "lm", "num", "every", "max_tokens", "max_answer_tokens", "shard_size")
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]
    return ["collect.py", *flags, f"--batch-size={config.batch_size}", "--split", *config.split]


def kill_when(arguments: list[str], is_time: Callable[[], bool]) -> None:
    """Starts Python and sends it SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 600  # a busy machine takes its time
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


# Runs collect.py, but hangs in the second shard that it writes, when half of it is in the file.
HANG = """
import runpy, sys, time
import pyarrow.parquet as pq
write, sizes = pq.write_table, []

def write_half(table, file, **options):
    write(table, file, **options)
    sizes.append(file.tell())
    if len(sizes) == 2:
        file.truncate(file.tell() // 2)
        file.flush()
        time.sleep(1200)

pq.write_table = write_half
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.whole
def test_a_recording_killed_at_any_moment_is_completed(
    config: CollectConfig, tmp_path: Path
) -> None:
    config = replace(config, num=60, batch_size=2, shard_size=4)

    def shards() -> list[Path]:
        return list(out_of(config).glob("*.parquet"))

    kill_when(command(config), lambda: len(shards()) >= 3)
    kept = rows_of(config.out)
    assert 12 <= len(kept) < 120
    num = len(shards())
    half = out_of(config) / f".{num + 1:05d}.parquet.part"
    kill_when(["-c", HANG, *command(config)], lambda: half.exists() and half.stat().st_size > 0)
    assert len(shards()) == num + 1
    (out_of(config) / ".99999.parquet.part").write_bytes(b"left over")
    main(replace(config, batch_size=64))
    assert not list(out_of(config).glob(".*"))
    rows = rows_of(config.out)
    assert all(rows[name] == row for name, row in kept.items())
    whole = replace(config, out=tmp_path / "whole", batch_size=16)
    main(whole)
    expected = rows_of(whole.out)
    assert rows.keys() == expected.keys() and len(rows) == 120
    for name, row in rows.items():
        assert_same(row, expected[name])
    assert len(read_traces(out_of(config))) == 120


def test_a_killed_recording_tells_how_much_is_left(
    config: CollectConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    main(replace(config, split=("train",)))
    capsys.readouterr()
    main(config)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "7/14 [00:00<?" in first
    assert "14/14" in last and "tokens/s" in last


def test_an_error_keeps_what_is_finished(config: CollectConfig) -> None:
    model = tiny_lm(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS["wait"]] = torch.nan  # no question has it
    lm = LanguageModel("tiny", model, tiny_tokenizer())
    decoder = Decoder(model, lm.tokenizer, HALTING, 1, 32, 0.8)
    asked = [(question, 0) for question in questions("all", "dev", 100)]
    with pytest.raises(InputError, match="LM gave NaN logits at position"):
        list(write_shards(out_of(config), record(lm, decoder, asked), {}, 1000))
    assert rows_of(config.out)


def test_two_recordings_cannot_share_a_folder(config: CollectConfig) -> None:
    assert config.out
    with alone(config.out):
        with pytest.raises(InputError, match="another process writes there, expected one"):
            main(config)
        assert not list(config.out.iterdir())
    main(config)
    assert len(rows_of(config.out)) == 14


def test_questions_that_are_too_long_are_left_out_each_time(
    config: CollectConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"question": "1 " * 3000, "answer": "1", "split": "dev"}
    other = {"question": "1", "answer": "1", "split": "test"}
    rows = [long | {"question": f"{n} {n + 1}"} for n in range(1, 8)]
    task = tmp_path / "own.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long, other]))
    config = replace(
        config, task=str(task), split=("dev",), split_column="split", num=8, instruction=""
    )
    for _ in range(2):
        main(config)
        told = capsys.readouterr().out
        assert re.search(
            "own-[0-9a-f]{16} has 3,00. tokens, expected at most 2,0..: left out", told
        )
        assert "traces: 1 of 8 are left out, too long for the LM" in told
        assert len(rows_of(config.out)) == 7
    task = tmp_path / "long.jsonl"
    task.write_text(json.dumps(long) + "\n" + json.dumps(other) + "\n")
    with pytest.raises(InputError, match="none of 1 questions has at most 2,0"):
        main(replace(config, task=str(task), out=tmp_path / "other"))


def test_splits_that_are_not_there_are_told_before_the_lm_is_loaded(
    config: CollectConfig, tmp_path: Path
) -> None:
    task = tmp_path / "own.jsonl"
    task.write_text('{"question": "1", "answer": "1"}\n')
    nowhere = replace(config, lm="no/where", task=str(task))
    with pytest.raises(InputError, match=r"no question of split dev, .*or --split with those"):
        main(nowhere)


@pytest.mark.parametrize("place", [{"self_test": True}, {"out": Path("traces")}])
def test_a_question_with_two_answers_is_refused_before_anything_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: dict[str, Any],
) -> None:
    """It is the only one of its split; another split has some that can be asked."""
    for split, rows in (("train", [("t", "1"), ("t", "2")]), ("test", [("b", "1"), ("c", "2")])):
        text = "".join(f"{question},{answer}\n" for question, answer in rows)
        (tmp_path / f"{split}.csv").write_text(f"question,answer\n{text}")
    monkeypatch.chdir(tmp_path)
    config = CollectConfig(task=str(tmp_path), split=("test", "train"), **place)
    with pytest.raises(InputError, match=r"train\.csv, .*: 't' has the answer '2', and '1' in"):
        main(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["embedded-head", "embedded-blind-head"])
def test_the_shipped_heads_have_learned_from_what_is_recorded_by_default(name: str) -> None:
    task = open_task(DataConfig())
    engine = HfEngine(EngineConfig(), TaskFormat(task.scorer, task.cue, task.answer_end, ""))
    config = HaltHead.load(ROOT / "checkpoints" / name).config
    assert config.recorded_otherwise(engine.recorder) == ""
    assert config.recording == {key: engine.recorder[key] for key in config.recording}
    assert len(config.recording) == 7


def test_a_self_test_writes_nothing_and_needs_no_folder(
    config: CollectConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    main(replace(config, self_test=True))
    main(replace(config, self_test=True, out=None))
    assert not out_of(config).exists()
    told = capsys.readouterr().out
    assert told.count("8 questions: thought begun 100%") == 2
    assert told.count("sampled:    at a temperature of 0.8; record as you serve") == 2
    with pytest.raises(InputError, match="expected --out, or --self-test"):
        main(replace(config, out=None))


def test_a_new_recording_begins_with_a_self_test_and_a_bad_lm_ends_there(
    config: CollectConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no thought comes to a decision point"):
        main(replace(config, every=32))
    assert not out_of(config).exists()
    main(config)
    first = capsys.readouterr().out
    assert "8 questions: thought begun 100%" in first and "This trial gave" not in first
    main(config)
    told = capsys.readouterr()
    assert "questions: " not in told.out and "traces" not in told.err
    assert f"{config.out}: all 14 traces are there, nothing is new" in told.out
    main(replace(config, max_tokens=257, out=out_of(config) / "longer"))
    assert "gave a question 256 tokens, the recording gives it 257" in capsys.readouterr().out


def test_traces_of_other_questions_in_a_folder_are_told(
    config: CollectConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    main(replace(config, split=("train",), num=2))
    assert "of other questions" not in capsys.readouterr().out
    main(replace(config, split=("dev",), num=3))
    assert f"{config.out}: 2 traces of other questions" in capsys.readouterr().out


def test_a_recording_knows_other_answers_and_segments_than_its_own(tmp_path: Path) -> None:
    """Who corrects an answer, or names a column of segments, is not told that all is well."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"sum : {n} + 3", "answer": str(n + 3), "topic": "easy"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = CollectConfig(
        task=str(path),
        scorer="number",
        instruction="",
        split=("train",),
        num=5,
        max_tokens=60,
        out=tmp_path / "out",
    )
    main(asked)
    with pytest.raises(InputError, match=r"another reference answer or segment than .* 'easy'"):
        main(replace(asked, segment_column="topic"))
    for row in rows:
        row["answer"] = "70"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="another reference answer or segment than '70' and ''"):
        main(asked)


def test_bad_settings_are_refused(
    config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, message in (
        ({"num": 0}, "--num is 0, expected at least 1"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"split": ()}, "no split"),
        ({"split": ("test", "test")}, "--split is test test, expected each split once"),
        ({"split": ("test", "valid")}, "--split is valid, expected some of train, dev, test"),
        ({"num_seeds": 2, "temperature": 0.0}, "--num-seeds is 2, but the LM is greedy"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 3_000_000_000}, "--seed is 3000000000, expected 0 to 2147483646"),
        ({"out": tmp_path / "file"}, "is a file"),
        ({"out": tmp_path / "file" / "in"}, "file is a file, expected a folder to record into"),
        ({"lm": "embeded"}, "cannot load an LM from 'embeded': expected 'embedded', a folder"),
        ({"max_tokens": 10**8}, "--max-tokens is 100,000,000, expected at most 2,0.*is 2,048 "),
        ({"max_tokens": 2048}, "--max-tokens is 2,048, expected at most 2,0"),
        ({"max_answer_tokens": 5000}, "is 2,048 tokens.*expected a smaller --max-answer-tokens"),
        ({"max_answer_tokens": 0}, "--max-answer-tokens is 0"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"tensor_parallel": 0}, "--tensor-parallel is 0"),
        ({"tensor_parallel": 2}, "expected 1, or --engine vllm"),
        ({"engine": "vllm", "hidden": True}, "vLLM shows no hidden states"),
        ({"workers": 2}, "--workers is 2, expected at least 1, and --ray"),
        ({"workers": 0, "ray": "local"}, "--workers is 0"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=message):
            main(replace(config, **change))
    missing: tuple[tuple[str, dict[str, Any]], ...] = (
        ("vllm", {"engine": "vllm"}),
        ("ray", {"ray": "local"}),
    )
    for package, change in missing:
        with monkeypatch.context() as patch, pytest.raises(InputError, match="is not installed"):
            patch.setitem(sys.modules, package, None)
            main(replace(config, **change))
    with pytest.raises(InputError, match="--every is 0, expected at least 1"):
        main(replace(config, every=0))
    with pytest.raises(InputError, match="cannot use device 'abacus'"):
        main(replace(config, device="abacus", task="no.jsonl"))  # before anything is read
    with pytest.raises(InputError, match="cannot load an LM from"):
        main(replace(config, lm="no/where"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(config.lm).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot load an LM from"):
        main(replace(config, lm=str(damaged)))
