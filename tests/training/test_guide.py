"""The snippets of docs/TRAINING.md run as they stand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runs import Run
from tests.guides import blocks, commands, run
from tests.training.test_trainer import OPTIMUM, Pull, rows

TRAINER, SB3, LOOP = blocks("TRAINING", "python")


def ran(text: str, **given: Any) -> dict[str, Any]:
    exec(compile(text, "TRAINING", "exec"), given)
    return given


@pytest.mark.whole
def test_the_trainer_of_the_guide_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def is_right(model: nn.Module, question: float) -> bool:
        (weight,) = model.parameters()
        return abs(weight.item() - OPTIMUM) < question

    # A model that learns quickly: the guide's rate is that of LMs.
    text = TRAINER.text.replace("max_steps=2000", "max_steps=2000, learning_rate=0.1, use_cpu=True")
    questions = [3 * (n + 1) / 400 for n in range(400)]
    found = ran(text, model=Pull(), rows=rows(), questions=questions, is_right=is_right)
    assert found["trainer"].state.global_step < 1000
    assert found["stopping"].rule.latest.reason in capsys.readouterr().out
    assert found["returns_of"](found["trainer"].model) == [1.0] * 400


@pytest.mark.whole
def test_the_agent_of_the_guide_stops() -> None:
    rule = ran(SB3.text)["stopping"].rule
    assert rule.is_over and max(rule.curve.means) > 48 and rule.curve.steps[-1] < 100_000


def test_the_loop_of_the_guide_stops() -> None:
    found = ran(LOOP.text)
    # It gains 1/4, 1/8, 1/16 ... with each step; by then the span says nothing more.
    assert found["weight"] == pytest.approx(3 - 3 * 0.5 ** len(found["rule"].curve))
    assert "expected" in found["rule"].latest.reason


@pytest.mark.whole
def test_the_search_of_the_guide_runs(
    random_traces_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces.parquet").symlink_to(random_traces_path)
    (block,) = blocks("TRAINING", "sh")
    quick = {"search.py": "--num 2 --folds 2 --seeds 1 --groups pace confidence"}
    for command in commands(block.text, tmp_path):
        run(command, quick, monkeypatch)
    assert Run(tmp_path / "checkpoints/search").search_page.exists()
