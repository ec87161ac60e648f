from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation.protocol import folds
from haltwise import HaltHead, Halting, HeadConfig, Observing, feature_names
from policies.policy import decisions
from policies.supervised import SUPERVISED, Supervised
from traces import Traces, read_traces, write_shard

MakeTraces = Callable[..., Traces]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """200 traces of 100 questions: an answer is right with the probability it is sure of."""
    from tests.conftest import trace_row

    rng = np.random.default_rng(0)
    rows = []
    for n in range(200):
        confidence = rng.random(4)
        correct = rng.random(4) < confidence
        rows.append(
            trace_row(
                trace_id=f"t{n}",
                question_id=f"q{n % 100}",
                position=[50, 100, 150, 200],
                probe_tokens=[1] * 4,
                answer=["7" if right else "3" for right in correct],
                correct=correct.tolist(),
                confidence=confidence.tolist(),
                answer_logprobs=[[]] * 4,
            )
        )
    path = tmp_path_factory.mktemp("told") / "told.parquet"
    write_shard(path, rows, {})
    return read_traces(path)


@pytest.fixture(scope="module")
def config() -> HeadConfig:
    num = len(feature_names(["confidence"]))
    observing = Observing(("confidence",), (0.0,) * num, (1.0,) * num, (0.1, 10.0))
    return HeadConfig(observing, Halting("always", "every 50 tokens", "</think>", "source"), 1.0)


@pytest.mark.whole
@pytest.mark.parametrize("name", SUPERVISED)
def test_probabilities_are_calibrated_on_questions_that_were_kept_back(
    name: str, told: Traces, config: HeadConfig
) -> None:
    fold = dict(zip(told.question_id.tolist(), folds(told.question_id).tolist(), strict=True))
    signal = Supervised(name, told, fold, config).signal(told)
    assert signal is not None and ((signal >= 0) & (signal <= 1)).all()
    assert roc_auc_score(told.correct, signal) > 0.7  # the best there is has 5 / 6
    assert signal.mean() == pytest.approx(told.correct.mean(), abs=0.03)
    for low, high in ((0.0, 0.4), (0.4, 0.6), (0.6, 1.0)):
        at = (signal >= low) & (signal <= high)
        assert signal[at].mean() == pytest.approx(told.correct[at].mean(), abs=0.1)


def test_a_question_that_was_kept_back_has_no_say_in_its_own_probability(
    told: Traces, config: HeadConfig
) -> None:
    fold = {"q7": 0} | {f"q{n}": 1 for n in range(100) if n != 7}
    own = told.question_id == "q7"
    flipped = told.select(np.arange(len(told)))
    flipped.correct[own[told.trace_of_point]] ^= True

    def signal(learned: Traces, fold: dict[str, int]) -> list[float]:
        found = Supervised("logistic", learned, fold, config).signal(told.select(own))
        assert found is not None
        probabilities: list[float] = found.tolist()
        return probabilities

    assert signal(flipped, fold) == signal(told, fold) != signal(flipped, {})


def test_the_same_traces_give_the_same_model(told: Traces, config: HeadConfig) -> None:
    for name in SUPERVISED:
        first, second = (Supervised(name, told, {}, config).signal(told) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_a_threshold_halts_from_a_probability_on(told: Traces, config: HeadConfig) -> None:
    policy = Supervised("logistic", told, {}, config)
    signal = np.array([0.25, 0.5, 0.75])
    assert policy.halts(signal, 0.5).tolist() == [False, True, True]
    grid = policy.grid(signal)
    assert grid[0] == 0.25 and grid[-1] == pytest.approx(0.75, abs=1e-3) and grid == sorted(grid)
    assert list(decisions(policy, signal)) == grid


def test_too_little_to_learn_from_is_not_available(
    make_traces: MakeTraces, config: HeadConfig, run_head: HaltHead
) -> None:
    right = make_traces([{"correct": [True] * 3} for _ in range(30)])
    assert Supervised("logistic", right, {}, config).signal(right) is None
    few = make_traces([{} for _ in range(9)])
    assert Supervised("boosted_trees", few, {}, config).signal(few) is None
