"""Loading LMs: from folders and GGUF files, and what ends what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from haltwise import InputError
from haltwise.engine.token_rules import end_tokens
from lms import gguf_file
from lms.chat import ChatConfig
from lms.embedded import EMBEDDED
from lms.gguf_file import folder_of
from lms.language_model import LanguageModel, LMConfig, check_device, check_name
from recording.weightless import load_weightless
from tests.families import (
    FAMILIES,
    Family,
    byte_tokenizer,
    instruct_like,
    qwen3_like,
    tiny,
    write_gguf,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(instruct_like(), tmp_path / "Tiny-Q8.gguf")


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokens])).logits
    return found


def test_a_gguf_file_is_the_lm_that_it_was_made_from(file: Path, cache: Path) -> None:
    family, lm = instruct_like(), LanguageModel.load(file)
    assert lm.name == "Tiny-Q8"
    prompt = lm.prompt("What is 12 and 30?\n\nThink.")
    assert prompt == "<s><|turn|>user\nWhat is 12 and 30?\n\nThink.<|eot|>\n<|turn|>assistant\n"
    tokens = family.tokenizer.encode(prompt, add_special_tokens=False)
    assert lm.tokenizer.encode(prompt, add_special_tokens=False) == tokens
    torch.testing.assert_close(logits(lm.model, tokens), logits(family.model, tokens))
    ends = ["<|eot|>", "</s>"]
    assert end_tokens(lm.model.generation_config) == family.tokenizer.convert_tokens_to_ids(ends)


def test_a_gguf_file_is_unpacked_once(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LanguageModel.load(file)
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("unpacked again"))
    other = file.rename(file.with_name("other.GGUF"))
    second = LanguageModel.load(str(other))
    assert (second.name, second.revision) == ("other", first.revision)
    assert second.tokenizer.chat_template == first.tokenizer.chat_template
    assert [path.name for path in cache.iterdir()] == [folder_of(other).name]


def test_of_two_that_unpack_a_file_at_once_one_wins(file: Path, cache: Path) -> None:
    folder = folder_of(file)
    gguf_file._write(file, folder)
    assert list(cache.iterdir()) == [folder]


def test_a_killed_unpacking_leaves_nothing_that_would_be_loaded(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedModel, "save_pretrained", kill)
        folder_of(file)
    assert not list(cache.iterdir())
    assert (folder_of(file) / "model.safetensors").exists()


def test_gguf_files_that_cannot_be_read(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"absent.gguf': expected a GGUF file there"):
        LanguageModel.load("absent.gguf")
    damaged = file.with_name("damaged.gguf")
    damaged.write_bytes(b"no" + file.read_bytes()[2:])
    with pytest.raises(InputError, match=r"cannot read the GGUF file .*damaged"):
        LanguageModel.load(damaged)
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[gguf\]' -c constraints.txt in"):
        LanguageModel.load(file)


def test_the_cache_lies_at_home_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALTWISE_CACHE", raising=False)
    assert gguf_file.cache_folder() == Path.home() / ".cache" / "haltwise" / "gguf"


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", ["<|im_end|>", "<|endoftext|>"]),
        ("r1", ["<|end|>"]),
        ("instruct", ["<|eot|>", "</s>"]),
        ("base", ["</s>"]),
    ],
)
def test_all_that_ends_an_answer_is_known(name: str, ends: list[str], tmp_path: Path) -> None:
    lm = LanguageModel.load(FAMILIES[name]().save(tmp_path / name))
    assert lm.name == name
    found = end_tokens(lm.model.generation_config)
    assert found == lm.tokenizer.convert_tokens_to_ids(ends)


@pytest.mark.parametrize("ends", [None, 256])
def test_an_lm_needs_something_that_ends_its_answers(ends: int | None, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(special=("<s>",))
    Family(tiny(LlamaConfig, tokenizer, {}, ends=ends), tokenizer).save(tmp_path / "endless")
    if ends is None:
        with pytest.raises(InputError, match="nothing ends what 'endless' says: expected eos"):
            LanguageModel.load(tmp_path / "endless")
        return
    lm = LanguageModel.load(tmp_path / "endless")
    assert end_tokens(lm.model.generation_config) == [ends]
    assert lm.tokenizer.eos_token_id == ends


def test_what_is_known_of_the_chat_is_used(tmp_path: Path) -> None:
    folder = qwen3_like().save(tmp_path / "lm")
    lm = LanguageModel.load(
        folder, chat=ChatConfig(system="Be brief", think_start="", think_end="")
    )
    assert lm.prompt("hi").startswith("<|im_start|>system\nBe brief<|im_end|>")
    assert lm.chat.think_start == ""


def test_the_embedded_lm_goes_by_its_name() -> None:
    lm = LanguageModel.load("embedded")
    assert (lm.name, lm.revision) == ("embedded", LanguageModel.load(EMBEDDED).revision)
    assert end_tokens(lm.model.generation_config) == [lm.tokenizer.eos_token_id]


def test_lms_and_devices_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load an LM from"):
        LanguageModel.load(tmp_path)
    (tmp_path / "file").touch()
    expected = "expected 'embedded', a folder, a GGUF file, or OWNER/NAME of the hub"
    absent = ("", " ", "./nothing", "../no/thing", "/no/thing", "~/nothing", "no/such/thing")
    for name in (*absent, "embeded", "gpt2", "owner/", "owner/.name", str(tmp_path / "file")):
        with pytest.raises(InputError, match=re.escape(f"from {name!r}: {expected}")):
            check_name(name)
    check_name("Qwen/Qwen3-0.6B")
    with pytest.raises(InputError, match=r"from 'embeded': expected"):
        LanguageModel.load("embeded")
    with pytest.raises(InputError, match="it holds a head, expected the folder of an LM"):
        LanguageModel.load(EMBEDDED.with_name("embedded-head"))
    with pytest.raises(InputError, match="cannot use device 'abacus'"):
        LanguageModel.load("embedded", "abacus")
    with pytest.raises(InputError, match="cannot use device 'meta'"):
        LanguageModel.load("embedded", "meta")
    with pytest.raises(InputError, match="; expected --device cpu, or a build of torch for a dev"):
        check_device("cuda:99")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("generation_config", {"eos_token_id": [[1]]}, r"eos_token_id of 'lm' is \[\[1\]\], expec"),
        ("generation_config", {"temperature": "0.7"}, "temperature of 'lm' is '0.7', expected a"),
        ("generation_config", {"temperature": -1.0}, "temperature of 'lm' is -1.0, expected a num"),
        (
            "config",
            {"num_hidden_layers": 9},
            r"its weights lack model\.layers\..* and \d+ more, ",
        ),
        (
            "config",
            {"vocab_size": 9},
            r"its weights have .* of shape \(.*\), expected \(9, .*as",
        ),
    ],
)
def test_settings_that_do_not_fit_the_lm_are_told(
    tmp_path: Path, file: str, changes: dict[str, Any], told: str
) -> None:
    folder = instruct_like().save(tmp_path / "lm")
    edit(folder / f"{file}.json", do_sample=True, **changes)
    with pytest.raises(InputError, match=told):
        _ = LanguageModel.load(folder).temperature


@pytest.mark.parametrize("content", ["{oops", "", "[1]"])
def test_a_damaged_generation_config_is_told(tmp_path: Path, content: str) -> None:
    folder = instruct_like().save(tmp_path / "lm")
    (folder / "generation_config.json").write_text(content)
    for load in (LanguageModel.load, lambda lm: load_weightless(LMConfig(lm=str(lm)))):
        with pytest.raises(InputError, match=r"generation_config.json: .*: expected an object of"):
            load(folder)


def test_weights_that_are_a_pointer_are_told(tmp_path: Path) -> None:
    folder = instruct_like().save(tmp_path / "lm")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="expected whole weights, no pointer of Git LFS"):
        LanguageModel.load(folder)


def test_a_temperature_of_0_is_greedy_and_tokens_that_cannot_come_end_nothing(
    tmp_path: Path,
) -> None:
    folder = instruct_like().save(tmp_path / "lm")
    known = end_tokens(LanguageModel.load(folder).model.generation_config)
    edit(
        folder / "generation_config.json",
        do_sample=True,
        temperature=0.0,
        eos_token_id=[99_999, -1, None, *known],
    )
    lm = LanguageModel.load(folder)
    assert lm.temperature == 0.0
    assert end_tokens(lm.model.generation_config) == known


def test_an_lm_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = qwen3_like().save(tmp_path / "lm")
    for path in folder.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    told = r"cannot load an LM from .*lm': found no tokenizer, expected its files beside"
    with pytest.raises(InputError, match=told):
        LanguageModel.load(folder)
    with pytest.raises(InputError, match=told):
        load_weightless(LMConfig(lm=str(folder)))
