"""A head goes on from its own audits: one command, a run folder of its own, and nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from agents.parent import Parent
from haltwise import HaltHead, InputError
from haltwise.control.installation import name_of
from haltwise.control.status import read_library
from recording.audits import ServedAudits
from runs import Run
from tests.audited import KEY, Installation
from tests.heads import random_head, sure_head
from tests.test_train import SMALL
from traces import TraceFiles, read_traces
from train import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds are fitted in this process: each other one would load torch anew."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def config_of(served: Installation, run_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "state": served.state,
        "parent": served.parent,
        "audit_traces": served.audits,
        "run_dir": run_dir,
    }
    return TrainConfig(**settings | {"folds": 2, "seeds": 1, "fit": SMALL} | changes)


@pytest.fixture
def served(tmp_path: Path) -> Installation:
    installation = Installation.begin(tmp_path)
    installation.audit(60)
    return installation


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Where a run "new" has learned from 60 audits."""
    installation = Installation.begin(tmp_path_factory.mktemp("served"))
    installation.audit(60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        train.main(config_of(installation, installation.folder / "new"))
    return installation


@pytest.mark.whole
def test_a_child_learns_from_the_audits_that_are_not_kept_back(learned: Installation) -> None:
    run, parent = Run(learned.folder / "new"), learned.head
    audits = read_traces(run.audits)
    assert len(audits) == 60
    of = {split: set(audits.question_id[audits.split == split]) for split in ("train", "test")}
    assert run.learned().questions == of["train"] | {"old"} and of["test"]
    head = run.head()
    assert head.config.observing == parent.config.observing
    assert head.config.halting == parent.config.halting
    assert head.config.installation == name_of(KEY) and not parent.config.installation
    assert head.digest != parent.digest
    assert run.operating_points()[0.0]["head"] == (head.config.default_price or None)


@pytest.mark.whole
def test_the_run_tells_where_it_comes_from(learned: Installation) -> None:
    told = json.loads((learned.folder / "new/config.json").read_text())
    parent = {"run": str(learned.parent), "digest": learned.head.digest}
    assert told["parent"] == parent and told["state"] == learned.state and told["audits"] == 60
    assert sum(told["splits"].values()) == 60 and told["learned_from"] == told["splits"]["train"]
    assert told["config"]["digest"] == read_traces(told["traces"]).digest
    assert told["drift"]["changed"] == []


def test_another_child_learns_from_what_is_new_alone(learned: Installation, tmp_path: Path) -> None:
    later = Installation(tmp_path, learned.head)
    later.audit(60, first=30)  # half of the questions come again
    ServedAudits("", later.audits).copy(tmp_path / "copy")
    files, run = TraceFiles.open(tmp_path / "copy"), Run(learned.folder / "new")
    kept = files.question_ids(files.rows("train"))
    fresh = files.question_ids(files.rows("train") & Parent.load(run.folder).fresh(files))
    assert fresh == kept - run.learned().questions and fresh < kept


def test_looking_tells_what_has_changed_and_writes_nothing(
    served: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(served.folder.rglob("*"))
    served.audit(60, first=60, hardness=1.5)
    config = config_of(served, served.folder / "new", look=True)
    assert train.main(config) == served.parent
    told = capsys.readouterr().out
    assert told.startswith("What has changed: the LM, its template or its settings")
    assert "(60 questions beside 60 of before" in told
    assert {path.name for path in served.folder.rglob("*")} - {path.name for path in before} == {
        path.name for path in served.audits.iterdir() if path not in before
    }


def others(parent: HaltHead) -> HaltHead:
    """A head of the same conditions whose features are others."""
    head = random_head(0, ("pace", "ending"), probing="at_halt")
    return HaltHead(replace(head.config, halting=parent.config.halting), head.weights)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (lambda parent: sure_head(rule="every 3 tokens"), "the head expects 'every 3 tokens'"),
        (lambda parent: sure_head(close="</think>"), "close_text is .*, the head expects"),
        (others, "the parent reads feature group ending, .*end_think_logprob"),
    ],
)
def test_a_parent_of_other_conditions_is_refused(
    head: Callable[[HaltHead], HaltHead], told: str, served: Installation, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = Installation.begin(folder, head(served.head))
    config = config_of(served, tmp_path / "new", parent=other.parent, state=other.state)
    with pytest.raises(InputError, match=told):
        train.main(config)
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": None}, "expected --state, as the haltwise serve has"),
        ({"audit_traces": None, "state": None}, "expected --state and --audit-traces"),
        ({"parent": None}, "--state is of audits: expected --parent RUN"),
        ({"parent": None, "state": None, "audit_traces": None, "look": True}, "--look is of"),
        ({"rule": "every 8 tokens", "live": True}, "expected no --live, --rule with it"),
        ({"state": "nowhere.db"}, "nowhere.db is not there"),
        ({"audit_traces": Path("nowhere")}, "nowhere: no folder, expected the --audit-traces"),
        ({"parent": Path("nowhere")}, r"no head\.json in nowhere"),
        ({"folds": 200}, "questions that the parent has not learned from, .* at least 200"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], told: str, served: Installation
) -> None:
    config = config_of(served, served.folder / "new", **changes)
    with pytest.raises(InputError, match=told):
        train.main(config)
    assert not [path for path in served.folder.iterdir() if "new" in path.name]


def test_a_parent_that_the_state_does_not_know_is_refused(
    served: Installation, tmp_path: Path
) -> None:
    unknown = Run(tmp_path / "unknown")
    head = sure_head()
    unknown.save_head(HaltHead(head.config, head.weights | {"b0": head.weights["b0"] + 1}))
    unknown.save_learned(Run(served.parent).learned())
    config = config_of(served, tmp_path / "new", parent=unknown.folder)
    with pytest.raises(InputError, match="the state does not know head"):
        train.main(config)


# What a process does before it is killed, and what is to be seen of the run then.
KILLED_AT = {
    "recording.audits.import_json_lines": set(),
    "runs.Run.begin": set(),
    "train.fit": {"audits", "config.json"},
    "runs.Run.save_head": {"audits", "config.json", "questions.json"},
}
QUICK = {"recording.audits.import_json_lines", "train.fit"}


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=() if step in QUICK else pytest.mark.slow) for step in KILLED_AT],
)
@pytest.mark.whole
def test_whoever_is_killed_leaves_no_half_run_and_the_champion_serving(
    step: str, served: Installation
) -> None:
    run_dir = served.folder / "new"
    config = config_of(served, run_dir)
    before = json.dumps(read_library(served.state).to_json())
    told = {name: str(getattr(config, name)) for name in ("state", "parent", "audit_traces")}
    code = f"""
import os, signal
os.cpu_count = lambda: 1
from pathlib import Path
import recording.audits, runs, train
from tests.test_train import SMALL
def killed(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
{step} = killed
told = {told!r}
train.main(train.TrainConfig(
    state=told["state"], parent=Path(told["parent"]), audit_traces=Path(told["audit_traces"]),
    run_dir=Path({str(run_dir)!r}), folds=2, seeds=1, fit=SMALL))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert json.dumps(read_library(served.state).to_json()) == before
    seen = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    assert seen >= KILLED_AT[step] and bool(seen) == bool(KILLED_AT[step])
    with pytest.raises(InputError, match=r"no head\.json"):
        HaltHead.load(run_dir)
    if seen:
        served.audit(30, first=60)  # others go on being written
        with pytest.raises(InputError, match="exists: expected a new folder, or --resume"):
            train.main(config)
    train.main(replace(config, resume=bool(seen)))
    assert len(read_traces(Run(run_dir).audits)) == 60
    assert np.isfinite(HaltHead.load(run_dir).weights["w0"]).all()


def test_a_run_does_not_go_on_with_another_parent(learned: Installation, tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    other.save_head(random_head(1, ("pace",)))
    other.save_learned(Run(learned.parent).learned())
    config = config_of(learned, learned.folder / "new", resume=True, parent=other.folder)
    with pytest.raises(InputError, match="was not begun with these settings"):
        train.main(config)


def test_what_a_child_learned_from_is_what_was_before(
    learned: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    child = learned.folder / "new"
    learned.serve(HaltHead.load(child))
    learned.audit(40, first=60)
    train.main(config_of(learned, learned.folder / "newer", parent=child, look=True))
    assert "(40 questions beside 60 of before" in capsys.readouterr().out
