"""Decision rules beside each other, by hand, on traces with a point every 50 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import evaluate
from evaluate import EvaluateConfig
from evaluation.rows import LookingRow
from haltwise import HaltHead, InputError
from runs import Learned, Run
from tests.conftest import trace_row
from traces import write_shard

FAR = "every 200 tokens"


@pytest.fixture
def config(run_head: HaltHead, tmp_path: Path) -> EvaluateConfig:
    """Two questions of 600 tokens, whose answers are right from the second of 11 points on."""
    run_head.save(tmp_path / "run")
    run = Run(tmp_path / "run")
    run.save_learned(Learned(frozenset({"elsewhere"})))
    run.save_operating_points({0.0: {"head": 1.0}})
    dense = {
        "position": [50 * (n + 1) for n in range(11)],
        "probe_tokens": [10] * 11,
        "answer": ["3"] + ["7"] * 10,
        "correct": [False] + [True] * 10,
        "confidence": [0.5] * 11,
        "answer_logprobs": [[-0.5]] * 11,
    }
    rows = [trace_row(trace_id=f"t{n}", question_id=f"q{n}", **dense) for n in range(2)]
    write_shard(
        tmp_path / "a.parquet", rows, {"decision_rule": "every 50 tokens", "probing": "always"}
    )
    return EvaluateConfig(head=run.folder, traces=tmp_path / "a.parquet", rule=(FAR,))


def test_rules_by_hand(
    config: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    evaluate.main(EvaluateConfig(**vars(config) | {"json": out}))
    rows = [LookingRow(**row) for row in json.loads(out.read_text())["rules"]]
    close, far = (row for row in rows if row.policy == "head")
    assert (close.rule, close.num_points, far.rule, far.num_points) == (
        "every 50 tokens",
        11,
        FAR,
        2,
    )
    # A run of 2 ends at 150 tokens behind 3 looks of 10, one of 1, which is wrong, at 50 behind 1.
    losses = {"0": 0.0, "0.5": 0.005, "1": 0.01, "2": 0.02, "3": 0.03}
    assert close.savings == pytest.approx({k: 0.7 + 0.2 * loss for k, loss in losses.items()})
    # 200 tokens behind one look, and right.
    assert far.savings == pytest.approx(dict.fromkeys(losses, 0.65))
    assert (close.saving, far.saving) == pytest.approx((0.7026, 0.65))
    assert close.saving_lead == 0 and far.saving_lead == pytest.approx(-0.0526)
    assert far.saving_lead_interval == pytest.approx([-0.0526] * 2)
    assert {row.policy for row in rows} >= {"head", "budget", "confidence", "stability"}
    printed = capsys.readouterr().out
    assert "-5.3 [-5.3, -5.3]" in printed and FAR in printed


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rule": ("every 75 tokens",)}, "'every 75 tokens', but the traces were recorded under"),
        ({"rule": ("now and then",)}, "now and then"),
        ({"rule": (FAR, FAR)}, "has one twice"),
        ({"rule": ("every 50 tokens",)}, "has one twice, the head's own is the first"),
        ({"live": True}, "expected no --beside"),
        ({"plot": Path("out.png")}, "expected no --beside"),
    ],
)
def test_rules_that_cannot_be_compared(
    config: EvaluateConfig, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        evaluate.main(EvaluateConfig(**vars(config) | changes))
