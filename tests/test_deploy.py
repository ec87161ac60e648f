"""The examples of how to run the proxy as a service are sound, and their commands can be run."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

from haltwise.proxy import ServeConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs" / "deploy"
UNIT = (DEPLOY / "haltwise@.service").read_text()
RETRAIN = (DEPLOY / "haltwise-retrain.service").read_text()
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


def served(command: list[str]) -> ServeConfig:
    program, serve, *flags = command
    assert Path(program).name == "haltwise" and serve == "serve"
    return tyro.cli(ServeConfig, args=flags)


def test_the_unit_serves_with_settings_that_go_together() -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    config = served(command.split())
    config.check()
    assert config.share_port and config.state == "/var/lib/haltwise/state.db"
    stops = int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[0])
    assert stops > config.drain_timeout


def test_a_head_is_learned_from_the_audits_that_the_unit_keeps() -> None:
    (serve,), (learn,) = (
        re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE) for unit in (UNIT, RETRAIN)
    )
    kept = served(serve.split())
    python, script, *flags = learn.split()
    assert Path(python).name == "python" and (ROOT / script).exists()
    config = tyro.cli(TrainConfig, args=flags)
    assert (config.state, config.audit_traces) == (kept.state, kept.audit_traces)
    assert config.parent == kept.head and config.run_dir is None


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
@pytest.mark.parametrize(
    "name", ["haltwise@.service", "haltwise-retrain.service", "haltwise-retrain.timer"]
)
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    for path in DEPLOY.glob("haltwise*"):
        installed = re.sub(r"/opt/haltwise/.venv/bin/\w+", sys.executable, path.read_text())
        installed = installed.replace("/opt/haltwise", str(ROOT))
        found = installed.replace("User=haltwise", "User=root")
        (tmp_path / path.name.replace("@.", "@1.")).write_text(found)
    unit = tmp_path / name.replace("@.", "@1.")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and unit.stem not in done.stderr, done.stderr


def test_the_container_serves_with_settings_that_go_together() -> None:
    (command,) = re.findall(r"^ENTRYPOINT (.*)$", CONTAINERFILE, re.MULTILINE)
    config = served(json.loads(command))
    config.check()
    assert config.host == "0.0.0.0" and "EXPOSE 8700" in CONTAINERFILE and config.port == 8700


def test_the_container_is_built_of_what_is_there() -> None:
    for sources in re.findall(r"^COPY (.*) \S+$", CONTAINERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (extras,) = re.findall(r'"\.\[(.*)\]"', CONTAINERFILE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    python = tuple(map(int, re.findall(r"python:(\d+)\.(\d+)", CONTAINERFILE)[0]))
    assert python >= tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))


def test_a_linter_takes_the_container() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [linter, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
