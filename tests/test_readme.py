"""What the README says is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_inference_snippet_runs_as_it_stands() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippet.splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "</think>" in done.stdout and "reason='" in done.stdout


@pytest.mark.parametrize("script", ["train", "adapt", "evaluate", "calibrate", "collect"])
def test_scripts_know_the_flags_that_the_readme_uses(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in README.splitlines() if f"python {script}.py" in line]
    assert lines
    for flag in re.findall(r"--[a-z-]+", " ".join(lines)):
        assert flag in done.stdout


def test_the_file_tree_names_what_is_there() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    for folder, names in re.findall(r"^(\w+)/ .*\n((?:  \S+\.py.*\n)*)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()
        for name in re.findall(r"^  (\S+\.py)", names, re.MULTILINE):
            assert (ROOT / folder / name).is_file()
