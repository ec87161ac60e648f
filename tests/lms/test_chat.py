"""What is read from a chat template: how an LM is asked, how it thinks, what closes a thought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from lms.chat import Chat, ChatConfig, RecordedChat, detect_chat
from lms.embedded import EMBEDDED
from lms.language_model import LanguageModel
from tests.families import QWEN3_TEMPLATE, byte_tokenizer, instruct_like, qwen3_like, r1_like
from tests.families import base_like as base_like_family

THINK = ("<think>", "</think>")
OPEN = ("", "")

USER = "{%- for m in messages -%}[{{ m.role }}]{{ m.content }}{%- endfor -%}"
ASK = "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"


def chat_of(template: str | None, *markers: str, **stated: Any) -> Chat:
    tokenizer = byte_tokenizer(markers, special=("<s>", "</s>"), eos_token="</s>")
    tokenizer.chat_template = template
    return detect_chat(tokenizer, ChatConfig(**stated))


def markers_of(chat: Chat) -> tuple[str, str]:
    return chat.think_start, chat.think_end


def test_qwen3s_form_shows_its_own_close_mark_and_the_lm_opens_the_thought() -> None:
    tokenizer = qwen3_like().tokenizer
    chat = detect_chat(tokenizer, ChatConfig())
    assert markers_of(chat) == THINK
    assert chat.close_mark == "\n</think>\n\n"
    assert chat.prompt("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.turn_end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "the LM opens it with '<think>' and closes it with '</think>'" in chat.describe()


def test_an_lm_that_is_said_to_reason_in_the_open_is_not_asked_to_think() -> None:
    tokenizer = qwen3_like().tokenizer
    chat = detect_chat(tokenizer, ChatConfig(think_start="", think_end=""))
    assert chat.prompt("hi").endswith("assistant\n<think>\n\n</think>\n\n")
    assert chat.close_mark == "\n\n"


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_r1s_form_drops_thoughts_and_its_prompt_may_open_one(opening: str) -> None:
    tokenizer = r1_like(opening).tokenizer
    chat = detect_chat(tokenizer, ChatConfig())
    assert markers_of(chat) == THINK
    assert chat.close_mark == "\n</think>\n\n"
    assert chat.prompt("hi") == f"<|begin|><|User|>hi<|Assistant|>{opening}"
    assert chat.turn_end == tokenizer.eos_token_id
    assert ("opened by the prompt" in chat.describe()) == bool(opening)


def test_a_plain_instruct_lm_reasons_in_the_open() -> None:
    chat = detect_chat(instruct_like().tokenizer, ChatConfig())
    assert markers_of(chat) == OPEN
    assert chat.close_mark == "\n\n"
    assert chat.prompt(" hi ") == "<s><|turn|>user\nhi<|eot|>\n<|turn|>assistant\n"
    assert "in the open" in chat.describe()


def test_a_base_lm_is_given_the_text_with_what_its_tokenizer_puts_in_front() -> None:
    tokenizer = base_like_family().tokenizer
    chat = detect_chat(tokenizer, ChatConfig())
    assert (markers_of(chat), chat.turn_end) == (OPEN, None)
    assert chat.prompt("hi") == "<s>hi\n"
    assert tokenizer.encode("<s>hi\n", add_special_tokens=False) == tokenizer.encode("hi\n")
    assert chat_of(None).prompt("hi") == "hi\n"
    assert "no chat template" in chat.describe()


def test_the_embedded_lm() -> None:
    chat = LanguageModel.load(EMBEDDED).chat
    assert markers_of(chat) == THINK
    assert chat.close_mark == "</think>"
    assert chat.prompt("sum : 1 + 2") == "sum : 1 + 2 <think>"
    told = chat.describe().splitlines()
    # Whether a task has a cue is no matter of the LM's.
    assert len(told) == 3 and told[2] == "closed by:  '</think>'"


@pytest.mark.parametrize(
    ("template", "added", "expected", "close_mark"),
    [
        # The prompt opens the thought.
        (USER + "{{ '[assistant][THINK]' }}", (), ("[THINK]", "[/THINK]"), "\n[/THINK]\n\n"),
        # The system message tells of both.
        (
            "{{ 'Think as in <|begin_of_thought|> .. <|end_of_thought|>.' }}" + USER + ASK,
            (),
            ("<|begin_of_thought|>", "<|end_of_thought|>"),
            "\n<|end_of_thought|>\n\n",
        ),
        # A thought is shown, by another name and in other words.
        (
            "{%- for m in messages -%}{%- if m.thinking -%}"
            "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|final|>' }}"
            "{%- endif -%}{{ m.content }}{%- endfor -%}",
            (),
            ("<|channel|>analysis<|message|>", "<|end|>"),
            "<|end|><|final|>",
        ),
        # It only strips thoughts, and so do templates of LMs that never think.
        (USER + "{{ ''.split('</think>')[-1] }}" + ASK, THINK, THINK, "\n</think>\n\n"),
        (USER + "{{ ''.split('</think>')[-1] }}" + ASK, (), OPEN, "\n\n"),
        (
            USER + "{{ ''.split('<channel|>')[-1] }}" + ASK,
            ("<|channel>", "<channel|>"),
            ("<|channel>thought", "<channel|>"),
            "\n<channel|>\n\n",
        ),
        # The vocabulary alone says nothing.
        (USER + ASK, THINK, OPEN, "\n\n"),
        # An empty thought keeps the LM from thinking.
        (QWEN3_TEMPLATE.replace("enable_thinking is false", "true"), THINK, OPEN, "\n\n"),
        # The LM thinks only if it is asked to.
        (
            USER + "{{ '<seed:think>' if thinking else '<seed:think></seed:think>' }}",
            (),
            ("<seed:think>", "</seed:think>"),
            "\n</seed:think>\n\n",
        ),
        # Answers of an LM cannot be rendered at all.
        (
            "{%- for m in messages if m.role != 'user' -%}{{ raise_exception('no') }}{%- endfor -%}"
            + USER
            + "<thought>",
            (),
            ("<thought>", "</thought>"),
            "\n</thought>\n\n",
        ),
    ],
)
def test_markers_are_seen_in_what_is_rendered(
    template: str, added: tuple[str, ...], expected: tuple[str, str], close_mark: str
) -> None:
    chat = chat_of(template, *added)
    assert markers_of(chat) == expected
    assert chat.close_mark == close_mark


def test_stated_markers_win() -> None:
    chat = chat_of(QWEN3_TEMPLATE, think_start="<a>", think_end="</a>")
    assert markers_of(chat) == ("<a>", "</a>")
    assert chat.close_mark == "\n</a>\n\n"


def test_a_system_message_comes_first() -> None:
    chat = detect_chat(r1_like().tokenizer, ChatConfig(system="Be brief. "))
    assert chat.prompt("hi") == "<|begin|>Be brief. <|User|>hi<|Assistant|><think>\n"


def test_a_recorded_chat_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "turns").write_text('{"user": "1+1", "assistant": "2"}')
    stated = ChatConfig(system="Be brief. ", examples=tmp_path / "turns")
    asked = detect_chat(r1_like().tokenizer, stated)
    told = {"messages": list(asked.before), "think_start": "<a>", "think_end": "</a>"}
    again = detect_chat(r1_like().tokenizer, RecordedChat.of(told))
    assert again.prompt("hi") == asked.prompt("hi") and "Be brief" in asked.prompt("hi")
    assert (again.think_start, again.think_end) == ("<a>", "</a>")


@pytest.mark.parametrize(
    ("template", "stated", "message"),
    [
        (USER, {"think_start": "<think>"}, "expected both, both empty, or none"),
        (USER, {"think_start": "", "think_end": "</think>"}, "expected both, both empty, or none"),
        (USER, {"think_end": ""}, "expected both, both empty, or none"),
        (
            "{{ messages[-1].content }}",
            {"system": "Be brief"},
            "drops or changes the system message 'Be brief': expected one that it shows as it is",
        ),
        (None, {"system": "Be brief"}, "no chat template: no place for --system or --examples"),
        ("{{ raise_exception('no') }}", {}, "refuses a user message: no"),
        ("{{ 1 / 0 }}", {}, "refuses a user message: division by zero"),
        (
            "{{ messages[-1].content | upper }}",
            {},
            r"changes the user message 'Is 3 < 4\?': exp",
        ),
        ("{{ messages[-1].content | e }}", {}, "drops or changes the user message"),
        ("{{ messages[0].content + 1 }}", {}, "refuses a user message: can only concatenate"),
        (
            "{%- if messages[0].role == 'system' -%}{{ raise_exception('no') }}{%- endif -%}",
            {"system": "Be brief"},
            "refuses a system and a user message: no",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    template: str | None, stated: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        chat_of(template, **stated)


def test_examples_are_lines_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"user": "a\u2028b", "assistant": "c"}\n', encoding="utf-8-sig")
    prompt = chat_of(USER + ASK, examples=path).prompt("?")
    assert prompt == "[user]a\u2028b[assistant]c[user]?[assistant]"
    with pytest.raises(InputError, match="no chat template: no place"):
        chat_of(None, examples=path)
    for content, message in (
        (b"\n", r"examples.jsonl is empty, expected JSON lines"),
        (b"\n{oops\n", r"examples.jsonl, line 2: Expecting .*: expected a JSON object"),
        (b'\n{"user": "a"}\n', r'examples.jsonl, line 2: expected {"user": TEXT, "assistant"'),
        (b'{"user": "a", "assistant": null}', r'examples.jsonl, line 1: expected {"user": TEXT'),
        (b'{"user": "a", "user": "b"}', r"examples.jsonl, line 1: 'user' is there twice"),
        (b"\xff", r"--examples: .*: expected text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            chat_of(USER + ASK, examples=path)
    with pytest.raises(InputError, match=r"--examples: .*nowhere: No such file or directory"):
        chat_of(USER + ASK, examples=tmp_path / "nowhere")
