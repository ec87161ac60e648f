"""A scorecard of a run's head, through the script's own `main`."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

import scorecard
import train
from evaluate import EvaluateConfig
from evaluate import main as evaluate
from evaluation.results import Report
from haltwise import HaltHead, InputError
from runs import Learned, Run
from scorecard import ScorecardConfig
from tests.conftest import random_rows
from tests.test_train import SMALL
from traces import write_shard
from train import TrainConfig


@pytest.fixture(scope="module")
def run(random_traces_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorecard") / "run"
    settings = TrainConfig(
        traces=random_traces_path, run_dir=folder, folds=2, seeds=1, fit=SMALL, groups=GROUPS
    )
    return train.main(settings)


GROUPS = ("pace", "confidence", "agreement")


@pytest.mark.whole
def test_a_run_becomes_a_card_that_is_a_run_like_any_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scorecard.main(ScorecardConfig(run, tmp_path / "card", rules=4))
    told = capsys.readouterr().out
    written, old = Run(folder), Run(run)
    assert written.learned() == old.learned()
    cards = written.kept_back(written.learned())
    assert set(cards) == {(0, 0), (0, 1)}
    for head in (written.head(), *cards.values()):
        assert head.weights["b0"].size <= 4
    content = json.loads((folder / "scorecard.json").read_text())
    assert len(content["rules"]) == written.head().weights["b0"].size
    assert 0 < content["decides_as_the_network"] <= 1
    assert list(content["savings_at_em_losses"]) == ["scorecard", "network", "evidence"]
    for rule in content["rules"]:
        assert f"{rule['points']:+d}  {rule['feature_in_words']}" in told
    report = evaluate(EvaluateConfig(head=folder, split="all"))
    assert isinstance(report, Report) and report.num_trainings == 1
    assert "out of fold" in report.judged


@pytest.mark.whole
def test_the_json_is_enough_to_decide_as_the_head_does(run: Path, tmp_path: Path) -> None:
    folder = scorecard.main(ScorecardConfig(run, tmp_path / "card", rules=5))
    head, content = HaltHead.load(folder), json.loads((folder / "scorecard.json").read_text())
    observing = head.config.observing
    rng = np.random.default_rng(0)
    features = rng.normal(observing.mean, observing.scale, (500, len(observing.mean)))
    features[:, head.config.features.index("answered")] = 1
    points = sum(
        rule["points"]
        * (features[:, head.config.features.index(rule["feature"])] >= rule["at_least"])
        for rule in content["rules"]
    )
    for price in (0.1, 0.7, 3.0):
        bar = content["bar_at_price_1"] - content["fall_by_tenfold"] * np.log10(price)
        halts = head.halts(features.astype(np.float32), price)
        assert (halts == (points >= bar)).mean() > 0.99


@pytest.mark.whole
def test_what_has_no_card_is_refused_and_leaves_nothing(
    run: Path, random_traces_path: Path, tmp_path: Path
) -> None:
    config = ScorecardConfig(run, tmp_path / "card")
    with pytest.raises(InputError, match="--rules is 0, expected at least 1"):
        scorecard.main(replace(config, rules=0))
    with pytest.raises(InputError, match=r"no head\.json in .*nowhere"):
        scorecard.main(replace(config, head=tmp_path / "nowhere"))
    write_shard(tmp_path / "other.parquet", random_rows()[:-1], {})
    with pytest.raises(InputError, match=r"other\.parquet: not the traces that .* learned from"):
        scorecard.main(replace(config, traces=tmp_path / "other.parquet"))

    bare = Run(copytree(run, tmp_path / "bare"))
    (bare.folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json names no traces"):
        scorecard.main(replace(config, head=bare.folder))
    bare.save_learned(Learned(bare.learned().questions))
    with pytest.raises(InputError, match="has no heads of folds"):
        scorecard.main(replace(config, head=bare.folder))
    assert not config.run_dir.exists()
    with pytest.raises(InputError, match="run exists: expected a new folder"):
        scorecard.main(replace(config, run_dir=run))
