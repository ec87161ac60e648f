"""A question is judged by what never saw it: every step that could leak without being noticed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.calibration
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score

import evaluation.evaluate_run
import train
from agents.fit import CHECKPOINTS, FitConfig, fold_folder, out_of_fold
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from evaluation.protocol import folds
from evaluation.trials import Trials, try_checkpoints
from haltwise import Halting, HeadConfig
from policies.observing import observing_of
from policies.supervised import SUPERVISED, Supervised
from tests.conftest import trace_row
from traces import Traces, read_traces, write_shard

HALTING = Halting("always", "every 50 tokens", "</think>", "source")
SMALL = FitConfig(
    PathwiseConfig(steps=20, batch_size=32),
    PPOConfig(total_timesteps=512, num_envs=16, n_steps=16, batch_size=64, net_width=8),
)
SEED, NUM_FOLDS, BEST = 3, 2, 1
QUESTIONS, POINTS = 100, 4


@dataclass(frozen=True)
class Run:
    """A run of train.py, which evaluates it too, and the supervised baselines that both made."""

    folder: Path
    learned: Traces
    in_train: list[Supervised]
    in_evaluate: list[Supervised]


@pytest.fixture(scope="module")
def finished(random_traces_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its best checkpoint is not the last one."""
    folder = tmp_path_factory.mktemp("leaks") / "run"
    run = Run(folder, read_traces(random_traces_path).of_split("train", "dev"), [], [])

    def recorded(made: list[Supervised]) -> Any:
        def make(*args: Any, **kwargs: Any) -> Supervised:
            made.append(Supervised(*args, **kwargs))
            return made[-1]

        return make

    def second_is_best(*args: Any) -> Trials:
        return replace(try_checkpoints(*args), taken=BEST)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Supervised", recorded(run.in_train))
        patch.setattr(evaluation.evaluate_run, "Supervised", recorded(run.in_evaluate))
        patch.setattr(train, "try_checkpoints", second_is_best)
        train.main(
            train.TrainConfig(
                traces=random_traces_path,
                run_dir=folder,
                folds=NUM_FOLDS,
                seeds=2,
                seed=SEED,
                fit=SMALL,
            )
        )
    return run


def fold_of(traces: Traces, num_folds: int = 5, seed: int = 0) -> dict[str, int]:
    of = folds(traces.question_id, num_folds, seed)
    return dict(zip(traces.question_id.tolist(), of.tolist(), strict=True))


@pytest.mark.whole
def test_supervised_points_are_chosen_out_of_fold(finished: Run) -> None:
    assert [model.name for model in finished.in_train] == list(SUPERVISED)
    for model in finished.in_train:
        assert model.fold == fold_of(finished.learned, NUM_FOLDS, SEED)


@pytest.mark.whole
def test_evaluation_keeps_the_same_questions_back_from_supervised_baselines(finished: Run) -> None:
    assert [model.name for model in finished.in_evaluate] == list(SUPERVISED)
    for model in finished.in_evaluate:
        assert model.fold == fold_of(finished.learned, NUM_FOLDS, SEED)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_kept_heads_are_those_of_the_best_checkpoint(finished: Run) -> None:
    for seed in (SEED, SEED + 1):
        for k in range(NUM_FOLDS):
            checkpoints = fold_folder(finished.folder / "folds", seed, k)
            kept = contents(finished.folder / "kept_back" / f"{seed}-{k}")
            assert kept == contents(checkpoints / str(BEST))
            assert kept != contents(checkpoints / str(len(CHECKPOINTS) - 1))


@pytest.mark.whole
def test_a_fold_s_head_knows_nothing_of_the_questions_that_it_keeps_back(
    random_traces: Traces, tmp_path: Path
) -> None:
    fold = folds(random_traces.question_id, 2)
    config = HeadConfig(observing_of(random_traces, ("confidence",), HALTING), HALTING, 1.0)
    spoiled = random_traces.select(np.arange(len(random_traces)))
    kept_back = fold == 0
    points = kept_back[spoiled.trace_of_point]
    spoiled.correct[points] ^= True
    spoiled.confidence[points] /= 2
    spoiled.final_correct[kept_back] ^= True

    def heads(traces: Traces, cache: Path) -> list[dict[str, bytes]]:
        out_of_fold(traces, {0: fold}, config, SMALL, [1.0], cache)
        last = str(len(CHECKPOINTS) - 1)
        return [contents(fold_folder(cache, 0, k) / last) for k in (0, 1)]

    before, after = heads(random_traces, tmp_path / "before"), heads(spoiled, tmp_path / "after")
    assert after[0] == before[0]
    assert all(after[1][name] != of for name, of in before[1].items())


@pytest.mark.parametrize("name", SUPERVISED)
def test_probabilities_are_calibrated_on_other_questions(
    name: str, random_traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def recorded(*args: Any, cv: Any, **kwargs: Any) -> CalibratedClassifierCV:
        splits.extend(cv)
        return CalibratedClassifierCV(*args, cv=cv, **kwargs)

    monkeypatch.setattr(sklearn.calibration, "CalibratedClassifierCV", recorded)
    config = HeadConfig(observing_of(random_traces, ("confidence",), HALTING), HALTING, 1.0)
    assert Supervised(name, random_traces, {}, config).signal(random_traces) is not None
    question = random_traces.question_id[random_traces.trace_of_point]
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(len(question)))
    for learned, judged in splits:
        assert len(learned) + len(judged) == len(question)
        assert not set(question[learned]) & set(question[judged])


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Hidden states that tell a question, and nothing else; two traces of each, quite alike."""
    rng = np.random.default_rng(0)
    right = rng.random((QUESTIONS, POINTS)) < 0.5
    hidden = rng.normal(size=(QUESTIONS, POINTS, 24))
    rows = [
        trace_row(
            trace_id=f"t{n}",
            question_id=f"q{n // 2}",
            position=[100, 150, 200, 250],
            probe_tokens=[5] * POINTS,
            answer=["7"] * POINTS,
            correct=right[n // 2].tolist(),
            confidence=[0.5] * POINTS,
            answer_logprobs=[[]] * POINTS,
            hidden=hidden[n // 2].tolist(),
        )
        for n in range(2 * QUESTIONS)
    ]
    path = tmp_path_factory.mktemp("noise") / "noise.parquet"
    write_shard(path, rows, {})
    return read_traces(path)


def auc(name: str, traces: Traces, fold: Mapping[str, int]) -> float:
    config = HeadConfig(observing_of(traces, ("hidden",), HALTING), HALTING, 1.0)
    signal = Supervised(name, traces, fold, config).signal(traces)
    return float(roc_auc_score(traces.correct, signal))


@pytest.mark.whole
def test_what_trees_know_by_heart_is_no_better_than_chance_out_of_fold(noise: Traces) -> None:
    """A line has too few weights to know noise by heart, so in sample it need not be ahead.

    By chance it is rather below 0.5: where a fold has more right answers, the others have fewer.
    """
    fold = fold_of(noise)
    assert auc("boosted_trees", noise, {}) > 0.9
    for name in SUPERVISED:
        assert 0.4 < auc(name, noise, fold) < 0.58
