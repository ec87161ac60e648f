"""docs/TRACES.md: its two lines can be imported as they stand, and it names every column."""

import re
from pathlib import Path

import pytest

from haltwise import Halting
from recording.collect import CollectConfig, collect
from traces import SCHEMA, read_traces

PAGE = (Path(__file__).parents[2] / "docs/TRACES.md").read_text()


def test_its_two_lines_are_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "traces.jsonl").write_text(example)
    collect(CollectConfig(json_lines=tmp_path / "traces.jsonl", out=tmp_path / "imported"))
    assert not capsys.readouterr().err
    traces = read_traces(tmp_path / "imported")
    assert traces.position.tolist() == [64, 128]
    assert Halting.of_recorder(traces.recorder).why_not_run() == ""


def test_it_names_every_column() -> None:
    assert set(SCHEMA.names) <= set(re.findall(r"`(\w+)`", PAGE))
