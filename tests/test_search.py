"""A search for settings of a training, through the script's own `main`."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import search
from haltwise import InputError
from runs import Run
from search import SearchConfig
from traces import Traces, read_traces

ROOT = Path(__file__).parent.parent
# As `one_core` of conftest.py does it for the tests' own process.
ONE_CORE = "import os; os.cpu_count = lambda: 1; import runpy, sys; "


@pytest.fixture
def config(random_traces_path: Path, tmp_path: Path) -> SearchConfig:
    return SearchConfig(
        random_traces_path, tmp_path / "run", 3, ("pace", "confidence"), folds=2, seeds=1
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No start takes 900 steps."""
    candidates = pytest.importorskip("agents.candidates")
    space = candidates._space

    def few_steps(*arguments: Any) -> Any:
        return space(*arguments) | {"steps": candidates.IntDistribution(300, 301)}

    monkeypatch.setattr(candidates, "_space", few_steps)
    yield


def found(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Run(folder).search_json.read_text())
    return content


@pytest.mark.whole
def test_a_search_tries_the_defaults_and_others_out_of_fold_and_judges_elsewhere(
    config: SearchConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = search.main(config)
    content, told = found(folder), capsys.readouterr().out
    traces = read_traces(config.traces)
    num = len(np.unique(traces.of_split("train", "dev").question_id))
    assert num == 14 and content["num_questions"] == 9
    assert len(content["tried"]) == 3 and content["tried"][0]["settings"]["learning_rate"] == 0.003
    assert all(len(one["points"]) == 14 for one in content["tried"])
    areas = [one["area"] for one in content["tried"]]
    assert content["best"] == int(np.argmax(areas))
    assert f"Candidate {content['best']}: {content['options']}" in told or not content["best"]
    page = Run(folder).search_page.read_text()
    assert "out of fold" in page
    assert not Run(folder).folds.exists()

    search.main(replace(config, num=4))  # goes on
    again = found(folder)["tried"]
    assert [one["area"] for one in again[:3]] == areas
    assert len(again) == 4


def test_the_best_candidate_is_judged_on_questions_that_the_search_did_not_see(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.candidates import Candidate

    learned: list[Traces] = []

    def halts_at_once(
        traces: Traces, fold: Any, head: Any, fit: Any, prices: Any, *rest: Any, **more: Any
    ) -> Any:
        learned.append(traces)
        return {seed: np.ones((1, len(prices), traces.num_points), bool) for seed in fold}

    monkeypatch.setattr(search, "out_of_fold", halts_at_once)
    traces = read_traces(config.traces).of_split("train", "dev")
    material = search._Material.of(traces, config)
    settings: dict[str, Any] = {"learning_rate": 0.003, "steps": 300, "prior_questions": 1500.0}
    settings |= {"correct_coef": 2.0, "net_width": 64, "without": "pace"}
    two = [Candidate(number, settings, 1.0) for number in (0, 1)]
    judged = search._judge(two, Run(config.run_dir), material, config)
    assert [len(each) for each in learned] == [len(traces)] * 2  # heads learn from all others
    kept = set(traces.question_id[material.kept].tolist())
    assert judged.num_questions == len(kept) == 5
    assert not kept & set(material.searched.question_id.tolist())
    assert judged.area_more == (0.0, [0.0, 0.0])


@pytest.mark.whole
def test_test_questions_change_nothing(config: SearchConfig, tmp_path: Path) -> None:
    table = pq.read_table(config.traces)
    spoiled = np.array(table["final_correct"].to_pylist())
    spoiled ^= np.array(table["split"].to_pylist()) == "test"
    at = table.schema.get_field_index("final_correct")
    other = table.set_column(at, table.schema.field(at), pa.array(spoiled))
    pq.write_table(other, tmp_path / "spoiled.parquet")
    config = replace(config, num=2)
    own = found(search.main(config))
    changed = replace(config, traces=tmp_path / "spoiled.parquet", run_dir=tmp_path / "other")
    assert found(search.main(changed))["tried"] == own["tried"]


@pytest.mark.whole
def test_a_search_that_is_killed_goes_on_with_the_same_command(
    config: SearchConfig, tmp_path: Path
) -> None:
    options = ["--traces", config.traces, "--num", "2", "--folds", "2", "--seeds", "1"]
    options += ["--groups", "pace", "confidence", "--run-dir"]

    def command(name: str) -> list[str]:
        argv = ["search.py", *map(str, options), str(tmp_path / name)]
        run = f"sys.argv = {argv}; runpy.run_path('search.py', None, '__main__')"
        return [sys.executable, "-c", ONE_CORE + run]

    with subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"candidate 0 of 2: area ")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not Run(tmp_path / "killed").search_json.exists()
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("candidate 0 of 2" in done.stdout) == (name == "whole")
    killed, whole = (found(tmp_path / name) for name in ("killed", "whole"))
    assert killed | {"command": ""} == whole | {"command": ""}


def test_what_cannot_be_searched_is_refused_and_leaves_nothing(
    config: SearchConfig, tmp_path: Path
) -> None:
    for change, told in (
        ({"num": 0}, "--num is 0, expected at least 1"),
        ({"folds": 1}, "--folds is 1, expected at least 2"),
        ({"groups": ("mood",)}, "--groups: feature groups: found mood"),
        ({"folds": 5}, "14 train and dev questions, expected at least 15"),
        ({"traces": tmp_path / "no.parquet"}, r"no\.parquet"),
    ):
        with pytest.raises(InputError, match=told):
            search.main(replace(config, **change))
    assert not config.run_dir.exists()
    config.run_dir.mkdir()
    with pytest.raises(InputError, match="run holds no search of these settings and traces"):
        search.main(config)
    assert not list(config.run_dir.iterdir())


def test_a_search_without_optuna_says_what_to_install(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "agents.candidates")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"needs optuna: run pip install -e '\.\[search\]'"):
        search.main(config)
    assert not config.run_dir.exists()
