"""The head beside a running LM does what replaying it says, to the token."""

from pathlib import Path

import numpy as np
import pytest

from envs.reward import halt_costs, never_costs
from evaluation.live import Sampling, answer, run_beside
from haltwise import MEAN_LOGPROB, HaltHead, Halting, HeadConfig, Observing
from haltwise.engine.decoder import Decoder
from lms.language_model import LanguageModel
from lms.questions import Question
from recording.hf_engine import record
from tests.tiny_lm import tiny_lm, tiny_tokenizer
from traces import Traces, read_traces, write_shard

MAX_TOKENS = 40
GREEDY = Sampling(MAX_TOKENS, temperature=0.0)
HALTING = Halting("always", "every 4 tokens", "</think>", MEAN_LOGPROB, max_answer_tokens=2)
ASKED = [
    Question(f"q{i}", "toy", "easy", f"{i} so {i + 1} <think>", str(i), "test") for i in range(12)
]


def price_head() -> HaltHead:
    """Halts at once at a price above 1, never below."""
    observing = Observing(("pace",), (0.0,) * 3, (1.0,) * 3, (0.1, 10.0))
    w0 = np.array([[0, 0, 0, 1]], dtype=np.float32)
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    weights = {"w0": w0, "b0": zero, "w1": one, "b1": zero, "w2": one, "b2": zero}
    return HaltHead(HeadConfig(observing, HALTING, default_price=0.2), weights)


@pytest.fixture
def lm() -> LanguageModel:
    """Random weights, greedy."""
    return LanguageModel("tiny", tiny_lm(seed=2), tiny_tokenizer())


@pytest.fixture
def traces(lm: LanguageModel, tmp_path: Path) -> Traces:
    decoder = Decoder(lm.model, lm.tokenizer, HALTING, 4, MAX_TOKENS, 0.0)
    rows = list(record(lm, decoder, [(question, 0) for question in ASKED]))
    write_shard(tmp_path / "0.parquet", rows, {"max_tokens": MAX_TOKENS, "temperature": 0.0})
    return read_traces(tmp_path)


def in_order(traces: Traces) -> list[Question]:
    by_id = {question.question_id: question for question in ASKED}
    return [by_id[name] for name in traces.question_id.tolist()]


def test_never_halted_it_costs_what_the_trace_says(lm: LanguageModel, traces: Traces) -> None:
    outcome = answer(price_head(), lm, in_order(traces), 0.5, GREEDY)
    assert not outcome.halted.any()
    assert outcome.cost.tolist() == never_costs(traces, "always").tolist()
    assert outcome.em.tolist() == traces.final_correct.tolist()


def test_halted_at_once_it_costs_what_the_trace_says(lm: LanguageModel, traces: Traces) -> None:
    outcome = answer(price_head(), lm, in_order(traces), 2.0, GREEDY)
    has_points = np.diff(traces.offsets) > 0
    first = traces.offsets[:-1][has_points]
    assert outcome.halted.tolist() == has_points.tolist()
    assert has_points.sum() > 5
    assert outcome.cost[has_points].tolist() == halt_costs(traces, "always")[first].tolist()
    assert outcome.em[has_points].tolist() == traces.correct[first].tolist()


def test_a_greedy_lm_leaves_no_difference_to_replay(lm: LanguageModel, traces: Traces) -> None:
    comparison = run_beside(price_head(), lm, ASKED, traces, 2.0)
    assert comparison.num_questions == len(ASKED)
    assert comparison.live_em == comparison.replay_em
    assert comparison.live_saving == comparison.replay_saving
    assert comparison.em_difference == comparison.saving_difference == [0.0, 0.0]
    assert f"{len(ASKED)} questions, price 2" in str(comparison)
