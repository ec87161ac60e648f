from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import dynamic_module_utils

from haltwise import HaltHead, InputError
from haltwise.engine.token_rules import tokenizer_fingerprint
from haltwise.session.request import ThoughtReport
from haltwise.transformers import HaltProcessor, ProbingGeneration, hub
from tests.families import qwen3_like
from tests.tiny_lm import tiny_lm
from tests.transformers.hf_cases import (
    ALWAYS,
    NEVER,
    SAMPLING,
    TOKENIZER,
    blind_head,
    generate,
    head,
)

PRICES = [NEVER, ALWAYS, NEVER]


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers keeps the code that it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def run_repository(model: Any, source: str, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"tokenizer": TOKENIZER, "trust_remote_code": True}
    return generate(model, **defaults | arguments, custom_generate=source)


@pytest.mark.parametrize("policy", [head(), blind_head()], ids=["probing", "blind"])
def test_a_folder_runs_its_head_inside_generate(policy: HaltHead, tmp_path: Path) -> None:
    model, folder = tiny_lm(seed=3), tmp_path / "repository"
    hub.export(policy, folder)
    report: list[ThoughtReport] = []
    out = run_repository(
        model, str(folder), price=PRICES, max_tokens=[None, None, 7], report=report
    )
    looks = policy.config.halting.probing == "always"
    terms: dict[str, Any] = {"price": PRICES, "max_tokens": [None, None, 7]}
    generation = ProbingGeneration(policy, TOKENIZER, **terms)
    looking = HaltProcessor(blind_head(), model, TOKENIZER, **terms)
    own: dict[str, Any] = (
        {"custom_generate": generation} if looks else {"logits_processor": [looking]}
    )
    assert torch.equal(out, generate(model, **own))
    assert report == (generation.report if looks else looking.report)
    assert [row.halted for row in report] == [False, True, True]
    # At the head's own price, and with a processor of the caller's.
    plain = generate(model, repetition_penalty=1.2)
    assert torch.equal(run_repository(model, str(folder), repetition_penalty=1.2), plain)


@pytest.mark.parametrize("policy", [head(), blind_head()], ids=["probing", "blind"])
def test_a_repository_stops_at_strings(policy: HaltHead, tmp_path: Path) -> None:
    family = qwen3_like()
    hub.export(policy, tmp_path)
    inputs = family.tokenizer(["one <think>"], return_tensors="pt")
    stops: dict[str, Any] = {"tokenizer": family.tokenizer, "stop_strings": ["0"]}
    plain = family.model.generate(**inputs, **stops, max_new_tokens=60, do_sample=False)
    assert family.tokenizer.decode(plain[0]).count("0") == 1
    mine = {"custom_generate": str(tmp_path), "trust_remote_code": True, "price": 0}
    out = family.model.generate(**inputs, **stops, **mine, max_new_tokens=60, do_sample=False)
    assert torch.equal(out, plain)


def test_a_repository_of_the_hub_finds_its_own_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((source, revision, allow_patterns))
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.export(blind_head(), tmp_path / "local", "someone/halting")
    blind_head(close="so </think>").save(tmp_path / "downloaded")
    model = tiny_lm(seed=3)
    out = run_repository(model, str(tmp_path / "local"), price=ALWAYS, revision="v2")
    assert asked == [("someone/halting", "v2", ["head.json", "head.safetensors"])]
    assert TOKENIZER.decode(out[1, 10:12]) == "so </think>"
    # Another head by name; here the folder's own.
    out = run_repository(model, str(tmp_path / "local"), price=ALWAYS, head=str(tmp_path / "local"))
    assert TOKENIZER.decode(out[1, 10:11]) == "</think>"
    assert len(asked) == 1


def test_an_lm_whose_generate_is_the_repositorys_runs_it_once(tmp_path: Path) -> None:
    model = tiny_lm(seed=3)
    hub.export(blind_head(), tmp_path)
    sampling: dict[str, Any] = SAMPLING
    expected = []
    for free in (False, True):
        looking = HaltProcessor(blind_head(), model, TOKENIZER, ALWAYS, free_answers=free)
        expected.append(generate(model, **sampling, logits_processor=[looking]))
    assert not torch.equal(*expected)
    # As transformers does with an LM that is kept beside a head.
    model.generate = lambda **arguments: hub.generate(model, str(tmp_path), **arguments)
    terms = sampling | {"tokenizer": TOKENIZER, "price": ALWAYS}
    assert torch.equal(generate(model, **terms), expected[0])
    assert torch.equal(generate(model, **terms, free_answers=True), expected[1])


def test_the_card_tells_what_the_head_is_for(tmp_path: Path) -> None:
    policy = blind_head("every 12 tokens", tokenizer=tokenizer_fingerprint(TOKENIZER))
    hub.export(policy, tmp_path, "someone/halting")
    card = (tmp_path / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert "- custom_generate" in front
    for words in ("someone/halting", "every 12 tokens", policy.config.tokenizer, "not looked at"):
        assert words in body
    code = (tmp_path / "custom_generate" / "generate.py").read_text()
    assert str(tmp_path) not in card + code
    assert (tmp_path / "custom_generate" / "requirements.txt").read_text().startswith("haltwise>=")
    assert hub.load(str(tmp_path)).digest == policy.digest


@pytest.mark.parametrize("repo_id", ["halting", "a/b/c", "/halting", ""])
def test_names_that_are_no_repository_are_refused(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        hub.export(head(), tmp_path, repo_id)


@pytest.mark.parametrize("source", ["halting", "./halting", "../halting", "/no/where", ""])
def test_what_can_be_no_repository_is_not_looked_up(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no (folder, expected one with a head, or O|head\.json)"):
        hub.load(source)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", gone)
    with pytest.raises(InputError, match="'some/head' is no folder and no repository: no network"):
        hub.load("some/head")


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    model = tiny_lm(seed=3)
    hub.export(head(), tmp_path / "probing")
    hub.export(blind_head(tokenizer="0123"), tmp_path / "other")
    with pytest.raises(InputError, match="no tokenizer"):
        run_repository(model, str(tmp_path / "probing"), tokenizer=None)
    with pytest.raises(InputError, match="expected no streamer"):
        run_repository(model, str(tmp_path / "probing"), streamer=object())
    with pytest.raises(InputError, match="the head was trained with 0123"):
        run_repository(model, str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"no head\.json"):
        run_repository(model, str(tmp_path / "probing"), head=str(tmp_path))


def test_the_command_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blind_head().save(tmp_path / "run")
    out, command = tmp_path / "out", ["hub", "--out", str(tmp_path / "out"), "--head"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "run"), "--repo", "someone/halting"])
    hub.main()
    assert hub.load(str(out)).digest == blind_head().digest
    assert "someone/halting" in (out / "README.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        hub.main()
    assert capsys.readouterr().err == f"error: {out} exists: expected a new folder\n"
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        hub.main()
    assert capsys.readouterr().err.startswith("error: no head.json in")
    monkeypatch.setattr(sys, "argv", ["hub", "--head", str(tmp_path / "run"), "--out", __file__])
    with pytest.raises(SystemExit, match="2"):
        hub.main()
    assert "is a file, expected a folder to write" in capsys.readouterr().err
    below = f"{__file__}/out"  # what the system refuses is told without its number
    monkeypatch.setattr(sys, "argv", ["hub", "--head", str(tmp_path / "run"), "--out", below])
    with pytest.raises(SystemExit, match="2"):
        hub.main()
    assert capsys.readouterr().err == f"error: {below}: Not a directory\n"
