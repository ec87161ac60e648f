"""The script for a GPU, run on a CPU: that it works, not how fast anything is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import (
    GpuConfig,
    GpuPart,
    GpuSetup,
    main,
    report_json,
    report_table,
    run_parts,
    tiny_setup,
)
from benchmarks.gpu_checks import DeviceCheck, check_bursts, check_head, check_live
from benchmarks.timing import BenchResult
from command import run
from haltwise.engine.decoder import Decoder


def told(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The status of the script with some flags."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", *flags])
    with pytest.raises(SystemExit) as end:
        run(main, GpuConfig)
    return int(end.value.code or 0)


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_REPEATS", 1)
    out = tmp_path / "gpu.json"
    assert told(monkeypatch, "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert (found["skipped"], found["failed"]) == ({}, {})
    assert len(found["checks"]) == 6 and all(check["passed"] for check in found["checks"])
    assert {result["part"] for result in found["results"]} == {
        *("live", "recorder", "overhead", "steps", "ppo")
    }
    named = {result["name"]: result for result in found["results"] if result["part"] == "live"}
    for size in (1, 2, 4):
        label = f"tiny Qwen3, batch {size}: "
        (ratio,) = named[f"{label}live env / generate"]["values"]
        (mine,), (theirs,) = (named[label + name]["values"] for name in ("live env", "generate"))
        assert ratio == pytest.approx(mine / theirs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("overhead  tiny Qwen2, batch 2: slots / slots with a head")
    assert len(lines[lines.index(f"wrote {out}") :]) == 1 + 6 + len(found["results"])


def test_the_live_environment_generates_what_is_counted() -> None:
    setup = tiny_setup("cpu", 60)
    contest = gpu.LMContest("tiny Qwen3", setup)
    # Two episodes in each of two places.
    assert contest._live(2)() == 2 * 2 * setup.num_tokens
    assert contest._record(2)() == 2 * (setup.num_tokens + 1)
    assert contest._decode(2, 8) == contest._generate(2) == 2 * setup.num_tokens
    assert contest._refilled(2, price=1.0) == 4 * setup.num_tokens


@pytest.mark.whole
def test_checks_pass_here() -> None:
    checks = [*check_bursts("cpu"), *check_head("cpu"), *check_live("cpu")]
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 6


@pytest.mark.whole
def test_a_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_NUM_TOKENS", 16)
    take_in = Decoder._take_in

    def careless(decoder: Decoder, slots: Any, tokens: Any) -> Any:
        tokens[: len(tokens) > 1] = 5  # of a burst
        return take_in(decoder, slots, tokens)

    monkeypatch.setattr(Decoder, "_take_in", careless)
    tokens, signals, *_ = check_bursts("cpu")
    assert not tokens.passed and not signals.passed
    in_torch = gpu_checks._in_torch

    def shifted(head: Any) -> Any:
        net: Any = in_torch(head)
        net[0].bias.data += 1.0
        return net

    monkeypatch.setattr(gpu_checks, "_in_torch", shifted)
    assert not check_head("cpu")[0].passed
    assert not DeviceCheck("", float("nan"), 1.0).passed


def test_what_is_missing_late_or_broken_is_told_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking() -> list[BenchResult]:
        raise ModuleNotFoundError("No module named 'gymnasium'")

    def broken() -> list[BenchResult]:
        raise RuntimeError("out of memory\nand more")

    some = [
        GpuPart("missing", 1, lacking),
        GpuPart("long", 1e6, lambda: []),
        GpuPart("broken", 1, broken),
        GpuPart("check", 1, lambda: [DeviceCheck("sums", float("nan"), 1e-3)]),
        GpuPart("sound", 1, lambda: [BenchResult("sound", "this / that", "x", (0.5, 0.7, 0.6))]),
    ]
    monkeypatch.setattr(gpu, "gpu_parts", lambda setup: iter(some))
    setup = GpuSetup("cpu", 100)
    report = run_parts(setup)
    assert report["skipped"]["missing"] == "No module named 'gymnasium'"
    assert report["skipped"]["long"].startswith("no time:")
    assert report["failed"] == {"broken": "RuntimeError: out of memory"}
    found = json.loads(json.dumps(report_json(setup, report), allow_nan=False))
    assert (found["checks"][0]["difference"], found["checks"][0]["passed"]) == (None, False)
    assert found["results"][0]["median"] == 0.6
    assert [line.split()[0] for line in report_table(report).splitlines()] == [
        *("WRONG", "sound", "skipped:", "skipped:", "failed:")
    ]
    capsys.readouterr()
    assert told(monkeypatch, "--out", str(tmp_path / "gpu.json")) == 1


def test_bad_flags_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(monkeypatch, "--out", str(tmp_path / "none" / "gpu.json")) == 2
    assert "no such folder, expected one to write into" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert told(monkeypatch, "--device", "cuda") == 2
    assert "no GPU in reach" in capsys.readouterr().err


def test_questions_are_those_of_the_lm() -> None:
    lm = gpu_checks.small_lm("cpu")
    model: Any = lm.model
    first, second = gpu_checks.some_questions(lm, 2, num_words=3)
    ids = lm.tokenizer.encode(lm.prompt(first.text), add_special_tokens=False)
    assert len(ids) == 4 and ids[-1] == lm.tokenizer.get_vocab()["<think>"]
    assert min(ids[:-1]) >= 5 and first.text != second.text
    assert np.isfinite(model.get_input_embeddings().weight.detach().numpy()).all()
