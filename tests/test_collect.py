from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from collect import CollectConfig, main, record
from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.answers import read_answer
from haltwise.decoder import Decoder
from lms.embedded import prompt_of
from lms.language_model import LanguageModel
from lms.scorers import short as exact_match
from lms.tasks import questions
from tests.tiny_lm import EOS, IDS, PAD, tiny_lm, tiny_tokenizer
from traces import SIGNALS, read_traces

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lms") / "tiny"
    model = tiny_lm(seed=1)
    model.generation_config.update(do_sample=True, temperature=0.8)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(lm_folder: Path, tmp_path: Path) -> CollectConfig:
    return CollectConfig(
        out=tmp_path / "traces",
        lm=str(lm_folder),
        num=7,
        split=("train", "dev"),
        every=4,
        max_tokens=32,
        max_answer_tokens=3,
        batch_size=4,
        shard_size=5,
    )


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len({row["trace_id"] for row in rows}) == len(rows)
    return {row["trace_id"]: row for row in rows}


def test_traces_say_what_the_lm_did(config: CollectConfig) -> None:
    main(config)
    rows = rows_of(config.out)
    asked = {q.question_id: q for s in config.split for q in questions("all", s, 7)}
    assert rows.keys() == {f"tiny/{question_id}/0" for question_id in asked}
    assert len(list(config.out.glob("*.parquet"))) == 3
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
    recorder = read_traces(config.out).recorder
    halting = Halting("always", "every 4 tokens", "</think>", MEAN_LOGPROB, 3)
    halting.check_recorded(recorder, "traces")
    assert (recorder["lm"], recorder["temperature"], recorder["close_tokens"]) == ("tiny", 0.8, 1)
    assert len(recorder["tokenizer"]) == 16


def test_a_trace_is_the_same_whatever_is_recorded_with_it(config: CollectConfig) -> None:
    main(replace(config, hidden=True))
    halting = Halting("always", "every 4 tokens", "</think>", MEAN_LOGPROB, 3)
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    decoder = Decoder(lm.model, lm.tokenizer, halting, 1, 32, 0.8, signals=SIGNALS)
    for row in record(lm, decoder, [(q, 0) for q in questions("all", "dev", 7)]):
        assert_same(rows_of(config.out)[row["trace_id"]], row)


def assert_same(row: dict[str, Any], other: dict[str, Any]) -> None:
    floats = {"confidence", "answer_logprobs", *SIGNALS}
    assert row.keys() == other.keys()
    for name in row.keys() - floats:
        assert row[name] == other[name], name
    for name in row.keys() & floats:
        for values, expected in zip(row[name], other[name], strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-3 if name == "hidden" else 1e-5)


def test_only_what_is_missing_is_recorded(config: CollectConfig) -> None:
    main(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.glob("*.parquet")}
    main(config)
    main(replace(config, num_seeds=2, split=("dev",)))
    after = {path: path.stat().st_mtime_ns for path in config.out.glob("*.parquet")}
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
    main(replace(config, num=1))
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
    deadline = time.monotonic() + 60
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
        time.sleep(60)

pq.write_table = write_half
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_recording_killed_at_any_moment_is_completed(
    config: CollectConfig, tmp_path: Path
) -> None:
    config = replace(config, num=60, batch_size=2, shard_size=4)

    def shards() -> list[Path]:
        return list(config.out.glob("*.parquet"))

    kill_when(command(config), lambda: len(shards()) >= 3)
    kept = rows_of(config.out)
    assert 12 <= len(kept) < 120
    num = len(shards())
    half = config.out / f".{num + 1:05d}.parquet.part"
    kill_when(["-c", HANG, *command(config)], lambda: half.exists() and half.stat().st_size > 0)
    assert len(shards()) == num + 1
    (config.out / ".99999.parquet.part").write_bytes(b"left over")
    main(replace(config, batch_size=64))
    assert not list(config.out.glob(".*"))
    rows = rows_of(config.out)
    assert all(rows[name] == row for name, row in kept.items())
    whole = replace(config, out=tmp_path / "whole", batch_size=16)
    main(whole)
    expected = rows_of(whole.out)
    assert rows.keys() == expected.keys() and len(rows) == 120
    for name, row in rows.items():
        assert_same(row, expected[name])
    assert len(read_traces(config.out)) == 120


def test_a_killed_recording_tells_how_much_is_left(
    config: CollectConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    main(replace(config, split=("train",)))
    capsys.readouterr()
    main(config)
    first, *_, last = capsys.readouterr().err.strip().split("\r")
    assert "7/14 [00:00<?" in first
    assert "14/14" in last and "tokens/s" in last


def test_an_error_keeps_what_is_finished(config: CollectConfig) -> None:
    broken = config.out.parent / "tiny"
    model = tiny_lm(seed=1)
    model.generation_config.update(do_sample=True, temperature=0.8)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS["wait"]] = torch.nan  # no question has it
    model.save_pretrained(broken)
    tiny_tokenizer().save_pretrained(broken)
    with pytest.raises(InputError, match="LM gave NaN logits at position"):
        main(replace(config, lm=str(broken), num=100, batch_size=1, max_tokens=4))
    assert rows_of(config.out)


def test_bad_settings_are_refused(config: CollectConfig, tmp_path: Path) -> None:
    for change, message in (
        ({"num": 0}, "num is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"split": ()}, "no split"),
        ({"split": ("test", "test")}, "each split once"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 3_000_000_000}, "seed is 3000000000"),
        ({"out": tmp_path / "file"}, "is a file"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=message):
            main(replace(config, **change))
    with pytest.raises(InputError, match="every 0 tokens"):
        main(replace(config, every=0))
    with pytest.raises(InputError, match="cannot use device 'abacus'"):
        main(replace(config, device="abacus"))
    with pytest.raises(InputError, match="cannot load an LM from"):
        main(replace(config, lm=str(tmp_path / "nowhere")))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(config.lm).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot load an LM from"):
        main(replace(config, lm=str(damaged)))
