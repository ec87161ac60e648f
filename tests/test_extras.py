"""Whoever lacks the packages of an extra is told which, in one line."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import installed

import pytest

import haltwise

ROOT = Path(__file__).parent.parent


def run_without(missing: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python that has no module of some name."""
    without = f"import sys; sys.modules[{missing!r}] = None; {code}"
    return subprocess.run(
        [sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False
    )


def command(*arguments: str) -> str:
    return f"sys.argv = {['haltwise', *arguments]}; from haltwise.cli import main; main()"


@pytest.mark.parametrize(
    ("missing", "module", "install"),
    [
        ("transformers", "haltwise.transformers", "-e '.[hf]' -c constraints.txt"),
        ("transformers", "haltwise.transformers.hub", "-e '.[hf]' -c constraints.txt"),
        ("torch", "haltwise.transformers", "-e '.[hf]' -c constraints.txt"),
        ("transformers", "haltwise.training.trainer", "-e '.[training]' -c constraints.txt"),
        ("stable_baselines3", "haltwise.training.sb3", "-e '.[train]' -c constraints.txt"),
        ("torch", "haltwise.training.averaging", "-e '.[hf]' -c constraints.txt"),
        ("vllm", "haltwise.vllm", "vllm -e ."),
        ("starlette", "haltwise.proxy", "-e '.[proxy]' -c constraints.txt"),
        ("uvicorn", "haltwise.proxy", "-e '.[proxy]' -c constraints.txt"),
        ("gguf", "lms.gguf", "-e '.[gguf]' -c constraints.txt"),
    ],
)
@pytest.mark.whole
def test_an_adapter_names_what_it_needs(missing: str, module: str, install: str) -> None:
    done = run_without(missing, f"import {module}")
    told = done.stderr.splitlines()[-1]
    needs = f"{module.removesuffix('.hub')} needs {missing}, which is not installed"
    assert told.startswith(f"ModuleNotFoundError: {needs}: run pip install {install} in the clone")


def test_a_program_says_in_one_line_what_it_needs() -> None:
    done = run_without("gguf", "import runpy; runpy.run_module('lms.gguf', None, '__main__', True)")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: lms.gguf needs gguf, which is not installed: run pip ")


@pytest.mark.parametrize("missing", ["tyro", "starlette"])
def test_the_command_names_what_serving_needs(missing: str) -> None:
    done = run_without(missing, command("serve"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr and "pip install -e '.[proxy]'" in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "train",
        "evaluate",
        "calibrate",
        "adapt",
        "cascade",
        "distill",
        "scorecard",
        "search",
        "collect",
    ],
)
@pytest.mark.parametrize("missing", ["numpy", "tyro", "torch", "pyarrow"])
def test_a_script_names_the_extra_that_it_needs(script: str, missing: str) -> None:
    run = f"import runpy; sys.argv[0] = '{script}.py'; runpy.run_path('{script}.py')"
    done = run_without(missing, run)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {script}.py needs {missing}, not installed: "
        "run pip install -e '.[train]' -c constraints.txt in the clone of haltwise\n"
    )


@pytest.mark.parametrize(
    ("missing", "arguments", "told"),
    [
        ("prometheus_client", "--engine openai --base-url http://127.0.0.1:1", "'.[proxy]'"),
        ("httpx2", "--engine openai --base-url http://127.0.0.1:1", "'.[proxy]'"),
        ("gguf", "--lm README.gguf", "'.[gguf]'"),
    ],
)
@pytest.mark.whole
def test_a_recording_names_the_extra_that_it_needs(
    missing: str, arguments: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "README.gguf").write_bytes(b"GGUF")
    arguments = arguments.replace("README", str(tmp_path / "README"))
    argv = ["collect.py", "--self-test", *arguments.split()]
    run = f"import runpy; sys.argv = {argv}; runpy.run_path('collect.py', None, '__main__')"
    done = run_without(missing, run)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error:") and missing in error and told in error


def test_scripts_look_for_each_package_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    names = {re.split("[<>=]", one)[0].replace("-", "_") for one in stated}
    assert names - {"scikit_learn"} | {"sklearn"} == set(installed.MODULES)


def test_help_and_version_need_no_extra() -> None:
    done = run_without("tyro", command("--help"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout and "--version" in done.stdout
    done = run_without("tyro", command("--version"))
    assert done.stdout == f"haltwise {haltwise.__version__}\n"


def test_a_defect_of_our_own_is_not_taken_for_a_missing_package() -> None:
    done = run_without("haltwise.proxy.app", "import haltwise.proxy")
    assert "pip install" not in done.stderr
    assert "haltwise.proxy.app" in done.stderr


def test_nothing_says_to_install_haltwise_from_an_index() -> None:
    """It is in none; what somebody else may put there under its name must not be installed."""
    names = [
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")),
    ]
    sources = [ROOT / name for name in names if name != "docs/LOG.md"]
    for folder in ("haltwise", "lms", "recording", "envs", "evaluation", "examples"):
        sources += [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".in")]
    from_index = r"""pip install(?: -\S+)* ['"]?haltwise|['"]haltwise\["""
    told = [path for path in sources if re.search(from_index, path.read_text())]
    assert told == []
