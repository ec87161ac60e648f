"""A new baseline is one class: the table, the page and the JSON have it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluate import EvaluateConfig
from haltwise import HaltHead
from policies import baselines
from policies.policy import Halts, Signal
from runs import Learned, Run
from traces import Traces


class Toy:
    """Halts at the first point whose number among all points is at least `parameter`."""

    name = "toy"
    title = "toy threshold"
    sentence = "Halts where a toy says so."
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """Number of the point."""
        return np.arange(traces.num_points)

    def grid(self, signal: Signal) -> list[float]:
        """Always, and hardly ever."""
        return [0.0, 100.0]

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Number at least `parameter`."""
        halts: Halts = signal >= parameter
        return halts


@pytest.mark.whole
def test_a_new_baseline_is_in_the_table_the_page_and_the_json(
    run_head: HaltHead, random_traces_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(baselines, "BASELINES", (*baselines.BASELINES, Toy()))
    run = Run(tmp_path / "run")
    run.save_head(run_head)
    run.save_learned(Learned(frozenset({"elsewhere"})))
    run.save_operating_points({0.01: {"head": 1.0, "toy": 0.0}})
    page, content = tmp_path / "out.html", tmp_path / "out.json"
    config = EvaluateConfig(head=run.folder, traces=random_traces_path, json=content, report=page)
    evaluate.main(replace(config, verbose=True))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy")]
    assert line.split()[:3] == ["toy", "*", "0"]  # of the policies with a point, the strongest
    report = json.loads(content.read_text())
    assert [row["parameter"] for row in report["rows"] if row["policy"] == "toy"] == [0.0, 100.0]
    assert [row["parameter"] for row in report["frozen"] if row["policy"] == "toy"] == [0.0]
    assert "The strongest baseline, toy threshold, chosen by the same questions" in page.read_text()
    assert (
        '<th scope="row">toy threshold</th><td>Halts where a toy says so.</td>' in page.read_text()
    )
