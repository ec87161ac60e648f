"""The commands and snippets of the guides run, on the embedded LM."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from examples import small_lm
from haltwise import InputError

ROOT = Path(__file__).parent.parent
GUIDES = ("YOUR_LM", "YOUR_DATA", "SIGNALS", "PRICE")
# Said behind each command, so that it takes seconds.
QUICK = {
    "collect.py": "--num 40 --max-tokens 160 --batch-size 40",
    "train.py": "--folds 2 --seeds 1 --fit.pathwise.steps 20 --fit.ppo.total-timesteps 512 "
    "--fit.ppo.num-envs 16 --fit.ppo.n-steps 16 --fit.ppo.batch-size 64",
}
MEANT = {"LM": "embedded", "TASK": "all", "DEVICE": "cpu"}


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (ROOT / f"docs/{guide}.md").read_text(), re.DOTALL
    )


def commands(guide: str) -> list[str]:
    return [line for block in blocks(guide, "sh") for line in block.splitlines() if line]


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script as `python` would, in this process: each would load torch anew."""
    for name, value in MEANT.items():
        line = line.replace(f"${name}", value)
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    quick = "" if "--self-test" in arguments else QUICK.get(script, "")
    monkeypatch.setattr(sys, "argv", [script, *arguments, *quick.split()])
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds are fitted in this process: each other one would load torch anew."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guides' commands run, one after the other; with files as the guides have them."""
    folder = tmp_path_factory.mktemp("guides")
    rows = [
        {"question": f"sum : {i} + {j}", "answer": str(i + j), "topic": f"from {i}"}
        for i in range(3, 12)
        for j in range(1, 10)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "tests/lms/samples/gsm8k.jsonl", folder)
    return folder


@pytest.mark.parametrize("guide", [*GUIDES, pytest.param("CLUSTER", marks=pytest.mark.slow)])
def test_every_command_of_a_guide_runs(
    guide: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if guide == "CLUSTER":
        pytest.importorskip("ray")
    monkeypatch.chdir(folder)
    found = commands(guide)
    assert found
    if guide == "PRICE" and not (folder / "checkpoints/mine").exists():
        for line in commands("YOUR_LM")[1:3]:
            run_command(line, monkeypatch)
    for line in found:
        run_command(line, monkeypatch)


def test_the_inference_loop_of_the_guide_halts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/mine").symlink_to(ROOT / "checkpoints/embedded-head")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LM", str(ROOT / "checkpoints/embedded"))
    (snippet,) = blocks("YOUR_LM", "python")
    snippet = snippet.replace("What is 6 times 7?", "sum : 9 + 3 + 6 + 7 - 2 - 5")
    exec(compile(snippet, "YOUR_LM", "exec"), {})
    assert re.search("</think>.*ThoughtReport", capsys.readouterr().out)


def test_no_command_of_a_guide_is_left_out() -> None:
    """A command that runs stands in a block of its own kind; others are named in the text."""
    for path in (ROOT / "docs").glob("*.md"):
        languages = set(re.findall(r"^```(\w+)$", path.read_text(), re.MULTILINE))
        assert languages <= {"sh", "python"}, path
        if "sh" in languages:
            assert path.stem in (*GUIDES, "CLUSTER"), path


@pytest.mark.parametrize("num", [0, 9001])
def test_a_small_lm_has_so_many_questions(num: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"num is {num}, expected 1 to 9000"):
        small_lm.main(small_lm.SmallQuestionsConfig(tmp_path / "out", num))
    assert not list(tmp_path.iterdir())
