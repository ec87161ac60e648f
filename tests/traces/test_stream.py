"""More traces than memory holds: samples, chunks, and a training that sees them all."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import evaluate
import traces.store
import traces.stream
import train
from agents.fit import FitConfig, _light_processes, fit
from agents.network import LogOdds
from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import PPOConfig, export
from benchmarks import memory
from envs.replay import ReplayEnv
from evaluate import EvaluateConfig
from evaluation.results import Report
from haltwise import HaltHead, HeadConfig, InputError
from haltwise.policy.halting import Halting
from policies.observing import observing_of
from traces import TraceFiles, Traces, Words, read_traces, write_shard
from train import TrainConfig

MakeRow = Callable[..., dict[str, Any]]
SMALL = FitConfig(
    PathwiseConfig(steps=20, batch_size=32),
    PPOConfig(total_timesteps=1024, num_envs=16, n_steps=16, batch_size=64, net_width=8),
)
HALTING = Halting("always", "every 50 tokens", "</think>", "source")


@pytest.fixture
def folder(random_traces_path: Path, tmp_path: Path) -> Path:
    """60 traces of 20 questions, 3 a question, in row groups of 13, and of 20, 20 and 7."""
    table = pq.read_table(random_traces_path)
    (tmp_path / "all").mkdir()
    pq.write_table(table.slice(0, 13), tmp_path / "all" / "a.parquet")
    pq.write_table(table.slice(13), tmp_path / "all" / "b.parquet", row_group_size=20)
    return tmp_path / "all"


def test_a_sample_is_of_whole_questions_and_the_same_for_every_layout(
    folder: Path, random_traces_path: Path, tmp_path: Path
) -> None:
    table = pq.read_table(random_traces_path)
    pq.write_table(table.take(np.arange(60)[::-1]), tmp_path / "turned.parquet")
    files, turned = TraceFiles.open(folder), TraceFiles.open(tmp_path / "turned.parquet")
    before: set[str] = set()
    for most in (3, 10, 30, 59):
        sample = files.read(files.sample(files.rows(), most))
        again = turned.read(turned.sample(turned.rows(), most))
        assert len(sample) == most // 3 * 3
        assert len(np.unique(sample.question_id)) == most // 3
        assert sample.digest == again.digest
        assert before < set(sample.question_id.tolist())
        before = set(sample.question_id.tolist())
    assert files.sample(files.rows(), 60).all()
    assert files.sample(files.rows(), 1).sum() == 3  # one question, however many traces it has


def test_a_sample_is_of_the_splits_that_are_asked_for(folder: Path) -> None:
    files = TraceFiles.open(folder)
    rows = files.rows("train", "dev")
    sample = files.read(files.sample(rows, 12))
    assert len(sample) == 12 and set(sample.split) == {"train", "dev"}
    assert files.read(files.rows("test")).digest == read_traces(folder).of_split("test").digest
    with pytest.raises(InputError, match="no trace has split 'other': found 'dev', 'test', 'tra"):
        files.rows("other")


@pytest.mark.parametrize("most", [7, 13, 59, 60, 1000])
def test_a_pass_of_chunks_sees_every_trace_once_and_never_more_than_its_size(
    folder: Path, most: int
) -> None:
    files = TraceFiles.open(folder)
    rows = files.rows("train", "test")
    chunks = files.chunks(rows, most, seed=0)
    passed = list(chunks)
    assert len(passed) == len(chunks) == -(-int(rows.sum()) // most)
    sizes = [len(chunk) for chunk in passed]
    assert max(sizes) <= most and all(size == sizes[0] for size in sizes[:-1])
    expected = read_traces(folder).of_split("train", "test")
    found = [trace for chunk in passed for trace in chunk.trace_id.tolist()]
    assert sorted(found) == sorted(expected.trace_id.tolist())
    total = np.concatenate([chunk.fingerprint for chunk in passed])
    assert {bytes(row) for row in total} == {bytes(row) for row in expected.fingerprint}
    assert [c.digest for c in chunks] == [c.digest for c in passed]


def test_the_seed_orders_the_row_groups(folder: Path) -> None:
    files = TraceFiles.open(folder)
    orders = {
        tuple(trace for chunk in files.chunks(files.rows(), 13, seed) for trace in chunk.trace_id)
        for seed in range(5)
    }
    assert len(orders) > 1


def test_files_are_decoded_a_piece_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_traces(folder)
    monkeypatch.setattr(traces.store, "_PIECE", 6)
    files = TraceFiles.open(folder)
    sizes = [len(part) for part, _ in files.parts(files.rows())]
    assert sizes == [6, 6, 1, 6, 6, 6, 2, 6, 6, 6, 2, 6, 1]
    read = files.read(files.rows())
    for name, values in vars(whole).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(read, name), values)
    assert all((read.signals[name] == whole.signals[name]).all() for name in whole.signals)
    assert files.digest(files.rows()) == whole.digest


def test_digests_add_up(folder: Path) -> None:
    whole = read_traces(folder)
    parts = [whole.of_split(name) for name in ("train", "dev", "test")]
    totals = [np.frombuffer(bytes.fromhex(part.digest), "<u8") for part in parts]
    assert sum(totals[1:], totals[0]).tobytes().hex() == whole.digest
    assert len({traces.digest for traces in (whole, *parts)}) == 4


def test_ids_are_known_without_the_traces(folder: Path) -> None:
    files, whole = TraceFiles.open(folder), read_traces(folder)
    assert files.question_ids(files.rows("dev")) == set(whole.of_split("dev").question_id)
    (at,) = np.flatnonzero(files.rows_of_trace("t21"))
    assert whole.trace_id[at] == "t21"
    assert not files.rows_of_trace("t60").any()
    rows = files.rows_of_questions(["q3", "q5", "other"])
    assert set(whole.question_id[rows]) == {"q3", "q5"} and rows.sum() == 6


def test_what_is_wrong_in_a_later_piece_is_told_with_its_place(
    tmp_path: Path, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row(trace_id=f"t{n}") for n in range(10)]
    path = tmp_path / "x.parquet"
    write_shard(path, rows, {})
    table = pq.read_table(path)
    gold = table["gold"].to_pylist()
    gold[8] = ""
    at = table.schema.get_field_index("gold")
    pq.write_table(table.set_column(at, table.schema.field(at), [gold]), path)
    monkeypatch.setattr(traces.store, "_PIECE", 6)
    files = TraceFiles.open(path)
    for use in (files.digest, files.read, lambda rows: list(files.chunks(rows, 3, 0))):
        with pytest.raises(InputError, match=r"counting rows from 6: column 'gold', row 2: found"):
            use(files.rows())


def test_files_that_do_not_go_together_are_refused(tmp_path: Path, make_row: MakeRow) -> None:
    points: dict[str, Any] = {"position": [], "probe_tokens": [], "answer": [], "correct": []}
    points |= {"confidence": [], "answer_logprobs": []}
    # A first file without points does not tell the size of hidden states.
    write_shard(tmp_path / "a.parquet", [make_row(trace_id="a", hidden=[], **points)], {})
    write_shard(tmp_path / "b.parquet", [make_row(trace_id="b", hidden=[[1.0, 2.0]] * 3)], {})
    write_shard(tmp_path / "c.parquet", [make_row(trace_id="c", hidden=[[1.0]] * 3)], {})
    files = TraceFiles.open(tmp_path)
    with pytest.raises(InputError, match=r"c\.parquet: .*vectors of 1, expected 2 as in b\.parq"):
        files.digest(files.rows())
    write_shard(tmp_path / "c.parquet", [make_row(trace_id="c")], {})
    files = TraceFiles.open(tmp_path)
    with pytest.raises(InputError, match=r"c\.parquet: column hidden is there or in"):
        files.digest(files.rows())
    write_shard(tmp_path / "c.parquet", [make_row(trace_id="a", hidden=[[1.0] * 2] * 3)], {})
    with pytest.raises(InputError, match=r"c\.parquet: trace_id 'a' is in .*a\.parquet too"):
        TraceFiles.open(tmp_path)
    write_shard(tmp_path / "c.parquet", [make_row(trace_id="c")], {"LM": "y"})
    with pytest.raises(InputError, match=r"c\.parquet: .*differs from a\.parquet's in LM"):
        TraceFiles.open(tmp_path)


def test_two_ids_that_share_a_key_are_no_duplicates(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces.stream, "_keys", lambda ids: np.zeros(len(ids), dtype=np.uint64))
    assert len(TraceFiles.open(folder).trace) == 60


def head_of(traces: Traces) -> HeadConfig:
    observing = observing_of(traces, ("confidence", "agreement"), HALTING)
    return HeadConfig(observing, HALTING, observing.price_range[0])


def test_one_chunk_is_learned_from_as_traces_in_memory(folder: Path) -> None:
    files = TraceFiles.open(folder)
    whole = read_traces(folder)
    config = head_of(whole)
    in_one = files.chunks(files.rows(), 60, seed=0)
    (chunk,) = in_one
    first, second = (export(fit(t, config, SMALL, seed=0), config) for t in (in_one, chunk))
    assert all((first.weights[name] == second.weights[name]).all() for name in first.weights)


def test_ppo_comes_to_every_chunk_at_its_share_of_the_schedule(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TraceFiles.open(folder)
    chunks = files.chunks(files.rows(), 15, seed=0)
    loaded: list[list[str]] = []
    load = ReplayEnv.load

    def spy(env: ReplayEnv, traces: Traces) -> None:
        loaded.append(traces.trace_id.tolist())
        load(env, traces)

    monkeypatch.setattr(ReplayEnv, "load", spy)
    config = head_of(read_traces(folder))
    fit(chunks, config, replace(SMALL, pathwise=PathwiseConfig(steps=0)), seed=0)
    assert loaded == [chunk.trace_id.tolist() for chunk in chunks]


def test_the_exact_gradient_goes_through_every_chunk(folder: Path) -> None:
    whole = read_traces(folder)
    config = head_of(whole)
    seen: list[Traces] = []

    class Watched(list[Traces]):
        def __iter__(self) -> Any:
            for chunk in super().__iter__():
                seen.append(chunk)
                yield chunk

    chunks = Watched([whole.of_split(name) for name in ("train", "dev", "test")])
    size, linear = config.observing.size, torch.nn.Linear
    net = LogOdds(linear(size, 4), linear(4, 4), linear(4, 1), linear(size, 1, bias=False))
    before = [weight.clone() for weight in net.parameters()]
    start_from_traces(net, chunks, config.observing, HALTING, PathwiseConfig(2, 8), seed=0)
    assert seen == list(chunks[:])  # fewer steps than chunks: one each
    assert any((a != b).any() for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.isfinite(weight).all() for weight in net.parameters())


def test_words_are_read_of_the_traces_that_are_asked_for(
    tmp_path: Path, make_row: Callable[..., dict[str, Any]]
) -> None:
    rows = [make_row(trace_id=f"t{n}", question=f"What is {n}?", text="a b c d") for n in range(5)]
    write_shard(tmp_path / "0.parquet", rows[:3], {})
    write_shard(tmp_path / "1.parquet", rows[3:], {})
    found = TraceFiles.open(tmp_path).words(["t1", "t4"])
    assert found == {f"t{n}": Words("7", "7", f"What is {n}?", "a b c d") for n in (1, 4)}
    assert found["t1"].thought_before(0.75) == "a b c"
    assert found["t1"].thought_before(1.0, length=4) == "d"
    write_shard(tmp_path / "0.parquet", [make_row()], {})  # without a question and a text
    assert TraceFiles.open(tmp_path).words(["q0-0", "t4"])["q0-0"] == Words("7", "7")


@pytest.mark.whole
def test_more_traces_than_may_be_in_memory_train_end_to_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        traces=folder, run_dir=tmp_path / "run", folds=2, seeds=1, max_traces=15, fit=SMALL
    )
    run_dir = train.main(config)
    files = TraceFiles.open(folder)
    rows = files.rows("train", "dev")
    assert HaltHead.load(run_dir).config.traces == files.digest(rows)
    learned = json.loads((run_dir / "questions.json").read_text())
    assert set(learned["questions"]) == files.question_ids(rows)
    kept_back = [k for k in learned["folds"]["0"] if k is not None]
    assert len(kept_back) == 5 and set(kept_back) == {0, 1}
    assert not (run_dir / "folds" / "traces.pickle").exists()
    printed = capsys.readouterr().out
    assert "27 traces are not in the sample" in printed
    report = json.loads((run_dir / "test.json").read_text())
    assert report["judged"].startswith("A sample of 15 of the 18 traces") and report["evidence"]
    assert "have changed" not in printed
    again = evaluate.main(EvaluateConfig(head=run_dir, split="all", max_traces=60))
    assert isinstance(again, Report) and again.traces.num == 60 and not again.evidence


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells it")
def test_the_peak_of_a_command_counts_what_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, was_seen = memory._tree_memory, tmp_path / "was seen"

    def noticed(pid: int) -> int:
        found = look(pid)
        if found > 100e6:
            was_seen.touch()
        return found

    # The ballast is there until somebody has looked at it.
    monkeypatch.setattr(memory, "_tree_memory", noticed)
    ballast = (
        "import os, time; kept = bytearray(10 ** 8); kept[::4096] = b'x' * 24415\n"
        f"while not os.path.exists({str(was_seen)!r}): time.sleep(0.01)"
    )
    starting = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ballast!r}])"
    assert 100 < memory.tree_peak([sys.executable, "-c", starting]) < 200
    with pytest.raises(subprocess.CalledProcessError):
        memory.tree_peak([sys.executable, "-c", "raise SystemExit(3)"])


def test_processes_of_folds_start_without_the_script_and_it_comes_back() -> None:
    script = sys.modules["__main__"]
    with pytest.raises(KeyError), _light_processes():
        assert not hasattr(sys.modules["__main__"], "__file__")
        raise KeyError
    assert sys.modules["__main__"] is script


def test_a_chunk_without_decision_points_teaches_nothing_and_harms_nothing(
    make_row: MakeRow, tmp_path: Path
) -> None:
    points = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    rows = [make_row(trace_id=f"t{i}", question_id=f"q{i}") for i in range(12)]
    for row in rows[4:8]:
        row.update({name: [] for name in points})
    for k in range(3):
        write_shard(tmp_path / f"{k}.parquet", rows[4 * k : 4 * k + 4], {})
    files = TraceFiles.open(tmp_path)
    chunks = files.chunks(files.rows(), 4, seed=0)
    assert sorted(len(chunk) for chunk in chunks) == [4, 4]
    assert all(chunk.num_points for chunk in chunks)
    alone = files.chunks(files.rows(), 1, seed=0)
    taught = [f"t{i}" for i in range(12) if not 4 <= i < 8]
    assert sorted(str(chunk.trace_id[0]) for chunk in alone) == sorted(taught)


def test_at_least_one_trace_must_fit(folder: Path) -> None:
    files = TraceFiles.open(folder)
    with pytest.raises(InputError, match="--max-traces is 0, expected at least 1"):
        files.sample(files.rows(), 0)
