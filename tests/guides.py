"""What stands in README.md and docs/: fenced blocks, and the commands that bash reads in them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
#: Everything that a reader may follow; the log tells what was done, and is no guide.
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/*.md")} - {ROOT / "docs/LOG.md"})
#: What the fence of a block says that no test can run, in front of the reason.
NOT_RUN = "Not run by the tests: "
# Told, not run, in the shell; `python -c` runs, since its output becomes part of a command.
_STUBS = r"""
told() { printf '%s\0' "$#" "$@" >>"$TOLD"; }
for name in git haltwise make pip python3; do eval "$name() { told $name \"\$@\"; }"; done
python() { if [ "$1" = -c ]; then "$PYTHON" "$@"; else told python "$@"; fi; }
set -eu
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return not self.title.startswith(NOT_RUN)


def page(name: str) -> str:
    return next(path for path in PAGES if path.stem == name).read_text()


def blocks(name: str, language: str) -> list[Block]:
    """The blocks of a page in a language, but for those that say why they are not run."""
    return [block for block in all_blocks(page(name)) if block.language == language and block.runs]


def all_blocks(text: str) -> list[Block]:
    fence = r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```$'
    return [Block(*found) for found in re.findall(fence, text, re.DOTALL | re.MULTILINE)]


def commands(text: str, folder: Path) -> list[list[str]]:
    """The commands of a block, in order, as bash reads them in a folder: quotes, variables, all.

    Args:
        text: The block as it stands.
        folder: Where it is run.
    """
    told = folder / ".told"
    told.write_text("")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "TOLD": str(told)}
    subprocess.run(["bash", "-c", _STUBS + text], cwd=folder, env=environment, check=True)
    words = told.read_text().split("\0")[:-1]
    found: list[list[str]] = []
    while words:
        num = int(words[0])
        found.append(words[1 : 1 + num])
        del words[: 1 + num]
    return found


def run(command: list[str], more: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what a command of a guide says, in this process: each would load torch anew.

    What installs is not installed: its extras and make's targets have to be there.

    Args:
        command: A command and its arguments.
        more: What is said behind a script's own arguments, by its name, so that it takes seconds.
        monkeypatch: Puts `sys.argv` back.
    """
    name, *arguments = command
    if name == "pip":
        _check_install(arguments)
    elif name == "make":
        for target in arguments:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif name == "python":
        _run_python(arguments, more, monkeypatch)
    else:
        assert command[:3] == ["python3", "-m", "venv"], command


def _run_python(
    arguments: list[str], more: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = arguments[0] == "-m"
    name, *rest = arguments[1:] if module else arguments
    quick = [] if "--self-test" in rest else more.get(name, "").split()
    monkeypatch.setattr(sys, "argv", [name, *rest, *quick])
    path = name.replace(".", "/") + ".py" if module else name
    runpy.run_path(str(ROOT / path), run_name="__main__")


def _check_install(arguments: list[str]) -> None:
    """The extras that are named exist, and so does what is said to hold the versions."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments.pop(0) == "install"
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    if "-c" in arguments:
        assert arguments[arguments.index("-c") + 1] == "constraints.txt"
    named = [word for word in arguments if re.match("haltwise", word)]
    assert not named, "haltwise is in no package index"
