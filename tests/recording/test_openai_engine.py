"""Recording from servers: a real llama-server, and fakes of others that misbehave on request."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from haltwise.proxy.dialect import VllmDialect
from haltwise.proxy.generation import _whole, read_generation
from haltwise.proxy.wire import ServedToken, StreamEvent, UpstreamError
from lms.embedded import CLOSE
from lms.gguf import write_gguf
from lms.language_model import LanguageModel
from lms.questions import Question
from recording.collect import CollectConfig, collect, seeded_questions
from recording.config import TaskFormat
from recording.engine import RecordingEngine, open_engine
from recording.hf_engine import HfEngine
from recording.openai_engine import OpenAIEngine
from recording.trace_row import TraceRow
from tests.proxy.fake_upstream import (
    CONTEXT,
    FakeUpstream,
    Kind,
    Plan,
    _Fake,
    listening_socket,
)
from tests.proxy.llama_server import llama_server
from tests.recordings import assert_same, rows_of
from traces import read_traces

ROOT = Path(__file__).parents[2]
SHORT, TEXT = TaskFormat("short", "", "", ""), TaskFormat("text", "", "", "")
SUMS = CollectConfig(task="sum", split=("test",), num=3, temperature=0.0, engine="openai")
LOGPROBS = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "embedded.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[str]:
    with llama_server(gguf, num_slots=1) as found:
        yield found.url


@pytest.mark.whole
def test_one_slot_in_float32_gives_the_tokens_and_numbers_of_transformers(
    server: str, tmp_path: Path
) -> None:
    config = replace(SUMS, base_url=server, out=tmp_path / "served")
    collect(config)
    found = rows_of(config.out)
    hf = HfEngine(replace(SUMS, engine="hf"), SHORT)
    expected = {row["trace_id"]: row for row in hf.record(seeded_questions(config))}
    encode = LanguageModel.load("embedded").tokenizer.encode
    assert found.keys() == expected.keys() and len(found) == 3
    for name, row in found.items():
        other = expected[name]
        del other["end_think_logprob"]  # it would have to be among the likeliest
        texts = (row.pop("text"), other.pop("text").removesuffix("<eos>"))
        assert encode(texts[0]) == encode(texts[1])
        assert row["num_tokens"] == len(encode(texts[0])) + row["finished"]
        assert_same(row, other, 1e-4)


def test_the_recorder_tells_of_the_server(server: str, tmp_path: Path) -> None:
    config = replace(SUMS, base_url=server, out=tmp_path / "served", num=1)
    collect(config)
    recorder = read_traces(tmp_path / "served").recorder
    told = recorder["server"]
    assert (told["kind"], told["model"], told["quantisation"]) == (
        "llama-server",
        "embedded.gguf",
        "all F32",
    )
    assert told["build"] and len(told["template"]) == 16
    assert recorder["signals"] == [*LOGPROBS, "num_reflections"]
    assert (recorder["close_text"], recorder["close_tokens"]) == (CLOSE, 1)
    with pytest.raises(InputError, match=r"was recorded with engine 'openai', not 'hf'"):
        collect(replace(config, engine="hf", base_url=None))
    collect(replace(config, num=2))
    assert len(rows_of(config.out)) == 2


def test_a_close_text_that_the_served_lm_cannot_spell_is_warned_of(server: str) -> None:
    config = replace(SUMS, base_url=server, num=1, close_text="</think> Therefore")
    with closing(open_engine(config, SHORT)) as engine:
        told = engine.self_test(list(seeded_questions(config)), None)
    assert "warning: the tokens of the close text '</think> Therefore' read '</think>" in told
    assert told.endswith("the LM sees another text") or "the LM sees another text\n" in told


def command(url: str, out: Path) -> list[str]:
    """Records eight questions in another process, shard by shard."""
    flags = ["--engine=openai", f"--base-url={url}", "--task=sum", "--split", "test", "--num=8"]
    return [sys.executable, "-u", "collect.py", *flags, f"--out={out}", "--shard-size=1"]


def started(url: str, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(url, out), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_shards(process: subprocess.Popen[str], out: Path, num: int) -> None:
    deadline = time.monotonic() + 600  # a busy machine takes its time
    while len(list(out.glob("*.parquet"))) < num:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.mark.whole
def test_deaths_of_recorder_and_server_change_no_trace(
    gguf: Path, server: str, tmp_path: Path
) -> None:
    whole = replace(SUMS, base_url=server, out=tmp_path / "whole", num=8)
    collect(whole)
    with listening_socket() as free:
        port = free.getsockname()[1]
    out = tmp_path / "killed"
    with llama_server(gguf, 1, port) as first:
        for num in (1, 3):
            with started(first.url, out) as recorder:
                wait_for_shards(recorder, out, num)
                os.kill(recorder.pid, signal.SIGKILL)
        recorder = started(first.url, out)
        wait_for_shards(recorder, out, 5)
        first.kill()
        told = ""
        while "asked again for up to 600 seconds" not in told:
            assert recorder.stdout
            line = recorder.stdout.readline()
            assert line, told
            told += line
    with llama_server(gguf, 1, port):
        told = recorder.communicate()[0]
        assert recorder.returncode == 0, told
    found, expected = rows_of(out), rows_of(whole.out)
    assert found.keys() == expected.keys() and len(found) == 8
    for name, row in found.items():
        assert_same(row, expected[name])


def test_a_server_that_comes_back_as_another_one_ends_the_recording(
    gguf: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.symlink_to(gguf)
    with llama_server(gguf, 1) as first:
        config = replace(SUMS, base_url=first.url)
        engine = open_engine(config, SHORT)
        rows = engine.record(seeded_questions(config))
        next(rows)
        first.kill()
        with (
            llama_server(other, 1, int(first.url.rpartition(":")[2])),
            pytest.raises(InputError, match=r"come back as another server.*'other\.gguf'"),
        ):
            list(rows)
        engine.close()


# Fakes


@pytest.fixture(autouse=True)
def looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes say what their prompt asks them to say."""
    monkeypatch.setattr("recording.openai_engine.ANY_PROMPT", Plan("looked").prompt())


def asked(plan: Plan) -> Question:
    return Question(plan.name, "fake", "", plan.text(), "never", "test", "text")


@contextmanager
def opened(url: str, **settings: Any) -> Iterator[RecordingEngine]:
    """An engine that asks the fake."""
    wanted: dict[str, Any] = {"patience": 0.0, "close_text": "\n</think>\n\n", "every": 8}
    wanted |= {"think_start": "<think>", "think_end": "</think>", "lm": "fake"}
    config = CollectConfig(engine="openai", base_url=url, **wanted | settings)
    with closing(open_engine(config, TEXT)) as engine:
        yield engine


def recorded(url: str, *plans: Plan, **settings: Any) -> list[TraceRow]:
    """The traces of some plans."""
    with opened(url, **settings) as engine:
        return list(engine.record((asked(plan), 0) for plan in plans))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_tokens": CONTEXT}, f"--max-tokens is {CONTEXT:,}, expected at most "),
        ({"max_answer_tokens": CONTEXT}, "take .*: expected a smaller --max-answer-tokens"),
    ],
)
def test_a_budget_that_leaves_no_room_for_a_question_is_refused(
    settings: dict[str, int], told: str
) -> None:
    """Not even one of a token fits in; no bound that is told is below 1."""
    with FakeUpstream("vllm") as fake, pytest.raises(InputError, match=told) as refused:
        recorded(fake.url, Plan("p"), **settings)
    assert f"the LM's context is {CONTEXT:,} tokens" in str(refused.value)
    assert not re.search(r"-\d", str(refused.value))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-server", "ollama", "plain"])
def test_every_kind_of_server_goes_on_from_where_the_thought_is_closed(kind: Kind) -> None:
    plans = [Plan(f"p{i}", thinking=20 + i) for i in range(6)]
    with FakeUpstream(kind, num_slots=4) as fake:
        rows = recorded(fake.url, *plans)
        forced = [one.body for one in fake.of(plans[0]) if one.body["max_tokens"] == 16]
    assert {row["question_id"] for row in rows} == {plan.name for plan in plans}
    for row in rows:
        plan = next(plan for plan in plans if plan.name == row["question_id"])
        # Nobody shows a template for the plain one: there the LM opens its thought itself.
        by_lm = kind == "plain"
        assert row["position"] == [8, 16] + [24] * (plan.thinking + by_lm >= 24)
        for position, answer in zip(row["position"], row["answer"], strict=True):
            assert answer.endswith(f"seen{position - by_lm}é")
        assert row["num_tokens"] == plan.thinking + by_lm + 1 + plan.answer + 1
        assert row["finished"] and row["final_answer"].endswith(f"seen{plan.thinking}é")
        assert row["probe_tokens"] == [plan.answer + 1] * len(row["position"])
        assert all(len(logprobs) == plan.answer for logprobs in row["answer_logprobs"])
    kinds = {type(body["messages"][-1] if kind == "ollama" else body["prompt"]) for body in forced}
    assert kinds == {{"plain": str, "ollama": dict}.get(kind, list)}


def test_prompts_may_be_told_as_tokens_that_have_not_all_of_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = _Fake.decode
    monkeypatch.setattr(_Fake, "decode", lambda fake, ids: decode(fake, ids).replace("Is", "?"))
    with FakeUpstream("vllm") as fake:
        assert len(recorded(fake.url, Plan("p", thinking=20))) == 1


def test_no_more_is_asked_at_once_than_the_server_takes() -> None:
    plans = [Plan(f"p{i}", thinking=20) for i in range(6)]
    with FakeUpstream("llama-server", num_slots=2) as fake:
        recorded(fake.url, *plans)
        slots = {one.body["id_slot"] for plan in plans for one in fake.of(plan)}
    assert slots == {0, 1}


def test_what_the_server_does_not_show_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Plan("few", top="few")
    monkeypatch.setattr("recording.openai_engine.ANY_PROMPT", few.prompt())
    with FakeUpstream("vllm") as fake, opened(fake.url) as engine:
        (row,) = engine.record([(asked(few), 0)])
        told = engine.self_test([(asked(few), 0)], None)
    assert "entropy, max_entropy, margin: 5 of the likeliest tokens are told" in told
    assert {"logprob", "min_logprob", "num_reflections"} <= row.keys()
    assert not {"entropy", "max_entropy", "margin"} & row.keys()


def test_tokens_that_are_only_counted_have_their_place() -> None:
    def chunk(text: str, num: int, finish: str | None = None) -> StreamEvent:
        logprobs = {"content": [{"token": text, "logprob": -1.0, "id": 7}]} if text else None
        choice = {"text": text, "logprobs": logprobs, "finish_reason": finish}
        return StreamEvent(chunk={"choices": [choice], "timings": {"predicted_n": num}})

    async def stream() -> AsyncIterator[StreamEvent]:
        # The globe has four bytes, each in a token of its own.
        for event in (chunk(" a", 1), chunk("\U0001f30d", 5), chunk(" b", 6), chunk("", 7, "stop")):
            yield event

    leg: Any = stream()
    said = asyncio.run(read_generation(leg, 9, lambda _: False))
    assert [token.text for token in said.tokens] == [" a", "", "", "", "\U0001f30d", " b", ""]
    assert [token.is_shown for token in said.tokens] == [True, *[False] * 3, True, True, False]
    assert (said.ended_by_lm, said.num_hidden) == (True, 0)


def test_a_template_that_refuses_a_question_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeUpstream("vllm") as fake, opened(fake.url, patience=600.0) as engine:
        monkeypatch.setattr(VllmDialect, "prompt", refuse)
        with pytest.raises(InputError, match="/apply-template with 500"):
            list(engine.record([(asked(Plan("p")), 0)]))


async def refuse(*_: Any) -> None:
    raise UpstreamError("status", "upstream answered /apply-template with 500", answered=500)


@pytest.mark.parametrize(
    ("finish", "num", "ended"),
    [
        ("stop", 3, True),
        ("eos_token", 3, True),
        ("", 3, True),
        ("", 9, False),
        ("length", 9, False),
    ],
)
def test_servers_have_their_own_words_for_an_end(finish: str, num: int, ended: bool) -> None:
    said = _whole([ServedToken(" a", -1.0)] * num, finish, num, " a", 9)
    assert (said.ended_by_lm, len(said.tokens), said.num_hidden) == (ended, num, 0)
    told = r"gave 8 tokens without an end \('length'\), expected 9"
    with pytest.raises(UpstreamError, match=told):
        _whole([ServedToken(" a", -1.0)] * 8, "length", 8, " a", 9)


@pytest.mark.parametrize(("warmer", "told"), [(0.01, False), (1.0, True)])
def test_numbers_that_hang_on_the_temperature_are_told(
    warmer: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = OpenAIEngine._looked_at

    async def warmed(engine: OpenAIEngine, temperature: float) -> list[ServedToken]:
        first, *others = await looked_at(engine, temperature)
        shift = warmer * (temperature == 0.5)
        return [replace(first, top=[value - shift for value in first.top]), *others]

    monkeypatch.setattr(OpenAIEngine, "_looked_at", warmed)
    with FakeUpstream("vllm") as fake, opened(fake.url, temperature=0.5) as engine:
        (row,) = engine.record([(asked(Plan("p")), 0)])
        report = engine.self_test([(asked(Plan("p")), 0)], None)
    assert ("hang on the temperature" in report) == told
    # The very lines of transformers' self-test, but for what no server tells.
    lines = report.splitlines()
    assert r"""prompt:     '{"name": "p"}\n<|assistant|><think>\n'""" in lines
    assert f"forced:     read as {row['answer'][0]!r}" in lines
    assert f"own answer: {row['final_answer']!r}, gold {asked(Plan('p')).gold!r}" in lines
    ended = f"ended by the LM 100%, right 0%, {row['num_tokens']} tokens on average"
    assert f"1 questions: {ended}" in lines
    assert any(line.startswith("warning: none of 1 full answers is right, such") for line in lines)
    assert f"{len(row['answer'])} forced answers: 100% could be read" in lines


def test_a_trial_that_fails_names_others_as_a_possible_cause() -> None:
    with FakeUpstream("vllm") as fake, opened(fake.url) as engine:
        told = r"upstream broke off its answer; if others ask the server at the same time, they may"
        with pytest.raises(InputError, match=told):
            engine.self_test([(asked(Plan("p", trouble="ends", at=5)), 0)], None)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("p", trouble="500"), "answered with 500: trouble with p$"),
        (Plan("p", trouble="429"), "answered with 429: trouble with p$"),
        (Plan("p", trouble="503"), "answered with 503: trouble with p$"),
        (Plan("p", trouble="400"), "answered with 400: trouble with p$"),
        (Plan("p", trouble="html"), "answered with 200 and no JSON: '<html>not an API</html>'$"),
        (Plan("p", trouble="malformed", at=5), "something that is no JSON object$"),
        (Plan("p", trouble="list", at=5), "something that is no JSON object$"),
        (Plan("p", trouble="says", at=5), "upstream sent an error$"),
        (Plan("p", trouble="dies", at=5), "upstream broke off its answer$"),
        (Plan("p", trouble="ends", at=5), "upstream broke off its answer$"),
        (Plan("p", trouble="500", legs=(2,)), "answered with 500: trouble with p$"),
    ],
    ids=lambda value: value.trouble if isinstance(value, Plan) else "",
)
def test_trouble_ends_in_one_clear_line(plan: Plan, message: str) -> None:
    with FakeUpstream("vllm") as fake, pytest.raises(InputError, match=message) as raised:
        recorded(fake.url, plan)
    assert str(raised.value).startswith(fake.url) and "\n" not in str(raised.value)


def test_a_thought_without_an_end_ends_with_the_budget() -> None:
    with FakeUpstream("vllm") as fake:
        (row,) = recorded(fake.url, Plan("p", trouble="endless"), max_tokens=40)
    assert (row["num_tokens"], row["finished"], row["position"]) == (40, False, [8, 16, 24, 32])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm": "other"}, "has no model 'other': expected --lm fake"),
        ({"api_key_env": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL is not set"),
        ({"url": "ftp://somewhere"}, "expected like http"),
        ({"url": "http://127.0.0.1:9"}, "upstream cannot be reached"),
        ({"think_end": None}, "expected both"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_is_told(settings: dict[str, Any], message: str) -> None:
    with FakeUpstream("vllm") as fake, pytest.raises(InputError, match=message):
        recorded(**{"url": fake.url} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": None}, "expected --engine openai and --base-url, or neither"),
        ({"engine": "hf"}, "expected --engine openai and --base-url, or neither"),
        ({"hidden": True}, "a server shows no hidden states"),
        ({"tensor_parallel": 2}, "expected 1, or --engine vllm"),
        ({"patience": -1.0}, "--patience is -1.0"),
        ({"ray": "local"}, "expected no --ray"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    config = CollectConfig(engine="openai", base_url="http://127.0.0.1:9", out=ROOT / "new")
    with pytest.raises(InputError, match=message):
        replace(config, **settings).check()


def test_servers_that_show_too_little_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_open = {"think_start": "", "think_end": "", "close_text": "so"}
    with FakeUpstream("ollama") as fake, pytest.raises(InputError, match="thoughts apart"):
        recorded(fake.url, Plan("p"), **in_the_open)
    with FakeUpstream("vllm", key="secret") as fake:
        with pytest.raises(InputError, match="401"):
            recorded(fake.url, Plan("p"))
        monkeypatch.setenv("THE_KEY", "secret")
        assert recorded(fake.url, Plan("p"), api_key_env="THE_KEY")
    monkeypatch.setattr("recording.openai_engine.ANY_PROMPT", Plan("looked", top="none").prompt())
    with FakeUpstream("vllm") as fake, pytest.raises(InputError, match="no log probabilities"):
        recorded(fake.url, Plan("p"))


def test_a_server_of_chats_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recording.served_lm.COMPLETIONS", "/v1/nowhere")
    with FakeUpstream("plain") as fake, pytest.raises(InputError, match="not of chats alone"):
        recorded(fake.url, Plan("p"))


@pytest.mark.whole
def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recording.served_lm._FIRST_PAUSE", 0.01)
    with FakeUpstream("vllm") as fake:
        with pytest.raises(InputError, match="answered with 503"):
            recorded(fake.url, Plan("p", trouble="503"), patience=2.0)
        assert len(fake.of(Plan("p"))) > 1
