import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import haltwise

ROOT = Path(__file__).parent.parent
SHIPPED = ("embedded", "embedded-head", "embedded-blind-head")
BUILD = (
    "import sys, setuptools.build_meta as build; out = sys.argv[1]; "
    "build.build_wheel(out); build.build_sdist(out)"
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of the clone."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    kept = shutil.ignore_patterns(".*", "__pycache__", "build", "site", "*.egg-info", "checkpoints")
    shutil.copytree(ROOT, copy, ignore=kept, dirs_exist_ok=True)
    # Of the checkpoints what ships: others are runs of whoever works here.
    for name in SHIPPED:
        shutil.copytree(ROOT / "checkpoints" / name, copy / "checkpoints" / name)
    shutil.copy(ROOT / "checkpoints/README.md", copy / "checkpoints")
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True
    )
    return out


@pytest.mark.whole
def test_the_wheel_holds_the_runtime_only(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"haltwise"}
    needed = {"haltwise/__init__.py", "haltwise/py.typed", "haltwise/proxy/page.html"}
    assert needed <= set(names)


@pytest.mark.whole
def test_the_wheel_imports_without_the_clone(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import haltwise, importlib.util as u; "
        "print(haltwise.__file__, [n for n in ('envs', 'agents', 'evaluation') if u.find_spec(n)])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "haltwise" / "__init__.py"), "[]"]


def test_the_sdist_holds_what_tests_and_readers_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ["agents", "envs", "evaluation", "haltwise", "lms", "policies", "recording"]
    folders += ["runs", "tests", "traces"]
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py")))
    }
    assert sources <= names
    assert {"Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"mkdocs.yml", "checkpoints/README.md", "hashes/hf.txt", "hashes/proxy.txt"} <= names
    read = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.*")}
    assert {path for path in read if "__pycache__" not in path} <= names
    for name in SHIPPED:
        weights = "model" if name == "embedded" else "head"
        assert f"checkpoints/{name}/{weights}.safetensors" in names


def test_the_version_is_that_of_the_package(project: dict[str, Any]) -> None:
    stated = project["project"]["version"]
    assert haltwise.__version__ == version("haltwise") == stated
    assert f"\nversion: {stated}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("editable", [False, True])
def test_what_python_finds_from_the_folder_around_the_clone(editable: bool, tmp_path: Path) -> None:
    """There an editable install loses against a clone that is called haltwise, as is told."""
    clone, site = tmp_path / "haltwise", tmp_path / "site"
    clone.mkdir()
    shutil.copytree(ROOT / "haltwise", clone / "haltwise")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    kind = "editable" if editable else "wheel"
    code = f"import setuptools.build_meta as build; build.build_{kind}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    # Without the haltwise that is installed here, and with the folder where Python is started.
    code = (
        "import site, sys; sys.path.insert(0, ''); "
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]; "
        f"site.addsitedir({str(site)!r}); from haltwise import HaltHead; print('found')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if editable:
        told = done.stderr.splitlines()[-1].removeprefix("ImportError: ")
        assert f"**`{told}`**" in (ROOT / "docs/INSTALL.md").read_text()
    else:
        assert done.stdout == "found\n"


def test_base_dependencies_are_two(project: dict[str, Any]) -> None:
    names = {re.split(r"[<>=]", line)[0] for line in project["project"]["dependencies"]}
    assert names == {"numpy", "safetensors"}


def test_every_dependency_has_a_tested_version(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[<>=\[]", line)[0]
        for lines in (project["project"]["dependencies"], *extras.values())
        for line in lines
    } - {"haltwise"}
    assert wanted <= set(pins)
    assert pins["torch"] == "2.13.0"


@pytest.mark.parametrize("extra", ["hf", "proxy"])
def test_hashes_are_those_of_the_tested_versions(project: dict[str, Any], extra: str) -> None:
    """`make hashes` writes them anew; the index that they came from is nobody's business."""
    text = (ROOT / "hashes" / f"{extra}.txt").read_text()
    found = re.findall(
        r"^(\S+==\S+)( ; [^\n]*)? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    assert "".join(f"{pin}{marker} \\\n{hashes}" for pin, marker, hashes in found) == text
    pins = {pin for pin, _, _ in found}
    assert pins <= set((ROOT / "constraints.txt").read_text().splitlines())
    wanted = [*project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"][extra]
    names = {re.split(r"[<>=]", line)[0] for line in wanted} - {"torch"}
    assert names <= {pin.partition("==")[0] for pin in pins}


@pytest.mark.parametrize("module", ["gymnasium", "stable_baselines3", "envs.reward", "traces"])
def test_ruff_keeps_training_code_out_of_the_runtime(tmp_path: Path, module: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("haltwise", "agents"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "new.py").write_text(f"import {module}\n")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "."],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.count("TID251") == 1
    assert "haltwise/new.py" in done.stdout
