"""The real proxy before a real llama-server, with the embedded LM and a head beside it."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import openai
import pytest
import torch

from haltwise import HaltHead, HaltMonitor, Signals
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.features import signals_of
from haltwise.proxy import ServeConfig
from haltwise.proxy.dialect import LlamaDialect
from haltwise.proxy.probing import AnswerProber
from haltwise.session.thought import Probe, Thought
from lms.embedded import CLOSE, EMBEDDED, prompt_of
from lms.gguf import write_gguf
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import questions
from tests.heads import sure_head
from tests.proxy.fake_upstream import listening_socket
from tests.proxy.llama_server import NAME, NUM_SLOTS, LlamaServer, llama_server
from tests.proxy.proxies import PATIENCE, ROOT, Proxy, proxied, saved_head, wait_until
from tests.proxy.test_large import cascade

ASKED = questions("sum", "test", 4)
MANY = questions("sum", "test", 12)
PRICE = 10.0
SOON, NEVER = {"X-Haltwise-Price": str(PRICE)}, {"X-Haltwise-Price": "1e-9"}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "embedded.gguf"
    write_gguf(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "the following arguments are required: model"),
        ("none.gguf", "none.gguf: no such file"),
        ("README.md few", "argument slots: invalid int value: 'few'"),
        ("README.md 0", "slots is 0, expected 1 or more"),
        ("README.md 4 70000", "port is 70000, expected 0 to 65535"),
        ("README.md 4 {taken}", "cannot listen at port {taken}: Address already in use; end what"),
        ("README.md", "README.md cannot be served, expected a GGUF file of an LM"),
    ],
)
def test_the_command_of_the_guide_tells_what_is_wrong(arguments: str, told: str) -> None:
    with listening_socket() as listener:
        taken = listener.getsockname()[1]
        command = [sys.executable, "tests/proxy/llama_server.py"]
        command += arguments.format(taken=taken).split()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # What llama.cpp says itself, in a thread of its own, may stand anywhere.
    assert done.returncode == 2 and "usage: llama_server.py " in done.stderr
    assert f"\nllama_server.py: error: {told.format(taken=taken)}" in done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shipped = EMBEDDED.parent / "embedded-blind-head"
    if shipped.is_dir():
        return shipped
    return saved_head(tmp_path_factory.mktemp("head"), sure_head(CLOSE, "every 12 tokens"))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(EMBEDDED)


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[LlamaServer]:
    with llama_server(gguf) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(server: LlamaServer, head: Path) -> Iterator[Proxy]:
    with proxied(ServeConfig(head=head, upstream=server.url, most_thoughts=3)) as found:
        yield found


@pytest.fixture(scope="module")
def client(proxy: Proxy) -> openai.OpenAI:
    return openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)


def greedy(lm: LanguageModel, text: str) -> list[int]:
    """The tokens that the LM says after a text, by transformers; the last one ends it."""
    model: Any = lm.model
    ids = torch.tensor([ids_of(lm, text)])
    with torch.inference_mode():
        out = model.generate(ids, do_sample=False, max_new_tokens=900)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens[:-1]


def ids_of(lm: LanguageModel, text: str) -> list[int]:
    ids: list[int] = lm.tokenizer.encode(text, add_special_tokens=False)
    return ids


def text_of(lm: LanguageModel, ids: list[int]) -> str:
    text = lm.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def chat(
    client: openai.OpenAI, question: Question, headers: dict[str, str], temperature: float = 0
) -> tuple[str, str, Any]:
    """Thought, answer and what the proxy tells."""
    stream: Any = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": prompt_of(question).removesuffix("<think>").strip()}],
        temperature=temperature,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=headers,
    )
    chunks = list(stream)
    parts = [choice.delta for chunk in chunks for choice in chunk.choices]
    thought = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
    answer = "".join(part.content or "" for part in parts)
    return thought, answer, getattr(chunks[-1].usage, "haltwise", {})


@pytest.mark.whole
@pytest.mark.parametrize("where", ["start", "point", "end"])
def test_a_large_lm_answers_while_it_lives_and_then_the_small_one(
    where: str, gguf: Path, server: LlamaServer, tmp_path: Path
) -> None:
    """Both servers have the embedded LM here, so that their whole answers are equal."""
    with llama_server(gguf) as large:
        folder = cascade(where, tmp_path / "cascade", sure_head(CLOSE, "every 12 tokens"))
        config = ServeConfig(head=folder, upstream=server.url, large=large.url)
        with proxied(config) as proxy:
            client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
            price = NEVER if where == "end" else {"X-Haltwise-Price": "1"}
            direct = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
            plain = [chat(direct, question, {})[:2] for question in ASKED]
            left = [chat(client, question, price) for question in ASKED]
            large.kill()
            kept = [chat(client, question, price) for question in ASKED]
    for (thought, answer), found in zip(plain, left, strict=True):
        assert found[1] == answer and found[0].endswith(thought)
        assert found[2]["escalated"] == where
        assert found[2]["legs"][-1]["completion_tokens"] >= 20
    assert [found[:2] for found in kept] == plain
    assert {found[2]["fallback"] for found in kept} == {"large LM"}


def is_number(lm: LanguageModel, answer: str) -> bool:
    return answer.strip().isdigit() and len(ids_of(lm, answer)) == 1


@pytest.mark.whole
def test_chats_are_halted_by_reasoning_control(
    client: openai.OpenAI, lm: LanguageModel, head: Path
) -> None:
    num_saved = 0
    for question in ASKED:
        whole, answer, told = chat(client, question, NEVER)
        own = ids_of(lm, whole + CLOSE + answer)
        assert own == greedy(lm, prompt_of(question))
        assert not told["halted"] and told["reason"] == "closed by the LM"
        thought, answer, told = chat(client, question, SOON)
        assert told["halted"] and told["position"] == halting_point(lm, head, question, own)
        # Some tokens may come before the server has heard that the thought is to end.
        assert whole.startswith(thought) and len(ids_of(lm, thought)) >= told["position"]
        assert ids_of(lm, answer) == greedy(lm, prompt_of(question) + thought + CLOSE)
        assert is_number(lm, answer)
        num_saved += len(ids_of(lm, whole)) - len(ids_of(lm, thought))
    assert num_saved > 0


def halting_point(lm: LanguageModel, head: Path, question: Question, own: list[int]) -> int:
    """Where the head halts the LM's own tokens, by transformers' logits."""
    loaded = HaltHead.load(head)
    monitor, row = HaltMonitor(loaded, 1, PRICE), np.zeros(1, dtype=np.int64)
    points = measured(lm, loaded, prompt_of(question), own)
    return next(int(seen.position[0]) for seen in points if monitor.observe(seen, row)[0])


@pytest.mark.whole
@pytest.mark.parametrize("question", ASKED, ids=lambda question: question.question_id)
def test_a_completion_is_halted_by_going_on_from_a_closed_thought(
    client: openai.OpenAI, lm: LanguageModel, head: Path, question: Question
) -> None:
    def ask(headers: dict[str, str]) -> Any:
        return client.completions.create(
            model=NAME, prompt=prompt_of(question), temperature=0, extra_headers=headers
        )

    whole = ask(NEVER).choices[0].text
    own = ids_of(lm, whole)
    assert own == greedy(lm, prompt_of(question))
    done = ask(SOON)
    thought, _, answer = done.choices[0].text.partition(CLOSE)
    told = done.usage.haltwise
    assert told["halted"] and len(told["legs"]) == 2
    assert whole.startswith(thought) and len(ids_of(lm, thought)) == told["position"]
    assert told["position"] == halting_point(lm, head, question, own)
    assert ids_of(lm, answer) == greedy(lm, prompt_of(question) + thought + CLOSE)
    assert is_number(lm, answer)
    num_prompt = [len(ids_of(lm, prompt_of(question) + more)) for more in ("", thought + CLOSE)]
    assert [leg["prompt_tokens"] for leg in told["legs"]] == num_prompt
    assert done.usage.total_tokens == sum(sum(leg.values()) for leg in told["legs"])


def completed(
    client: openai.OpenAI, question: Question, headers: dict[str, str], temperature: float = 0
) -> tuple[str, str, Any]:
    """As `chat`, of a completion."""
    prompt = prompt_of(question)
    done: Any = client.completions.create(
        model=NAME, prompt=prompt, temperature=temperature, extra_headers=headers
    )
    thought, _, answer = done.choices[0].text.partition(CLOSE)
    return thought, answer, done.usage.haltwise


WAYS = pytest.mark.parametrize("ask", [chat, completed])


@WAYS
def test_behind_a_halted_thought_that_is_sampled_the_likeliest_answer_follows(
    client: openai.OpenAI, lm: LanguageModel, ask: Any
) -> None:
    for question in MANY:
        thought, answer, told = ask(client, question, SOON, temperature=1.5)
        closed = prompt_of(question) + thought + CLOSE
        assert not told["halted"] or ids_of(lm, answer) == greedy(lm, closed)


@pytest.mark.whole
@WAYS
def test_a_head_that_looks_at_answers_halts_where_its_replay_does(
    server: LlamaServer, lm: LanguageModel, tmp_path: Path, ask: Any
) -> None:
    policy = sure_head(CLOSE, "every 12 tokens", probing="always")
    config = ServeConfig(saved_head(tmp_path, policy), server.url, probe_beside=True)
    with proxied(config) as proxy:
        client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
        for question in ASKED[:2]:
            thought, answer, told = ask(client, question, SOON)
            own = greedy(lm, prompt_of(question))
            seen = ids_of(lm, thought)
            assert own[: len(seen)] == seen and told["halted"]
            position = next(points_of(policy, lm, question, own))
            # Where a probe is on its way, the points are passed.
            assert told["position"] % 12 == 0 and told["position"] >= position
            assert len(seen) >= told["position"]
            at_point = prompt_of(question) + text_of(lm, own[: told["position"]]) + CLOSE
            assert ids_of(lm, answer) == greedy(lm, at_point) and is_number(lm, answer)
            probes = told["probes"]
            assert probes["failed"] == 0 and 1 <= probes["num"] <= told["position"] // 12
            assert probes["completion_tokens"] >= 2 * probes["num"]


@pytest.fixture(scope="module")
def one_slot(gguf: Path) -> Iterator[LlamaServer]:
    with llama_server(gguf, num_slots=1) as found:
        yield found


@pytest.fixture(scope="module")
def in_turn(one_slot: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    policy = sure_head(CLOSE, "every 12 tokens", probing="always")
    folder = saved_head(tmp_path_factory.mktemp("in turn"), policy)
    config = ServeConfig(folder, one_slot.url, probe_timeout=PATIENCE, most_thoughts=3)
    with proxied(config) as found:
        yield found


@pytest.fixture(scope="module")
def turned(in_turn: Proxy) -> openai.OpenAI:
    return openai.OpenAI(base_url=in_turn.url + "/v1", api_key="any", max_retries=0)


@pytest.mark.whole
@WAYS
def test_a_thought_in_turns_has_the_tokens_of_one_stream(
    turned: openai.OpenAI, one_slot: LlamaServer, lm: LanguageModel, ask: Any
) -> None:
    direct = openai.OpenAI(base_url=one_slot.url + "/v1", api_key="any", max_retries=0)
    for question in ASKED:
        thought, answer, told = ask(turned, question, NEVER)
        own = greedy(lm, prompt_of(question))
        assert ids_of(lm, thought + CLOSE + answer) == own
        if ask is chat:
            assert (thought, answer) == chat(direct, question, {})[:2]
        assert not told["halted"] and told["probes"]["num"] == (told["position"] - 1) // 12
        num_tokens = len(own) + 1  # the end is one
        assert told["turns"] == (num_tokens - 1) // 12 + 1
        (leg,) = told["legs"]
        num_prompt = len(ids_of(lm, prompt_of(question)))
        assert (leg["prompt_tokens"], leg["completion_tokens"]) == (num_prompt, num_tokens)


@pytest.mark.parametrize("in_chat", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize("served", ["client", "turned"])
def test_of_three_sampled_thoughts_no_third_begins_where_two_agree(
    request: pytest.FixtureRequest, lm: LanguageModel, served: str, in_chat: bool
) -> None:
    """The head looks at answers in one of both, whose thoughts come in turns."""
    client, headers = request.getfixturevalue(served), SOON | {"X-Haltwise-Thoughts": "3"}
    more: Any = {"model": NAME, "temperature": 1.5, "seed": 3, "extra_headers": headers}
    for question in ASKED:
        prompt = prompt_of(question)
        if in_chat:
            said = prompt.removesuffix("<think>").strip()
            messages = [{"role": "user", "content": said}]
            done = client.chat.completions.create(messages=messages, **more)
            answer = done.choices[0].message.content
        else:
            done = client.completions.create(prompt=prompt, **more)
            answer = done.choices[0].text.partition("</think>")[2]
        told = done.usage.haltwise
        votes = [thought["votes"] for thought in told["thoughts"]]
        agree = [[2, 2]] if len(votes) == 2 else [[1, 1, 1], [2, 1, 2], [1, 2, 2]]
        assert votes in agree or 0 in votes  # of an answer that nobody can read
        assert max(votes) == votes[told["given"]] and "failed" not in told
        assert votes[told["given"]] or not is_number(lm, answer)
        num_thought = sum(thought["position"] for thought in told["thoughts"])
        assert done.usage.completion_tokens > num_thought


def num_computed(server: LlamaServer) -> int:
    """Tokens of prompts that a server has computed, its cache aside."""
    with urlopen(server.url + "/metrics") as told:
        lines = told.read().decode().splitlines()
    return int(
        next(line for line in lines if line.startswith("llamacpp:prompt_tokens_total")).split()[1]
    )


def test_a_slot_computes_only_what_is_new_to_it(
    turned: openai.OpenAI, one_slot: LlamaServer, lm: LanguageModel
) -> None:
    before = num_computed(one_slot)
    _, _, told = completed(turned, ASKED[0], NEVER)
    # Of a probe the close text and the token before it, of a turn the thought's newest token.
    expected = len(ids_of(lm, prompt_of(ASKED[0]))) + 2 * told["probes"]["num"] + told["turns"]
    assert 0 < num_computed(one_slot) - before <= expected


def test_a_closed_thought_goes_on_in_the_slot_that_has_computed_it(
    client: openai.OpenAI, server: LlamaServer, lm: LanguageModel
) -> None:
    """With several slots the first request is left, and its slot has to be free again."""
    before = num_computed(server)
    thought, _, told = completed(client, ASKED[0], SOON)
    first, second = told["legs"]
    assert told["halted"] and len(ids_of(lm, thought)) == told["position"]
    # Of the second leg the close text, and a token or two that the server had written by then.
    num_new = num_computed(server) - before - first["prompt_tokens"]
    assert second["prompt_tokens"] > 20 and num_new <= 4


@pytest.mark.whole
def test_thoughts_in_turns_are_not_computed_anew_beside_each_other(
    server: LlamaServer, lm: LanguageModel, tmp_path: Path
) -> None:
    """As many streams as half of the slots, each the next one as soon as it has an answer."""
    head = saved_head(tmp_path, sure_head(CLOSE, "every 12 tokens", probing="always"))
    config = ServeConfig(head, server.url, probe_timeout=PATIENCE)
    with proxied(config) as proxy, ThreadPoolExecutor(NUM_SLOTS // 2) as streams:
        client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
        before = num_computed(server)
        told = [found[2] for found in streams.map(lambda one: completed(client, one, NEVER), MANY)]
    prompts = sum(len(ids_of(lm, prompt_of(question))) for question in MANY)
    turns = sum(2 * one["probes"]["num"] + one["turns"] for one in told)
    assert 0 < num_computed(server) - before <= prompts + turns


@pytest.mark.whole
@WAYS
def test_in_turn_a_thought_is_halted_exactly_where_its_replay_is(
    turned: openai.OpenAI, lm: LanguageModel, ask: Any
) -> None:
    policy = sure_head(CLOSE, "every 12 tokens", probing="always")
    for question in ASKED:
        thought, answer, told = ask(turned, question, SOON)
        own = greedy(lm, prompt_of(question))
        position = next(points_of(policy, lm, question, own))
        assert told["halted"] and told["position"] == position
        assert ids_of(lm, thought) == own[:position]
        assert ids_of(lm, answer) == greedy(lm, prompt_of(question) + thought + CLOSE)
        assert told["probes"]["num"] == told.get("turns", 1) == position // 12
        assert [leg["completion_tokens"] for leg in told["legs"]] == [position]


def test_an_answer_that_the_server_ends_has_the_tokens_of_one_that_its_client_leaves(
    one_slot: LlamaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = sure_head(CLOSE, "every 12 tokens", probing="always")
    halting = replace(policy.config.halting, answer_end="1")
    policy = HaltHead(replace(policy.config, halting=halting), policy.weights)
    config = ServeConfig(saved_head(tmp_path, policy), one_slot.url, probe_timeout=PATIENCE)
    taken, seen = AnswerProber.take, list[Probe]()

    def noted(prober: AnswerProber) -> Probe | None:
        probe = taken(prober)
        assert probe is not None
        seen.append(probe)
        return probe

    monkeypatch.setattr(AnswerProber, "take", noted)
    with proxied(config) as proxy:
        client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
        for question in ASKED[:2]:
            completed(client, question, NEVER)
        ended = seen.copy()
        seen.clear()
        monkeypatch.setattr(LlamaDialect, "ended_by", lambda *_: {})
        for question in ASKED[:2]:
            completed(client, question, NEVER)
    assert len(ended) == len(seen) > 4 and any("1" in probe.text for probe in ended)
    for one, other in zip(ended, seen, strict=True):
        assert (one.tokens, one.num_tokens) == (other.tokens, other.num_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_client_that_leaves_leaves_the_slot_free(in_turn: Proxy, one_slot: LlamaServer) -> None:
    body = {"prompt": prompt_of(ASKED[0]), "max_tokens": 900, "stream": True, "temperature": 0}
    with in_turn.client.stream("POST", "/v1/completions", json=body, headers=NEVER) as reply:
        next(reply.iter_raw())
    wait_until(lambda: in_turn.metric("haltwise_streams_in_flight") == 0)
    wait_until(lambda: not one_slot.get("/slots")[0]["is_processing"])


def points_of(
    policy: HaltHead, lm: LanguageModel, question: Question, own: list[int]
) -> Iterator[int]:
    """Positions at which a head halts the LM's own tokens if every answer is surely known."""
    monitor, row = HaltMonitor(policy, 1, PRICE), np.zeros(1, dtype=np.int64)
    names = [name for name in policy.config.observing.groups if name != "confidence"]
    blind = sure_head(CLOSE, "every 12 tokens")
    assert list(blind.config.observing.groups) == names
    for seen in measured(lm, blind, prompt_of(question), own):
        sure = replace(seen, confidence=np.ones(1, dtype=np.float32))
        if monitor.observe(sure, row)[0]:
            yield int(seen.position[0])


def test_a_cap_holds_to_the_token(client: openai.OpenAI, lm: LanguageModel) -> None:
    done: Any = client.completions.create(
        model=NAME,
        prompt=prompt_of(ASKED[0]),
        temperature=0,
        extra_headers={"X-Haltwise-Price": "0", "X-Haltwise-Max-Tokens": "17"},
    )
    thought, _, _ = done.choices[0].text.partition(CLOSE)
    assert len(ids_of(lm, thought)) == done.usage.haltwise["position"] == 17


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_cap_holds_to_the_token_in_a_response(
    client: openai.OpenAI, lm: LanguageModel, stream: bool
) -> None:
    question = prompt_of(ASKED[0]).removesuffix("<think>").strip()
    made: Any = client.responses.create(
        model=NAME,
        input=question,
        temperature=0,
        stream=stream,
        extra_headers={"X-Haltwise-Max-Tokens": "17"},
    )
    if stream:
        made = list(made)[-1].response
    thought, answer = (item.content[0].text for item in made.output)
    assert len(ids_of(lm, thought)) == 17 + len(ids_of(lm, CLOSE.partition("</think>")[0]))
    assert made.status == "completed" and is_number(lm, answer)


@pytest.mark.parametrize("in_chat", [True, False], ids=["chat", "completions"])
def test_the_proxy_sees_the_signals_that_the_head_was_trained_on(
    client: openai.OpenAI,
    lm: LanguageModel,
    head: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_chat: bool,
) -> None:
    seen: list[Signals] = []
    observe = HaltMonitor.observe

    def spy(monitor: HaltMonitor, signals: Signals, rows: Any) -> Any:
        seen.append(signals)
        return observe(monitor, signals, rows)

    for question in ASKED[:3]:
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(HaltMonitor, "observe", spy)
            if in_chat:
                thought, answer, _ = chat(client, question, NEVER)
                text = thought + CLOSE + answer
            else:
                done = client.completions.create(
                    model=NAME, prompt=prompt_of(question), temperature=0, extra_headers=NEVER
                )
                text = done.choices[0].text
        expected = measured(lm, HaltHead.load(head), prompt_of(question), ids_of(lm, text))
        assert len(seen) == len(expected) > 2
        for found, wanted in zip(seen, expected, strict=True):
            for name, value in vars(wanted).items():
                if value is not None:
                    np.testing.assert_allclose(getattr(found, name), value, atol=1e-3, rtol=0)


def measured(lm: LanguageModel, head: HaltHead, prompt: str, own: list[int]) -> list[Signals]:
    """The signals at each decision point of some tokens, by transformers' logits."""
    rules = TokenRules(lm.tokenizer, head.config.halting)
    names = signals_of(head.config.observing.groups)
    meter, thought = SignalReducer(rules, names, 1, lm.model.device), Thought(rules, prompt)
    row = np.zeros(1, dtype=np.int64)
    before = ids_of(lm, prompt)
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([before + own])).logits[0, len(before) - 1 :]
    found = []
    for i, token in enumerate(own):
        meter.add(row, logits[i : i + 1], torch.tensor([token]))
        thought.add(token)
        if thought.at_point:
            found.append(meter.read(row, [thought], logits[i + 1 : i + 2]))
            meter.reset(row)
    return found


@pytest.mark.whole
def test_a_server_that_dies_between_two_turns_is_a_clean_error(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = saved_head(tmp_path, sure_head(CLOSE, "every 12 tokens", probing="always"))
    taken = AnswerProber.take
    with llama_server(gguf, num_slots=1) as server, proxied(ServeConfig(head, server.url)) as proxy:

        def dies(prober: AnswerProber) -> Any:
            server.kill()
            return taken(prober)

        monkeypatch.setattr(AnswerProber, "take", dies)
        client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIStatusError) as raised:
            completed(client, ASKED[0], NEVER)
        assert raised.value.status_code == 502
        assert proxy.metric("haltwise_streams_in_flight") == 0


@pytest.mark.whole
def test_a_server_that_dies_amid_a_thought_is_a_clean_error(gguf: Path, head: Path) -> None:
    with (
        llama_server(gguf) as server,
        proxied(ServeConfig(head=head, upstream=server.url)) as proxy,
    ):
        client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)
        stream = client.completions.create(
            model=NAME,
            prompt=prompt_of(ASKED[0]),
            stream=True,
            max_tokens=900,
            extra_body={"ignore_eos": True},
            extra_headers=NEVER,
        )
        with pytest.raises(openai.APIError):
            for _ in stream:
                server.kill()
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model=NAME, prompt=prompt_of(ASKED[0]))
        assert raised.value.status_code == 502
        assert proxy.metric("haltwise_streams_in_flight") == 0
