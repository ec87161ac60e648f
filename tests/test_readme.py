"""What the README says is true, and short."""

import re
import runpy
import sys

import pytest

from tests.guides import ROOT, all_blocks, blocks, page

README = page("README")


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", README, re.MULTILINE))


def test_the_snippet_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = blocks("README", "python")
    assert len(snippet.text.splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    exec(compile(snippet.text, "README", "exec"), {})
    _, told = capsys.readouterr().out.split("</think>")
    assert re.match(r"[^<]* 18 <.*reason='halted'", told)
    position = re.findall(r"closed after (\d+) tokens, the answer (\d+)", README)
    assert position == [(re.findall(r"position=(\d+)", told)[0], "18")]


def test_the_table_of_the_front_page_is_that_of_the_results() -> None:
    numbers = r"-?[\d.]+ \[-?[\d.]+, [+-]?[\d.]+\]"
    assert set(re.findall(numbers, README)) <= set(re.findall(numbers, page("RESULTS")))


@pytest.mark.parametrize(
    "script",
    ["train", "adapt", "evaluate", "calibrate", "cascade", "distill", "scorecard", "collect"],
)
def test_scripts_know_the_flags_that_the_pages_name(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    told = capsys.readouterr().out
    pages = [README, *(page(name) for name in ("COMMANDS", "RESULTS", "CLUSTER"))]
    lines = [
        line
        for text in pages
        for block in all_blocks(text)
        for line in block.text.replace("\\\n", " ").splitlines()
        if f"python {script}.py" in line
    ]
    assert lines
    for flag in re.findall(r"--[a-z][a-z-]*", " ".join(lines)):
        assert flag in told


def test_the_file_tree_names_what_is_there() -> None:
    tree = page("ARCHITECTURE").split("## Files")[1].split("```")[1]
    folders = re.findall(r"^( *)([\w/]+)/ ", tree, re.MULTILINE)
    assert len(folders) > 15
    for indent, folder in folders:
        assert (ROOT / ("haltwise" if indent else "") / folder).is_dir(), folder
    for name in re.findall(r"\S+\.py", tree):
        assert (ROOT / name).is_file()
