import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from haltwise import InputError
from traces import SCHEMA, Traces, read_ids, read_traces, write_shard
from traces.schema import POINTWISE, REQUIRED, SIGNALS

Row = dict[str, Any]
MakeRow = Callable[..., Row]
MakeTraces = Callable[..., Traces]

NO_POINTS: Row = {name: [] for name in POINTWISE if name in REQUIRED}


def numbers_of(name: str, *values: float) -> list[float]:
    """Values that a signal can have: log probabilities are negative, margins at most 1."""
    return [-value if "logprob" in name else value / 4 for value in values]


SIGNAL_ROW: Row = {name: numbers_of(name, 0.5, np.nan, 2.0) for name in SIGNALS if name != "hidden"}


def write_raw(path: Path, row: Row, schema: pa.Schema = SCHEMA, version: str | None = "1") -> None:
    """One row as it is, by none of haltwise's checks."""
    fields = pa.schema([field for field in schema if field.name in row])
    metadata = {} if version is None else {"haltwise.schema": version}
    table = pa.Table.from_pylist([row], schema=fields)
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.fixture
def three(make_traces: MakeTraces) -> Traces:
    """Three traces, of 3, 0 and 2 points."""
    short = {
        "position": [5, 6],
        "probe_tokens": [1, 1],
        "answer": ["", "é"],
        "correct": [False, False],
        "confidence": [float("nan"), 1.0],
        "answer_logprobs": [[], [-3.0, -0.25]],
        "split": "dev",
        "segment": None,
    }
    return make_traces([{}, {**NO_POINTS, "split": "train"}, short], {"probing": "always"})


def test_a_file_becomes_flat_arrays(three: Traces) -> None:
    assert len(three) == 3
    assert three.num_points == 5
    assert three.offsets.tolist() == [0, 3, 3, 5]
    assert three.trace_of_point.tolist() == [0, 0, 0, 2, 2]
    assert three.trace_id.tolist() == ["t0", "t1", "t2"]
    assert three.segment.tolist() == ["easy", "easy", ""]
    assert three.position.tolist() == [100, 250, 400, 5, 6]
    assert three.answer.tolist() == ["3", "7", "7", "", "é"]
    assert three.correct.tolist() == [False, True, True, False, False]
    assert three.num_tokens.tolist() == [600, 600, 600]
    assert three.recorder == {"probing": "always"}
    np.testing.assert_array_equal(three.confidence, [0.5, 0.75, 0.96875, np.nan, 1.0])
    np.testing.assert_array_equal(three.worst_logprob, [-2.0, np.nan, -0.5, np.nan, -3.0])
    # h(p) of tokens of probability e^-1, e^-2, and so on, averaged over an answer's tokens.
    entropy = [scipy.stats.entropy([np.exp(x), -np.expm1(x)]) for x in (-1, -2, -0.5, -3, -0.25)]
    expected = [sum(entropy[:2]) / 2, np.nan, entropy[2], np.nan, sum(entropy[3:]) / 2]
    np.testing.assert_allclose(three.answer_entropy, expected, rtol=1e-6)
    kinds = [three.position, three.seed, three.num_tokens, three.offsets]
    assert {array.dtype for array in kinds} == {np.dtype(np.int64)}


def test_selecting_by_mask_and_by_index(three: Traces) -> None:
    masked = three.select(np.array([False, True, True]))
    assert masked.trace_id.tolist() == ["t1", "t2"]
    assert masked.offsets.tolist() == [0, 0, 2]
    assert masked.answer.tolist() == ["", "é"]
    turned = three.select(np.array([2, 0]))
    assert turned.position.tolist() == [5, 6, 100, 250, 400]
    assert turned.trace_of_point.tolist() == [0, 0, 1, 1, 1]
    assert three.select(np.zeros(3, dtype=bool)).num_points == 0


@given(order=st.permutations(range(5)), kept=st.integers(0, 5))
def test_selection_keeps_every_trace_with_its_own_points(order: list[int], kept: int) -> None:
    traces = ragged([2, 0, 3, 1, 0])
    rows = np.array(order[:kept], dtype=np.int64)
    selected = traces.select(rows)
    for new, old in enumerate(rows):
        expected = traces.position[traces.offsets[old] : traces.offsets[old + 1]]
        found = selected.position[selected.offsets[new] : selected.offsets[new + 1]]
        assert found.tolist() == expected.tolist()
    assert selected.num_points == selected.offsets[-1]


def ragged(lengths: list[int]) -> Traces:
    """Traces of some lengths whose positions are all different."""
    num, points = len(lengths), np.arange(sum(lengths))
    texts = ("trace_id", "question_id", "task", "segment", "model", "split")
    columns: dict[str, Any] = {name: np.array([f"t{n}" for n in range(num)]) for name in texts}
    columns |= {name: np.zeros(num, dtype=np.int64) for name in ("seed", "num_tokens")}
    columns |= {name: np.zeros(num, dtype=bool) for name in ("finished", "final_correct")}
    columns |= {"labelled": np.ones(num, dtype=bool), "full_answer": np.full(num, "", object)}
    columns |= {name: points for name in ("position", "probe_tokens", "correct", "answer")}
    columns |= {name: points for name in ("confidence", "worst_logprob", "answer_entropy")}
    return Traces(**columns, offsets=np.cumsum([0, *lengths]), recorder={})


def test_splits_are_chosen_by_name_and_a_missing_one_is_told(three: Traces) -> None:
    assert three.of_split("train", "dev").trace_id.tolist() == ["t1", "t2"]
    with pytest.raises(InputError, match=r"split 'validation': found 'dev', 'test', 'train'"):
        three.of_split("validation")


def test_digest_ignores_order_and_shards_and_sees_every_value(
    tmp_path: Path, make_row: MakeRow
) -> None:
    rows = [make_row(trace_id=f"t{n}", question_id=f"q{n}", seed=n) for n in range(4)]
    write_shard(tmp_path / "all.parquet", rows, {})
    write_shard(tmp_path / "parts" / "a.parquet", rows[2:], {})
    write_shard(tmp_path / "parts" / "b.parquet", rows[1::-1], {})
    whole, parts = read_traces(tmp_path / "all.parquet"), read_traces(tmp_path / "parts")
    assert whole.trace_id.tolist() != parts.trace_id.tolist()
    assert whole.digest == parts.digest
    rows[3] = make_row(trace_id="t3", question_id="q3", seed=3, answer=["3", "7", "77"])
    write_shard(tmp_path / "all.parquet", rows, {})
    assert read_traces(tmp_path / "all.parquet").digest != whole.digest


def test_signals_are_read_as_flat_arrays(tmp_path: Path, make_row: MakeRow) -> None:
    hidden = [[1.0, -2.0], [0.1, np.nan], [65504.0, 0.0]]
    short = {name: values[:2] for name, values in SIGNAL_ROW.items()}
    rows = [
        make_row(trace_id="a", **SIGNAL_ROW, hidden=list(np.array(hidden, np.float16))),
        make_row(trace_id="b", **NO_POINTS, **{name: [] for name in SIGNALS}),
        make_row(
            trace_id="c", **{n: make_row()[n][:2] for n in NO_POINTS}, **short, hidden=hidden[:2]
        ),
    ]
    write_shard(tmp_path / "0.parquet", rows[1:2], {})  # its hidden states are of unknown size
    write_shard(tmp_path / "1.parquet", rows[::2], {})
    traces = read_traces(tmp_path)
    assert list(traces.signals) == list(SIGNALS)
    for name in SIGNAL_ROW:
        assert traces.signals[name].dtype == np.float32
        expected = SIGNAL_ROW[name] + SIGNAL_ROW[name][:2]
        np.testing.assert_array_equal(traces.signals[name], np.float32(expected))
    states = np.array(hidden + hidden[:2], dtype=np.float16)
    np.testing.assert_array_equal(traces.signals["hidden"], states)
    assert traces.signals["hidden"].dtype == np.float16
    last = traces.select(np.array([2]))
    np.testing.assert_array_equal(last.signals["hidden"], states[3:])
    np.testing.assert_array_equal(last.signals["margin"], [0.125, np.nan])


def test_the_digest_sees_signals_and_stays_without_them(tmp_path: Path, make_row: MakeRow) -> None:
    def digest(**changes: Any) -> str:
        write_shard(tmp_path / "x.parquet", [make_row(**changes)], {})
        return read_traces(tmp_path / "x.parquet").digest

    # Heads in use name their traces by it.
    assert digest() == "1abd059a527604a5e4f33df8c3fdcd18e57cd8d82d0e99264f1e13a898db6743"
    others = [
        digest(**{name: numbers_of(name, 1, 2, value)}) for name in SIGNAL_ROW for value in (3, 4)
    ]
    assert len({digest(), *others}) == 15


def test_a_signal_is_in_all_shards_or_in_none(tmp_path: Path, make_row: MakeRow) -> None:
    write_shard(tmp_path / "a.parquet", [make_row(entropy=[1, 2, 3])], {})
    write_shard(tmp_path / "b.parquet", [make_row(trace_id="b")], {})
    with pytest.raises(InputError, match=r"b\.parquet: column entropy is there or in a\.parquet"):
        read_traces(tmp_path)
    for name, size in (("a", 2), ("b", 3)):
        write_shard(
            tmp_path / f"{name}.parquet", [make_row(trace_id=name, hidden=[[0] * size] * 3)], {}
        )
    with pytest.raises(
        InputError, match=r"b\.parquet: .*vectors of 3, expected 2 as in a\.parquet"
    ):
        read_traces(tmp_path)
    with pytest.raises(InputError, match="column 'entropy', row 1: found null"):
        write_shard(tmp_path / "a.parquet", [make_row(entropy=[1, 2, 3]), make_row()], {})
    with pytest.raises(InputError, match=r"column 'hidden' does not fit .*\[2\]"):
        write_shard(tmp_path / "a.parquet", [make_row(hidden=[[0, 0], [0], [0, 0]])], {})
    write_raw(tmp_path / "a.parquet", make_row(hidden=[[0, 0], [0], [0, 0]]))
    with pytest.raises(InputError, match="column 'hidden' has vectors of 1, 2, expected one size"):
        read_traces(tmp_path / "a.parquet")


def test_ids_are_read_alone(tmp_path: Path, make_row: MakeRow) -> None:
    row = make_row(position=[3, 2, 1])  # wrong, but nobody looks
    write_raw(tmp_path / "a.parquet", row)
    write_raw(tmp_path / "b.parquet", row | {"trace_id": "other"})
    assert read_ids(tmp_path) == ({"q0-0", "other"}, {})
    write_shard(tmp_path / "b.parquet", [make_row()], {"LM": "y"})
    with pytest.raises(InputError, match=r"b\.parquet: .*differs from a\.parquet's in LM"):
        read_ids(tmp_path)


def test_wider_types_and_further_columns_are_accepted(tmp_path: Path, make_row: MakeRow) -> None:
    wide = pa.schema(
        [(name, pa.large_string() if kind == pa.string() else kind) for name, kind in SCHEMA_TYPES]
        + [("notes", pa.list_(pa.float32())), ("note", pa.string())]
    )
    row = make_row(question="1 + 6?", text="...", notes=[0.1, 0.2, 0.3], note="x")
    write_raw(tmp_path / "wide.parquet", row, wide, version="1.3")
    assert read_traces(tmp_path / "wide.parquet").position.tolist() == [100, 250, 400]
    assert read_traces(tmp_path / "wide.parquet").signals == {}


SCHEMA_TYPES = [
    (field.name, pa.list_(pa.int64()) if field.type == pa.list_(pa.int32()) else field.type)
    for field in SCHEMA
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": [100, 250]}, r"'probe_tokens', row 0: found 3 entries, expected 2"),
        ({"answer": ["7"]}, r"'answer', row 0: found 1 entries, expected 3"),
        ({"position": [100, 100, 400]}, r"'position', row 0: found 100, expected strictly"),
        ({"position": [-1, 100, 400]}, r"'position', row 0: found -1"),
        ({"position": [1, 2, 601]}, r"'position', row 0: found 601, expected at most num_tokens"),
        ({"probe_tokens": [10, -2, 11]}, r"'probe_tokens', row 0: found -2, expected in"),
        ({"confidence": [0.5, 1.5, 0.5]}, r"'confidence', row 0: found 1.5, expected in \[0, 1\]"),
        ({"trace_id": "x" * 100_000}, r"'trace_id', row 0: found x+, expected at most 1000"),
        ({"split": "validation"}, r"'split', row 0: found validation, expected train, dev, test"),
        ({"probe_tokens": [1, 2**31 - 1, 1]}, r"'probe_tokens', row 0: found 2147483647, expected"),
        ({"num_tokens": 2**31 - 1}, r"'num_tokens', row 0: found 2147483647, expected at most"),
        (
            {"answer_logprobs": [[-1.0], [0.5], [-1.0]]},
            r"'answer_logprobs', row 0: found 0.5, expected at most 0, or NaN",
        ),
        ({"logprob": [-1.0, 2.0, -1.0]}, r"'logprob', row 0: found 2.0, expected at most 0"),
        ({"entropy": [0.1, -1.0, 0.1]}, r"'entropy', row 0: found -1.0, expected at least 0"),
        ({"margin": [0.1, 1.5, 0.2]}, r"'margin', row 0: found 1.5, expected in \[0, 1\]"),
        ({"num_tokens": 0, **NO_POINTS}, r"'num_tokens', row 0: found 0, expected at least 1"),
        ({"gold": ""}, r"'gold', row 0: found , expected a reference answer"),
        ({"gold": None}, r"'gold', row 0: found null, expected string"),
        ({"position": None}, r"'position', row 0: found null"),
        ({"correct": [True, None, True]}, r"'correct' has a null in a list"),
        ({"answer_logprobs": [[None], [], []]}, r"'answer_logprobs' has a null in a list"),
        ({"entropy": [0.1, 0.2]}, r"'entropy', row 0: found 2 entries, expected 3"),
        ({"margin": [0.1, np.inf, 0.2]}, r"'margin', row 0: found inf, expected finite or NaN"),
        ({"logprob": None}, r"'logprob', row 0: found null"),
        ({"hidden": [[1.0], [2.0], [1e6]]}, r"'hidden', row 0: found \[inf\], expected finite"),
    ],
)
def test_a_bad_value_is_told_by_file_column_and_row(
    tmp_path: Path, make_row: MakeRow, change: Row, message: str
) -> None:
    path = tmp_path / "bad.parquet"
    write_raw(path, make_row(**change))
    with pytest.raises(InputError, match=rf"bad\.parquet: column {message}"):
        read_traces(path)
    with pytest.raises(InputError, match=message):
        write_shard(tmp_path / "new.parquet", [make_row(**change)], {})
    assert os.listdir(tmp_path) == ["bad.parquet"]


def test_a_bit_that_has_flipped_is_seen(tmp_path: Path, make_row: MakeRow) -> None:
    path = tmp_path / "x.parquet"
    write_shard(
        path, [make_row(trace_id=f"t{n}", confidence=[n / 100] * 3) for n in range(100)], {}
    )
    whole, before = path.read_bytes(), read_traces(path).digest
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 200, replace=False).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with suppress(InputError):
            assert read_traces(path).digest == before


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, make_row: MakeRow) -> None:
    write_shard(tmp_path / "x.parquet", [make_row()], {})
    table = pq.read_table(tmp_path / "x.parquet")
    table = table.append_column("seed", table["seed"])
    pq.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"y\.parquet: column seed is there twice"):
        read_traces(tmp_path / "y.parquet")


def test_a_bad_value_in_a_later_row_is_found_there(tmp_path: Path, make_row: MakeRow) -> None:
    rows = [make_row(trace_id="a"), make_row(trace_id="b", confidence=[0.5, 0.5, -1.0])]
    with pytest.raises(InputError, match=r"'confidence', row 1: found -1\.0"):
        write_shard(tmp_path / "x.parquet", rows, {})


@pytest.mark.parametrize("version", [None, "3", "3.1", "x"])
def test_another_schema_version_is_refused(
    tmp_path: Path, make_row: MakeRow, version: str | None
) -> None:
    write_raw(tmp_path / "x.parquet", make_row(), version=version)
    told = f"schema version is {version or 'none'}, expected 1 or 2"
    with pytest.raises(InputError, match=told):
        read_traces(tmp_path / "x.parquet")


def test_missing_columns_and_wrong_types_are_told(tmp_path: Path, make_row: MakeRow) -> None:
    path = tmp_path / "x.parquet"
    row = make_row()
    del row["confidence"]
    write_raw(path, row)
    with pytest.raises(InputError, match="column confidence is missing"):
        read_traces(path)
    schema = pa.schema(
        [pa.field("position", pa.string()) if f.name == "position" else f for f in SCHEMA]
    )
    write_raw(path, make_row(position="100"), schema)
    with pytest.raises(InputError, match="'position' is string, expected list"):
        read_traces(path)


def test_paths_that_hold_no_traces_are_told(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_traces(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="folder without traces"):
        read_traces(tmp_path)
    with pytest.raises(InputError, match="no rows"):
        write_shard(tmp_path / "x.parquet", [], {})
    whole = tmp_path / "x.parquet"
    write_raw(whole, make_row())
    content = whole.read_bytes()
    for damaged in (b"", b"trace_id,question_id", content[:-20], content[: len(content) // 2]):
        whole.write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.parquet: damaged, or no Parquet file"):
            read_traces(whole)


def test_text_that_is_no_utf8_is_damage(tmp_path: Path, make_row: MakeRow) -> None:
    path = tmp_path / "x.parquet"
    write_raw(path, make_row(model="model-name"))
    path.write_bytes(path.read_bytes().replace(b"model-name", b"model\xff\xffame"))
    with pytest.raises(InputError, match=r"x\.parquet: damaged"):
        read_traces(path)


def test_shards_must_belong_together(tmp_path: Path, make_row: MakeRow) -> None:
    write_shard(tmp_path / "a.parquet", [make_row()], {"LM": "x", "seed": 1})
    write_shard(tmp_path / "b.parquet", [make_row()], {"LM": "x", "seed": 1})
    with pytest.raises(InputError, match=r"b\.parquet: trace_id 'q0-0' is in .*a\.parquet too"):
        read_traces(tmp_path)
    write_shard(tmp_path / "b.parquet", [make_row(trace_id="other")], {"LM": "y", "seed": 1})
    with pytest.raises(InputError, match=r"b\.parquet: .*differs from a\.parquet's in LM"):
        read_traces(tmp_path)


def test_duplicates_in_one_file_and_unknown_columns_are_refused(
    tmp_path: Path, make_row: MakeRow
) -> None:
    with pytest.raises(InputError, match="'q0-0' is there twice"):
        write_shard(tmp_path / "x.parquet", [make_row(), make_row()], {})
    with pytest.raises(InputError, match=r"unknown columns \['anwser'\]"):
        write_shard(tmp_path / "x.parquet", [make_row(anwser=[])], {})
    with pytest.raises(InputError, match=r"column 'num_tokens' does not fit int32: .*'many'"):
        write_shard(tmp_path / "x.parquet", [make_row(num_tokens="many")], {})
    with pytest.raises(InputError, match=r"'position' does not fit list<.*>: found list<.*double"):
        write_shard(tmp_path / "x.parquet", [make_row(position=[1.5, 2, 3])], {})
    with pytest.raises(InputError, match=r"'answer' does not fit list<.*>: found string"):
        write_shard(tmp_path / "x.parquet", [make_row(answer="377")], {})
    assert not list(tmp_path.iterdir())


def test_a_recorder_that_is_no_json_object_is_refused(tmp_path: Path, make_row: MakeRow) -> None:
    for text in ("[1]", "{"):
        table = pa.Table.from_pylist([make_row()], schema=SCHEMA)
        metadata = {"haltwise.schema": "1", "haltwise.recorder": text}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
        with pytest.raises(InputError, match="not a JSON object"):
            read_traces(tmp_path / "x.parquet")


@pytest.mark.whole
def test_a_recorder_that_was_damaged_is_refused_wherever_a_bit_has_flipped(
    tmp_path: Path, make_row: MakeRow
) -> None:
    path, recorder = tmp_path / "x.parquet", {"LM": "x", "close_text": "</think>", "seed": 10}
    write_shard(path, [make_row()], recorder)
    data = path.read_bytes()
    (size,) = np.frombuffer(data[-8:-4], dtype="<u4")
    num_refused = 0
    for place in range(len(data) - 8 - int(size), len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert read_ids(path)[1] == recorder
        except InputError as error:
            num_refused += "damaged" in str(error) and "\n" not in str(error)
    assert num_refused > len(json.dumps(recorder))


def test_writing_is_atomic_and_replaces(
    tmp_path: Path, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    write_shard(path, [make_row(question="1 + 6?")], {"LM": "x"})
    assert pq.read_table(path)["question"].to_pylist() == ["1 + 6?"]
    assert "text" not in pq.read_schema(path).names
    assert json.loads(pq.read_metadata(path).metadata[b"haltwise.recorder"]) == {"LM": "x"}

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, [make_row(trace_id="new")], {})
    monkeypatch.undo()
    assert read_traces(tmp_path).trace_id.tolist() == ["q0-0"]


def test_the_shared_recording_is_read_whole(bench: Callable[[str], Path]) -> None:
    traces = read_traces(bench("r1_math_dev.parquet"))
    lengths = np.diff(traces.offsets)
    assert len(traces) == 2736
    assert int((lengths == 0).sum()) == 86
    assert int((~traces.finished).sum()) == 146
    assert round(traces.final_correct.mean() * 100, 2) == 90.1
    assert round(traces.num_tokens.mean()) == 5404
    assert len(np.unique(traces.question_id)) == 456
