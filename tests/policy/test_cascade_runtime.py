import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.policy.cascade import Act, Cascade, CascadeConfig, joined, observed_size
from haltwise.policy.question import Question, QuestionReader
from tests.heads import random_head

CONTINUE, HALT, ESCALATE = Act


def cascade_of(head: HaltHead, bias: float, **straight: float) -> Cascade:
    """Escalates with log-odds of a bias and of weights on what is observed, by name."""
    reader = QuestionReader(tasks=("hard", "plain"))
    names = (*head.config.features, *reader.names, "at_start", "at_end", "cut", "price")
    assert len(names) == observed_size(head.config.observing, reader)
    last = [0.0, *(straight.get(name.replace(" ", "_"), 0.0) for name in names)]
    weights = {
        "w0": np.zeros((1, len(names))),
        "b0": np.zeros(1),
        "w1": np.zeros((1, 1)),
        "b1": np.zeros(1),
        "w2": np.array([last]),
        "b2": np.array([bias]),
    }
    config = CascadeConfig(reader, price_ratio=2.0, default_price=1.0)
    return Cascade(head, config, {key: of.astype(np.float32) for key, of in weights.items()})


def features_of(*runs: float) -> np.ndarray:
    features = np.zeros((len(runs), 7), dtype=np.float32)
    features[:, 0] = 1  # there is an answer
    features[:, 1] = np.log1p(runs)
    return features


def asked(cascade: Cascade, *tasks: str) -> np.ndarray:
    return cascade.reader.read([Question(task=task) for task in tasks])


def test_log_odds_by_hand(run_head: HaltHead) -> None:
    cascade = cascade_of(run_head, -1.0, log_run=2.0, task_hard=3.0, at_end=0.5, cut=0.25, price=4)
    of = (features_of(4), asked(cascade, "hard"), 10.0)  # a price of 10 is the end of the range
    run = np.log1p(4) - np.log1p(1.5)
    assert cascade.log_odds(*of)[0] == pytest.approx(-1 + 2 * run + 3 + 4, rel=1e-5)
    at_end = cascade.log_odds(*of, at_end=True, cut=True)[0]
    assert at_end == pytest.approx(-1 + 2 * run + 3 + 4 + 0.75, rel=1e-5)


def test_hidden_layers_by_hand(run_head: HaltHead) -> None:
    cascade = cascade_of(run_head, 0.5)
    weights = cascade.weights | {
        "b0": np.array([1], np.float32),
        "w1": np.array([[2]], np.float32),
        "w2": np.eye(1, 1 + 7 + 2 + 4, dtype=np.float32) * 3,
    }
    cascade = Cascade(run_head, cascade.config, weights)
    expected = 3 * np.tanh(2 * np.tanh(1)) + 0.5
    found = cascade.log_odds(features_of(1), asked(cascade, ""))[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_cascade_that_never_escalates_decides_as_its_head() -> None:
    head = random_head(3)
    cascade = cascade_of(head, -9.0)
    features = np.random.default_rng(0).normal(size=(500, 12)).astype(np.float32)
    features[::50, 3] = np.nan
    for price in (0.0, 0.1, 1.0, 10.0):
        acts = cascade.at_point(features, asked(cascade, *["hard"] * 500), price)
        assert ((acts == HALT) == head.halts(features, price)).all()
        assert not (acts == ESCALATE).any()


def test_what_is_likeliest_is_done(run_head: HaltHead) -> None:
    cascade = cascade_of(run_head, -0.5, task_hard=1.0)
    some = asked(cascade, "plain", "hard", "plain", "hard")
    features = features_of(1, 1, 4, 4)
    # The head's log-odds at a price of 1: about -0.2 at one answer, 0.53 at four.
    acts = cascade.at_point(features, some, 1.0)
    assert acts.tolist() == [CONTINUE, ESCALATE, HALT, HALT]
    # Halted by something else: -0.5 against -0.2, 0.5 against -0.2, and so on.
    assert cascade.at_halt(features, some, 1.0).tolist() == [HALT, ESCALATE, HALT, HALT]
    assert cascade.at_end(features, some, 1.0).tolist() == [HALT, ESCALATE, HALT, ESCALATE]
    assert cascade.at_start(some, 1.0).tolist() == [CONTINUE, ESCALATE, CONTINUE, ESCALATE]


def test_an_answer_that_cannot_be_read_is_not_taken(run_head: HaltHead) -> None:
    features = features_of(4, 4)
    features[0, 0] = 0
    some = asked(cascade_of(run_head, 0.0), "", "")
    assert cascade_of(run_head, -1.0).at_point(features, some, 1.0).tolist() == [CONTINUE, HALT]
    # 0.4 is less than the head's log-odds of halting, 0.53, which do not count in the first row.
    assert cascade_of(run_head, 0.4).at_point(features, some, 1.0).tolist() == [ESCALATE, HALT]


def test_the_threshold_of_the_head_counts(run_head: HaltHead) -> None:
    cautious = HaltHead(replace(run_head.config, threshold=0.6), run_head.weights)
    cascade = cascade_of(cautious, 0.2)
    some = asked(cascade, "", "")
    # At four answers 0.53 less logit(0.6) = 0.41 is 0.12, below 0.2.
    assert cascade.at_point(features_of(4, 4), some, 1.0).tolist() == [ESCALATE, ESCALATE]
    assert cascade_of(cautious, 0.1).at_point(features_of(4, 4), some, 1.0).tolist() == [HALT, HALT]


def test_where_nothing_is_known_it_goes_on_and_the_end_is_judged_by_the_mean(
    run_head: HaltHead,
) -> None:
    cascade = cascade_of(run_head, 1.0)
    unknown = np.full((1, 7), np.nan, dtype=np.float32)
    some = asked(cascade, "hard")
    assert cascade.at_point(unknown, some).tolist() == [CONTINUE]
    assert cascade.at_end(unknown, some).tolist() == [ESCALATE]
    mean = np.array([[0, np.log1p(1.5), 0, 0, 0, 0, 0]], dtype=np.float32)
    both = [cascade.log_odds(of, some, 1.0, at_end=True) for of in (unknown, mean)]
    assert both[0] == both[1]


def test_a_price_of_0_is_the_lowest(run_head: HaltHead) -> None:
    cascade = cascade_of(run_head, 0.0, price=1.0)
    found = cascade.log_odds(features_of(1, 1), asked(cascade, "", ""), np.array([0.0, 0.1]))
    assert found.tolist() == [-1.0, -1.0]


def test_parts_are_joined_in_order() -> None:
    dial = np.array([0.5, -0.5], dtype=np.float32)
    obs = joined(
        np.ones((2, 3), "f4"), np.zeros((2, 1), "f4"), (False, np.array([True, False]), 1), dial
    )
    assert obs.tolist() == [[1, 1, 1, 0, 0, 1, 1, 0.5], [1, 1, 1, 0, 0, 0, 1, -0.5]]


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cascade = cascade_of(random_head(1), 0.5)
    weights = {key: rng.normal(size=of.shape).astype("f4") for key, of in cascade.weights.items()}
    cascade = Cascade(cascade.head, replace(cascade.config, command="made"), weights)
    cascade.save(tmp_path)
    loaded = Cascade.load(tmp_path)
    assert loaded.config == cascade.config and loaded.digest == cascade.digest
    features = rng.normal(size=(20, 12)).astype(np.float32)
    some = asked(cascade, *["hard", "plain"] * 10)
    assert (loaded.log_odds(features, some, 0.7) == cascade.log_odds(features, some, 0.7)).all()
    assert HaltHead.load(tmp_path).digest == cascade.head.digest  # it serves alone, too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "cascade has format 2, this haltwise expects 1"),
        ({"counts": ["log_words"]}, r"cascade has counts \('log_words',\), this haltwise expects"),
        ({"price_ratio": 0}, "price ratio is 0, expected a number above 0"),
        ({"default_price": float("nan")}, "default price is nan, expected a number above 0"),
        ({"more": 1}, r"missing keys \[\], unknown keys \['more'\]"),
        ({"reader": {"tasks": []}, "weights": "0"}, "are not of one cascade"),
        ({"head": "0"}, "cascade.json is for another head than the one beside it"),
        ({"reader": {"kind": []}}, "not a readable cascade"),
    ],
)
def test_another_artifact_is_refused(
    changes: dict[str, object], message: str, run_head: HaltHead, tmp_path: Path
) -> None:
    cascade_of(run_head, 0.0).save(tmp_path)
    path = tmp_path / "cascade.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        Cascade.load(tmp_path)


def test_another_head_beside_it_is_refused(run_head: HaltHead, tmp_path: Path) -> None:
    cascade_of(run_head, 0.0).save(tmp_path)
    HaltHead(replace(run_head.config, threshold=0.6), run_head.weights).save(tmp_path)
    with pytest.raises(InputError, match="for another head"):
        Cascade.load(tmp_path)
    with pytest.raises(InputError, match=r"no cascade.json in .*: expected a folder written by"):
        Cascade.load(tmp_path / "none")


def test_weights_that_do_not_fit_are_refused(run_head: HaltHead) -> None:
    cascade = cascade_of(run_head, 0.0)
    with pytest.raises(InputError, match="cascade has tensors"):
        Cascade(run_head, cascade.config, {})
    with pytest.raises(InputError, match="cascade tensor w0"):
        Cascade(random_head(0), cascade.config, cascade.weights)
