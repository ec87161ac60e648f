from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from envs.replay import point_features
from haltwise import MEAN_LOGPROB, HaltHead, Halting, HaltMonitor, HeadConfig, Observing, Signals
from haltwise.engine.decoder import Decoder
from haltwise.engine.signal_reducer import MEASURED, SignalReducer, logprobs_of
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.features import FEATURE_GROUPS, feature_names, signals_of
from haltwise.session.thought import ForcedAnswer, Thought
from haltwise.transformers import ProbingGeneration
from lms.language_model import LanguageModel
from lms.questions import Question
from policies.policy import first_halts
from recording.hf_engine import record
from tests.projections import some_projection
from tests.tiny_lm import CLOSE, IDS, WORDS, tiny_lm, tiny_tokenizer
from traces import SIGNALS, read_traces, write_shard

TOKENIZER = tiny_tokenizer()
HALTING = Halting("always", "every 4 tokens", "</think>", MEAN_LOGPROB, 3)
PROMPTS = ["3 . 4 <think>", "5 <think>", "7 so 8 wait 9 <think>", "1 1 1 <think>"]


def logits_of(rows: Sequence[dict[str, float]]) -> Tensor:
    """The rest of the probability is nowhere: impossible tokens."""
    logits = torch.full((len(rows), len(WORDS)), -torch.inf)
    for row, probabilities in zip(logits, rows, strict=True):
        for word, probability in probabilities.items():
            row[IDS[word]] = np.log(probability)
    return logits + 3.0


def meter(signals: Sequence[str], num_rows: int = 2) -> SignalReducer:
    rules = TokenRules(TOKENIZER, HALTING)
    return SignalReducer(rules, signals, num_rows, torch.device("cpu"))


def thought(words: str) -> Thought:
    made = Thought(TokenRules(TOKENIZER, HALTING), "<think>")
    for word in words.split():
        made.add(IDS[word])
    return made


def test_signals_by_hand() -> None:
    measured = meter(MEASURED)
    for _ in range(2):  # what was before a reset leaves no trace
        measured.reset(np.array([1, 0]))
        even, skewed = {"7": 0.5, "8": 0.5}, {"7": 0.5, "8": 0.25, "wait": 0.25}
        tokens = torch.tensor([IDS["7"], IDS["wait"]])
        measured.add(np.array([1, 0]), logits_of([even, skewed]), tokens)
        measured.add(np.array([1]), logits_of([{"7": 0.75, "8": 0.25}]), torch.tensor([IDS["8"]]))
    ending = logits_of([{"7": 0.5, "</think>": 0.5}, {"7": 1.0}])
    hidden = torch.tensor([[0.1, 1e6], [-1e6, 2.0]])
    rules = TokenRules(TOKENIZER, HALTING)
    probes = [rules.read(ForcedAnswer(*a)) for a in (([IDS["7"]], [-0.5, -0.25], 2), ([], [], 1))]
    seen = measured.read(
        np.array([1, 0]), [thought("7 8"), thought("7 7 wait")], ending, hidden, probes
    )
    ln2, ln4 = np.log(2), np.log(4)
    second = 0.75 * np.log(4 / 3) + 0.25 * ln4
    expected: dict[str, Any] = {
        "position": [2, 3],
        "confidence": [np.exp(-0.375), 0],
        "worst_logprob": [-0.5, np.nan],
        "entropy": [(ln2 + second) / 2, 1.5 * ln2],
        "max_entropy": [ln2, 1.5 * ln2],
        "logprob": [-(ln2 + ln4) / 2, -ln4],
        "min_logprob": [-ln4, -ln4],
        "margin": [0.25, 0.25],
        "end_think_logprob": [-ln2, -1e4],
        "num_reflections": [0, 1],
        "hidden": np.array([[0.1, 65504], [-65504, 2]], np.float16),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(seen, name), values, rtol=1e-6, err_msg=name)
    assert seen.answer is not None
    assert seen.answer.astype(bool).tolist() == [True, False]


def test_tokens_that_were_reduced_elsewhere_count_as_those_added_one_by_one() -> None:
    rng, rows = np.random.default_rng(0), np.array([1, 0])
    logits = torch.from_numpy(rng.normal(size=(6, len(WORDS))).astype(np.float32))
    tokens = torch.from_numpy(rng.integers(len(WORDS), size=6))
    whose = np.array([1, 0, 1, 0, 1, 1])
    wanted = ("entropy", "min_logprob", "num_reflections")
    thoughts = [thought(". . wait ."), thought("wait wait")]
    ways = []
    for num_added in (6, 2, 0):
        measured = meter(wanted)
        measured.reset(rows)
        for i in range(num_added):
            measured.add(whose[i : i + 1], logits[i : i + 1], tokens[i : i + 1])
        rest = logprobs_of(logits[num_added:], tokens[num_added:])
        assert rest.shape == (6 - num_added, measured.num_logprobs)
        measured.take(whose[num_added:], rest.numpy())
        ways.append(measured.read(rows, thoughts, logits[:2]))
    for name in wanted:
        for seen in ways[1:]:
            np.testing.assert_array_equal(getattr(seen, name), getattr(ways[0], name))
    assert meter(["num_reflections"]).num_logprobs == 0


def test_a_small_vocabulary_is_filled_up() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found = logprobs_of(logits, torch.tensor([2]), 5).exp()
    np.testing.assert_allclose(found, [[0.25, 0.5, 0.25, 0.25, 0, 0]], atol=1e-6)
    assert logprobs_of(logits, torch.tensor([2]), 0).tolist() == [[pytest.approx(np.log(0.25))]]


def test_only_what_is_wanted_is_measured() -> None:
    for wanted in ({"margin"}, {"num_reflections"}, {"position", "confidence"}, {"hidden"}):
        measured = meter(list(wanted), num_rows=1)
        measured.reset(np.array([0]))
        logits = logits_of([{"7": 1.0}])
        measured.add(np.array([0]), logits, torch.tensor([IDS["7"]]))
        seen = measured.read(np.array([0]), [thought("7")], logits, torch.zeros(1, 2))
        told = {f.name for f in fields(Signals) if getattr(seen, f.name) is not None}
        assert told == {"position"} | wanted & set(MEASURED)


def test_columns_signals_and_groups_have_the_same_names() -> None:
    assert MEASURED == SIGNALS
    assert set(MEASURED) < {field.name for field in fields(Signals)}
    assert signals_of(["pace", "agreement", "pace"]) == ("position", "answer")


def reference(model: Any, prompt: str, text: list[int], start: int) -> dict[str, Any]:
    """The signals of a text at its end, by one pass without a cache and torch's own formulas."""
    ids = TOKENIZER.encode(prompt)
    with torch.no_grad():
        out = model(torch.tensor([ids + text]), output_hidden_states=True)
    drawn_from = torch.distributions.Categorical(logits=out.logits[0, len(ids) + start - 1 : -1])
    logprobs = drawn_from.log_prob(torch.tensor(text[start:]))
    ordered = drawn_from.probs.sort(dim=-1, descending=True).values
    entropy = torch.distributions.Categorical(
        torch.column_stack([ordered[:, :20], ordered[:, 20:].sum(dim=1)])
    ).entropy()
    return {
        "entropy": entropy.mean(),
        "max_entropy": entropy.max(),
        "logprob": logprobs.mean(),
        "min_logprob": logprobs.min(),
        "margin": (ordered[:, 0] - ordered[:, 1]).mean(),
        "end_think_logprob": out.logits[0, -1].log_softmax(dim=-1)[CLOSE],
        "num_reflections": text[start:].count(IDS["wait"]),
        "hidden": out.hidden_states[-1][0, -1],
    }


def recorded(model: Any, temperature: float, rule: str = "every 4 tokens") -> list[dict[str, Any]]:
    """Traces of the prompts, in order."""
    halting = Halting("always", rule, "</think>", MEAN_LOGPROB, 3)
    decoder = Decoder(model, TOKENIZER, halting, 3, 40, temperature, signals=MEASURED)
    asked = [
        Question(str(i), "toy", "", p.removesuffix(" <think>"), "7", "test")
        for i, p in enumerate(PROMPTS)
    ]
    lm = LanguageModel("tiny", model, TOKENIZER)
    rows = record(lm, decoder, [(question, 0) for question in asked])
    return sorted(rows, key=lambda row: str(row["question_id"]))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", ["every 4 tokens", "after 1"])
def test_what_is_recorded_is_the_lms_own(temperature: float, rule: str) -> None:
    model, num_points = tiny_lm(seed=3), 0
    for row in recorded(model, temperature, rule):
        text = TOKENIZER.encode(row["text"])
        for i, position in enumerate(row["position"]):
            start = row["position"][i - 1] if i else 0
            expected = reference(model, f"{row['question']} <think>", text[:position], start)
            for name, value in expected.items():
                tolerance = 1e-3 if name == "hidden" else 1e-5
                np.testing.assert_allclose(row[name][i], value, atol=tolerance, rtol=tolerance)
            num_points += 1
    assert num_points > 4


class Sharpen(LogitsProcessor):
    """Changes the scores in place, but not which is the largest."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.mul_(3)


@pytest.mark.parametrize("processors", [[], [Sharpen()]])
def test_generate_sees_what_is_recorded(
    monkeypatch: pytest.MonkeyPatch, processors: list[LogitsProcessor]
) -> None:
    """Whatever processors do to the scores."""
    monkeypatch.setattr(FEATURE_GROUPS["pace"], "signals", ("position", *MEASURED))
    seen: dict[int, list[dict[str, Any]]] = {row: [] for row in range(len(PROMPTS))}
    observe = HaltMonitor.observe

    def spy(monitor: HaltMonitor, signals: Signals, rows: Any) -> Any:
        for i, row in enumerate(rows.tolist()):
            known = {name: value for name, value in vars(signals).items() if value is not None}
            seen[row].append({name: value[i] for name, value in known.items()})
        return observe(monitor, signals, rows)

    monkeypatch.setattr(HaltMonitor, "observe", spy)
    model = tiny_lm(seed=3)
    inputs = TOKENIZER(PROMPTS, return_tensors="pt", padding=True)
    halter = ProbingGeneration(never_halts(), TOKENIZER)
    model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=False,
        custom_generate=halter,
        logits_processor=LogitsProcessorList(processors),
    )
    for row, trace in enumerate(recorded(model, temperature=0.0)):
        assert [signals["position"] for signals in seen[row]] == trace["position"]
        for i, signals in enumerate(seen[row]):
            for name in ("confidence", *MEASURED):
                tolerance = 1e-3 if name == "hidden" else 1e-5
                np.testing.assert_allclose(signals[name], trace[name][i], atol=tolerance, rtol=1e-5)
            worst: float = min(trace["answer_logprobs"][i], default=np.nan)
            np.testing.assert_allclose(signals["worst_logprob"], worst, atol=1e-5)
    assert sum(map(len, seen.values())) > 8


def test_generate_halts_by_the_hidden_state_as_replay_does(tmp_path: Path) -> None:
    model, groups, projection = tiny_lm(seed=3), ("pace", "hidden"), some_projection(32)
    write_shard(tmp_path / "0.parquet", recorded(model, temperature=0.0), {})
    traces = read_traces(tmp_path / "0.parquet")
    features = point_features(traces, groups, projection=projection)
    observing = Observing.fit(groups, features, (0.1, 1.0), projection)
    shapes = {"w0": (1, 20), "b0": (1,), "w1": (1, 1), "b1": (1,), "w2": (1, 1), "b2": (1,)}
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    # Halts where hidden_0 is larger than its mean.
    weights["w0"][0, 3] = weights["w1"][0, 0] = weights["w2"][0, 0] = 1
    head = HaltHead(HeadConfig(observing, HALTING, default_price=1.0), weights)
    first = first_halts(traces, head.halts(features))
    assert len(set(traces.position[first[first >= 0]])) > 1
    halter = ProbingGeneration(head, TOKENIZER)
    inputs = TOKENIZER(PROMPTS, return_tensors="pt", padding=True)
    model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=halter)
    for row, at in zip(halter.report, first.tolist(), strict=True):
        assert row.halted == (at >= 0)
        assert not row.halted or row.position == traces.position[at]
        assert row.num_bad_signals == 0


def never_halts() -> HaltHead:
    names = feature_names(("pace",))
    observing = Observing(("pace",), (0.0,) * len(names), (1.0,) * len(names), (0.1, 1.0))
    shapes = {"w0": (1, 4), "b0": (1,), "w1": (1, 1), "b1": (1,), "w2": (1, 1), "b2": (1,)}
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    weights["b2"] -= 9
    return HaltHead(HeadConfig(observing, HALTING, default_price=1.0), weights)
