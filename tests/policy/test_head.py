import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from haltwise import FEATURE_GROUPS, HaltHead, Halting, HeadConfig, InputError, Observing
from haltwise.policy.head import told_by
from tests.heads import random_head


def features_of(run: float) -> np.ndarray:
    features = np.zeros((1, 7), dtype=np.float32)
    features[0, 0] = 1  # there is an answer
    features[0, 1] = np.log1p(run)
    return features


def test_log_odds_by_hand(run_head: HaltHead) -> None:
    inner = np.log1p(4) - np.log1p(1.5) + 0.5 * 0  # a price of 1 is the middle of the range
    expected = np.tanh(np.tanh(inner))
    assert run_head.log_odds(features_of(4), 1.0)[0] == pytest.approx(expected, rel=1e-5)
    prob = 1 / (1 + np.exp(-expected))
    assert run_head.prob_halt(features_of(4), 1.0)[0] == pytest.approx(prob, rel=1e-5)


def test_a_higher_price_halts_sooner(run_head: HaltHead) -> None:
    halts = [[run_head.halts(features_of(r), p)[0] for r in (1, 2, 4)] for p in (10, 1, 0.1)]
    assert halts == [[True, True, True], [False, True, True], [False, False, True]]


def test_nothing_is_halted_without_an_answer(run_head: HaltHead) -> None:
    unread = features_of(4)
    unread[0, 0] = 0
    both = np.concatenate([unread, features_of(4)])
    assert run_head.prob_halt(both, 10).tolist()[0] >= 0.5
    assert run_head.halts(both, 10).tolist() == [False, True]
    assert run_head.may_halt(both).tolist() == [False, True]
    blind = random_head(0, groups=("pace",), probing="at_halt")
    assert blind.may_halt(np.zeros((2, 3), dtype=np.float32)).all()


def test_default_price_is_the_heads_own(run_head: HaltHead) -> None:
    assert run_head.log_odds(features_of(3)) == run_head.log_odds(features_of(3), 1.0)


def test_missing_features_never_halt(run_head: HaltHead) -> None:
    assert not run_head.halts(np.full((1, 7), np.nan, dtype=np.float32), 10.0)[0]


def test_observations_are_standardised_clipped_and_end_in_the_price() -> None:
    observing = Observing(("pace",), (1.0, 0.0, 0.0), (2.0, 1.0, 1.0), (0.1, 10.0))
    obs = observing.observe(np.array([[5, 100, -100]], dtype=np.float32), 10.0)
    assert obs.tolist() == [[2.0, 5.0, -5.0, 1.0]]
    assert observing.dial([0.1, 1.0, 1e9]).tolist() == pytest.approx([-1, 0, 5])
    prices = observing.draw_price(np.random.default_rng(0), 1000)
    assert prices.min() >= 0.1 and prices.max() <= 10
    assert np.median(prices) == pytest.approx(1, rel=0.3)


def test_fit_leaves_a_constant_feature_at_zero() -> None:
    features = np.array([[1, 2, 3], [3, 2, 5]], dtype=np.float32)
    observing = Observing.fit(("pace",), features, (0.1, 1.0))
    assert observing.mean == (2, 2, 4) and observing.scale == (1, 1, 1)


def test_a_segment_has_its_own_price(run_head: HaltHead, tmp_path: Path) -> None:
    prices = {"hard": 0.25, "never": 0.0}
    config = replace(run_head.config, segment_prices=prices)
    HaltHead(config, run_head.weights).save(tmp_path)
    loaded = HaltHead.load(tmp_path).config
    assert [loaded.price_of(name) for name in ("hard", "never", "other", None)] == [0.25, 0, 1, 1]
    assert "segment_prices" not in run_head.config.to_json()  # older heads are as they were
    wrong: Any
    for wrong in (-1.0, np.inf, "high"):
        with pytest.raises(InputError, match="price of segment 'hard'"):
            replace(config, segment_prices={"hard": wrong})


def test_the_output_may_look_past_the_hidden_layers(run_head: HaltHead) -> None:
    weights = run_head.weights
    size = run_head.config.observing.size
    straight = np.arange(size, dtype=np.float32)[None]
    both = dict(weights, w2=np.concatenate([weights["w2"], straight], axis=1))
    obs = np.random.default_rng(0).normal(size=(5, size))
    expected = run_head.log_odds_of(obs) + obs @ straight[0]
    assert HaltHead(run_head.config, both).log_odds_of(obs) == pytest.approx(expected)
    with pytest.raises(InputError, match="w2"):
        HaltHead(run_head.config, dict(weights, w2=both["w2"][:, :-1]))


def test_saved_and_loaded_it_is_the_same(run_head: HaltHead, tmp_path: Path) -> None:
    run_head.save(tmp_path)
    loaded = HaltHead.load(tmp_path)
    assert loaded.config == run_head.config
    assert (loaded.log_odds(features_of(2), 0.3) == run_head.log_odds(features_of(2), 0.3)).all()
    assert os.stat(tmp_path / "head.safetensors").st_mode & 0o044  # readable by a server's user


def broken(change: dict[str, Any]) -> Any:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps(data | change))

    return apply


def truncate(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def other_shape(folder: Path) -> None:
    save_file({"w0": np.zeros((2, 2), dtype=np.float32)}, folder / "head.safetensors")


def not_finite(folder: Path) -> None:
    head = HaltHead.load(folder)
    head.weights["b1"][:] = np.nan
    head.save(folder)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (broken({"format": 2}), "format 2, this haltwise expects 1"),
        (broken({"features_version": 9}), "version 9 of feature group 'agreement'"),
        (broken({"features_version": {"agreement": 2}}), "version 2 of feature group 'agreement'"),
        (broken({"features_version": {"pace": 3}}), "version None of feature group 'agreement'"),
        (broken({"features": ["x"]}), "features"),
        (broken({"surprise": 1}), "surprise"),
        (broken({"threshold": 1.5}), "threshold is 1.5"),
        (broken({"default_price": -1}), "default price is -1"),
        (broken({"observing": {}}), "not a readable head"),
        (broken({"halting": {"probing": "now"}}), "not a readable head"),
        (lambda f: (f / "head.json").write_text("{"), "not a readable head"),
        (lambda f: (f / "head.json").unlink(), "no head.json"),
        (lambda f: (f / "head.safetensors").unlink(), "no head.safetensors"),
        (lambda f: (f / "head.json").write_text("[" * 100_000), "not a readable head"),
        (truncate, "not of one head"),
        (other_shape, "not of one head"),
        (not_finite, "not finite"),
    ],
)
def test_damaged_heads_are_refused(
    damage: Any, told: str, run_head: HaltHead, tmp_path: Path
) -> None:
    run_head.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=told):
        HaltHead.load(tmp_path)


def test_files_of_two_heads_are_refused(run_head: HaltHead, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    run_head.save(one)
    HaltHead(run_head.config, {k: w * 2 for k, w in run_head.weights.items()}).save(other)
    shutil.copy(other / "head.safetensors", one)
    with pytest.raises(InputError, match=r"head\.json and head\.safetensors are not of one head"):
        HaltHead.load(one)


def test_a_folder_that_does_not_say_whose_weights_it_has_is_trusted_aloud(
    run_head: HaltHead, tmp_path: Path
) -> None:
    run_head.save(tmp_path)
    data = json.loads((tmp_path / "head.json").read_text())
    del data["weights"]
    (tmp_path / "head.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="does not name its weights"):
        assert HaltHead.load(tmp_path).digest == run_head.digest


def test_a_head_is_never_read_while_it_is_written(run_head: HaltHead, tmp_path: Path) -> None:
    """Two processes save two heads; whatever a third reads is one of them."""
    other = HaltHead(run_head.config, {k: w * 2 for k, w in run_head.weights.items()})
    run_head.save(tmp_path)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_save_often, args=(h, tmp_path)) for h in (run_head, other)]
    for writer in writers:
        writer.start()
    seen = {HaltHead.load(tmp_path).digest for _ in range(200)}
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {run_head.digest, other.digest}
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.safetensors"}


def _save_often(head: HaltHead, folder: Path) -> None:
    for _ in range(50):
        head.save(folder)


def test_a_head_for_another_observation_is_refused(run_head: HaltHead) -> None:
    pace = Observing(("pace",), (0.0,) * 3, (1.0,) * 3, (0.1, 1.0))
    with pytest.raises(InputError, match="w0"):
        HaltHead(HeadConfig(pace, run_head.config.halting, 1.0), run_head.weights)


def test_observing_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="2 means"):
        Observing(("pace",), (0.0,) * 2, (1.0,) * 3, (0.1, 1.0))
    with pytest.raises(InputError, match="price range"):
        Observing(("pace",), (0.0,) * 3, (1.0,) * 3, (1.0, 0.1))


def test_halting_is_checked_against_a_recording() -> None:
    halting = Halting("always", "every 16 tokens", "</think>", "source")
    halting.check_recorded({"decision_rule": "every 16 tokens", "probing": "always"}, "f")
    halting.check_recorded({}, "f")
    for name in ("decision_rule", "close_text", "confidence_rule"):
        with pytest.raises(InputError, match=f"f: {name} is 'other'"):
            halting.check_recorded({name: "other"}, "f")
    with pytest.raises(InputError, match="without probes"):
        halting.check_recorded({"probing": "at_halt"}, "f")


def test_what_was_recorded_otherwise_is_told_with_both_values(
    run_head: HaltHead, tmp_path: Path
) -> None:
    recorder = {"lm": "a", "engine": "hf", "temperature": 0.75, "dtype": "float32", "signals": []}
    recorder |= {"server": {"quantisation": "Q8_0", "build": None}}
    HaltHead(replace(run_head.config, lm="a, b", **told_by(recorder)), run_head.weights).save(
        tmp_path
    )
    config = HaltHead.load(tmp_path).config
    told = "the head learned from other traces: "
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"temperature": 0}, f"{told}temperature 0.75, here 0"),
        (
            {"engine": "vllm", "dtype": "b"},
            f"{told}dtype 'float32', here 'b'; engine 'hf', here 'vllm'",
        ),
        ({"server": {"quantisation": "Q4"}}, f"{told}server quantisation 'Q8_0', here 'Q4'"),
        ({"lm": "b", "signals": ["x"]}, ""),
        (
            {"lm": "c", "dtype": "b", "temperature": 1},
            f"{told}lm 'a, b', here 'c'; temperature 0.75, here 1",
        ),
        ({"installation": "here", "engine": "haltwise serve"}, ""),
    ]
    for now, expected in cases:
        assert config.recorded_otherwise(recorder | now) == expected
    other = {**recorder, "lm": "c", "dtype": "b", "temperature": 1}
    assert config.recorded_otherwise(other, is_same_lm=False) == f"{told}temperature 0.75, here 1"
    # Older heads know nothing, and their files are as they were; nor need the traces tell.
    assert run_head.config.recorded_otherwise(recorder) == config.recorded_otherwise({}) == ""
    assert "recording" not in run_head.config.to_json()


@pytest.mark.parametrize("change", [{"probing": "maybe"}, {"max_answer_tokens": 0}])
def test_halting_refuses_unknown_conditions(change: dict[str, Any]) -> None:
    good: dict[str, Any] = dict(
        probing="always", decision_rule="", close_text="", confidence_rule=""
    )
    with pytest.raises(InputError):
        Halting(**good | change)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("embedded-head", "66ff10e8009a452d287d0f21cb0e231283ac6df72ba1060fb4bee89b175268ae"),
        ("embedded-blind-head", "90efe1ae3d1804d560d15001c999c291a95751a9efc273a2924bb49fd70cd3dc"),
    ],
)
def test_a_shipped_head_is_still_what_was_certified(name: str, digest: str, tmp_path: Path) -> None:
    """Conditions that are newer than a certificate do not change a head that has the usual ones."""
    shipped = Path(__file__).parents[2] / "checkpoints" / name
    head = HaltHead.load(shipped)
    assert head.digest == digest
    cold = head.config.recorded_otherwise({"lm": "embedded", "temperature": 0.0})
    assert cold == "the head learned from other traces: temperature 0.75, here 0.0"
    head.save(tmp_path)
    assert HaltHead.load(tmp_path).digest == digest
    weights = "head.safetensors"
    assert (tmp_path / weights).read_bytes() == (shipped / weights).read_bytes()
    halting = replace(head.config.halting, answer_end="}")
    assert HaltHead(replace(head.config, halting=halting), head.weights).digest != digest


def test_a_new_version_of_a_group_refuses_only_the_heads_that_read_it(
    monkeypatch: pytest.MonkeyPatch, run_head: HaltHead, tmp_path: Path
) -> None:
    run_head.save(tmp_path)
    assert json.loads((tmp_path / "head.json").read_text())["features_version"] == {"agreement": 3}
    older = tmp_path / "older"
    run_head.save(older)
    broken({"features_version": 3})(older)
    monkeypatch.setattr(FEATURE_GROUPS["pace"], "version", 4)
    assert HaltHead.load(tmp_path).config == HaltHead.load(older).config == run_head.config
    monkeypatch.setattr(FEATURE_GROUPS["agreement"], "version", 4)
    for folder in (tmp_path, older):
        with pytest.raises(InputError, match=r"version 3 .* 'agreement', .* expects 4"):
            HaltHead.load(folder)
