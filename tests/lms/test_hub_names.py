"""Names of the hub, and of what is not there."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from haltwise import InputError
from lms.hub_names import ask_hub, is_hub_name, nearby
from lms.language_model import source_of
from lms.sources import DataConfig, open_task


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told of being offline is taken back behind each test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_name_in_a_folder_that_is_there_is_none_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("embedded", "embedded-head", "other", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen3-0.6B") and not is_hub_name("runs/embeded")
    assert nearby("runs/embeded") == "; runs has embedded, embedded-head ..."
    assert nearby("runs/xyz") == "; runs has embedded, embedded-head, other"
    assert (nearby("./x"), nearby("x"), nearby("no/x")) == ("; . has runs", "", "")
    with pytest.raises(InputError, match=r"OWNER/NAME of the hub; runs has embedded, embedded-h"):
        source_of("runs/embeded")
    with pytest.raises(InputError, match=r"OWNER/NAME of the hub; runs has embedded, embedded-h"):
        open_task(DataConfig(task="runs/embeded"))


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(self: HfApi, name: str, **options: object) -> None:
        asked.append((name, options["timeout"]))
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(HfApi, "repo_info", fail)
    told = r"cannot be reached \(no route\), and its cache here has no such LM; expected a f"
    with pytest.raises(InputError, match=told):
        source_of("a/b")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and its cache here has no such"):
        source_of("a/b")
    assert asked == [("a/b", 5.0)]


def test_what_the_hub_does_not_have_is_told_from_a_hub_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    response = SimpleNamespace(headers={}, request=None)

    def none(*args: object, **options: object) -> None:
        raise RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "repo_info", none)
    with pytest.raises(InputError, match="from 'a/b': the hub has no model a/b, or shows it to"):
        source_of("a/b")
    with pytest.raises(InputError, match="from the hub: the hub has no dataset a/b"):
        open_task(DataConfig(task="a/b"))


def test_an_lm_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "models--a--b" / "snapshots" / "c0"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", tmp_path)
    with pytest.raises(InputError, match="no such LM"):
        source_of("a/b")
    commit.mkdir(parents=True)
    (commit / "config.json").touch()
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0")
    assert source_of("a/b") == "a/b"
    assert ask_hub("a/b", "model") == "the hub is not asked, as HF_HUB_OFFLINE is set"
