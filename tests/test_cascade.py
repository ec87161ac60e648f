"""Training a cascade by its script's own `main`, on a made-up population."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade
from agents.cascade import CascadeFitConfig
from agents.pathwise import PathwiseConfig
from cascade import CascadeCommandConfig
from haltwise import InputError
from haltwise.policy.cascade import Cascade
from haltwise.policy.question import Question
from runs import Learned, Run
from tests.heads import random_head
from traces import TraceFiles, write_shard

MakeRow = Callable[..., dict[str, Any]]


def population(make_row: MakeRow, folder: Path, num: int = 120) -> CascadeCommandConfig:
    """Easy questions, which the small LM answers surely and rightly, and hard ones."""
    rng = np.random.default_rng(0)
    small, large = [], []
    for n in range(num):
        easy = bool(rng.random() < 0.6)
        sure = (np.array([0.4, 0.98 if easy else 0.4]) + rng.uniform(-0.02, 0.02, 2)).tolist()
        known = {"trace_id": f"t{n}", "question_id": f"q{n}", "question": f"number {n}"}
        known |= {"split": ("train", "train", "dev", "test", "test")[n % 5]}
        thought = {"position": [50, 100], "probe_tokens": [2, 2], "num_tokens": 150}
        thought |= {"answer": ["3", "7" if easy else "4"], "correct": [False, easy]}
        thought |= {"confidence": sure, "answer_logprobs": [[-0.1], [-0.1]]}
        small.append(make_row(**known, **thought, final_correct=easy))
        place = {"position": [40, 80, 120], "num_tokens": 200}
        large.append(make_row(**known, **place, model="big", final_correct=True))
    write_shard(folder / "small.parquet", small, {"decision_rule": "every 50 tokens"})
    write_shard(folder / "large.parquet", large, {})
    quick = PathwiseConfig(steps=80, prior_questions=10)
    return CascadeCommandConfig(
        small=folder / "small.parquet",
        large=folder / "large.parquet",
        price_ratio=4.0,
        run_dir=folder / "run",
        folds=2,
        fit=CascadeFitConfig(quick, quick, net_width=8),
    )


@pytest.mark.whole
def test_a_run_holds_the_cascade_and_what_it_is_worth(
    make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = population(make_row, tmp_path)
    folder = cascade.main(config)
    told = capsys.readouterr().out
    result = json.loads((folder / "test.json").read_text())
    assert told.splitlines()[-1] == result["verdict"]
    rows = {row["policy"]: row for row in result["rows"] if row["gate"] == 0}
    assert rows["always_large"]["tokens"] == 800 and rows["always_large"]["em"] == 1
    own = rows["cascade"]
    # A halt at the second point costs 104, and the hard ones 800 and what was thought before.
    assert own["em"] == 1 and 104 < own["tokens"] < 0.8 * 800
    assert rows["oracle"]["tokens"] <= own["tokens"]
    ways = {(row["among"], row["chooser"]): row["way"] for row in result["selection"]}
    assert 0.5 < ways["one LM, halted", "cascade"] <= 1 and "network" in told
    assert rows["always_large"]["cheaper_interval"][0] > 0
    loaded = Cascade.load(folder)
    assert loaded.config.price_ratio == 4 and loaded.config.default_price == own["parameter"][0]
    assert loaded.reader.read([Question("number 5", "toy", "easy")]).shape == (1, 3)
    assert Run(folder).learned().questions == {f"q{n}" for n in range(120) if n % 5 < 3}
    with pytest.raises(InputError, match="run exists: expected a new folder"):
        cascade.main(config)


@pytest.mark.whole
def test_given_heads_stay_as_they_are(make_row: MakeRow, tmp_path: Path) -> None:
    config = population(make_row, tmp_path, num=60)
    head = random_head(1)
    files = TraceFiles.open(config.small)
    texts = files.texts(files.rows_of_questions(["q4"]))  # which was learned under another id
    learned = {"own": Learned(frozenset(["q3"])), "big": Learned(frozenset(["x"]), texts=texts)}
    for name, known in learned.items():
        head.save(tmp_path / name)
        Run(tmp_path / name).save_learned(known)
    head = random_head(1)
    halting = replace(head.config.halting, decision_rule="every 50 tokens")
    replace_head = type(head)(replace(head.config, halting=halting), head.weights)
    replace_head.save(tmp_path / "own")
    given = replace(config, head=tmp_path / "own", large_head=tmp_path / "big")
    folder = cascade.main(given)
    loaded = Cascade.load(folder)
    assert loaded.head.digest == replace_head.digest
    assert loaded.config.large_head == head.digest
    result = json.loads((folder / "test.json").read_text())
    assert result["questions"] == 24 - 2  # two of the test questions are known to a head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price_ratio": 0.0}, r"--price-ratio is 0.0, expected a number above 0"),
        ({"price_ratio": float("inf")}, r"--price-ratio is inf, expected a number above 0"),
        ({"folds": 1}, r"--folds is 1, expected at least 2"),
        (
            {"test": "dev set"},
            r"--test is 'dev set', expected one of several splits: 'dev', 'test'",
        ),
        ({"large_model": "lm"}, r"no trace of 'lm', found those of big"),
    ],
)
def test_what_cannot_be_used_is_told_and_nothing_is_written(
    changes: dict[str, Any], message: str, make_row: MakeRow, tmp_path: Path
) -> None:
    config = replace(population(make_row, tmp_path, num=20), **changes)
    with pytest.raises(InputError, match=message):
        cascade.main(config)
    assert not config.run_dir.exists()


def test_one_lm_on_both_sides_is_told(make_row: MakeRow, tmp_path: Path) -> None:
    config = population(make_row, tmp_path, num=20)
    with pytest.raises(InputError, match="lm is on both sides, expected traces of two LMs"):
        cascade.main(replace(config, large=config.small))
