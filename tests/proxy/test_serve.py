"""`haltwise serve` as a command."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from haltwise import Certificate, HaltHead, InputError, cli
from haltwise.control.status import read_library
from haltwise.policy.head import NEVER_HALTS
from haltwise.proxy import ServeConfig, app, create_app, create_server
from haltwise.proxy.app import told_context
from haltwise.proxy.config import ServerKind
from tests.heads import sure_head
from tests.proxy import fake_upstream
from tests.proxy.fake_upstream import FakeUpstream, Plan, listening_socket
from tests.proxy.proxies import (
    PATIENCE,
    ROOT,
    SERVE,
    Proxy,
    Reply,
    ask,
    connected,
    listens,
    proxied,
    request_bytes,
    saved_head,
    spawned_proxy,
    wait_until,
)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_head(tmp_path_factory.mktemp("head"))


def run(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*SERVE, *flags], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_flag() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("head", "upstream", "kind", "host", "port", "price", "min-thinking-tokens",
                 "max-thinking-tokens", "shadow", "keys", "upstream-key-env", "max-streams",
                 "allowed-hosts", "max-body-bytes", "connect-timeout", "read-timeout",
                 "send-timeout", "drain-timeout"):  # fmt: skip
        assert f"--{flag}" in done.stdout


def test_help_ends_without_a_word_where_nobody_reads_on() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = subprocess.run(
            [*SERVE, "--help"], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.whole
def test_an_unknown_flag_ends_with_status_2(head: Path) -> None:
    assert run("--head", str(head), "--colour", "red").returncode == 2
    assert run().returncode == 2


@pytest.mark.whole
def test_what_a_person_got_wrong_is_told_in_one_line(head: Path) -> None:
    with listening_socket() as taken:
        port = str(taken.getsockname()[1])
        for flags, expected in {
            ("--port", "0", "--head", "nowhere"): "nowhere",
            ("--port", "0", "--head", str(head), "--price", "-1"): "--price",
            ("--head", str(head), "--port", "99999"): "--port is 99999, expected 0 to 65535",
            ("--head", str(head), "--port", port): port,
        }.items():
            done = run(*flags)
            (line,) = done.stderr.splitlines()
            assert (done.returncode, done.stdout) == (2, "")
            assert line.startswith("error: ") and expected in line


@pytest.mark.whole
def test_what_is_refused_at_the_start_makes_no_state(head: Path, tmp_path: Path) -> None:
    """Else it would be about the head and the target of somebody who never served."""
    bad = tmp_path / "bad.json"
    bad.write_text("{}}")
    control = ("--head", str(head), "--control", "apply", "--state", str(tmp_path / "state"))
    with listening_socket() as taken:
        port = str(taken.getsockname()[1])
        for name, value, expected in (
            ("--port", port, port),
            ("--operator-key-env", "HALTWISE_NOT_SET", "HALTWISE_NOT_SET"),
            ("--tariffs", str(bad), "bad.json"),
            ("--budgets", str(bad), "bad.json"),
            ("--keys", str(bad), "bad.json"),
            ("--check-answers", "no.such:thing", "no.such"),
            ("--challenger", str(tmp_path / "nothing"), "nothing"),
        ):
            free = () if name == "--port" else ("--port", "0")
            done = run(*control, "--upstream", "http://127.0.0.1:1", *free, name, value)
            assert done.returncode == 2 and done.stderr.startswith("error: ")
            assert expected in done.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json"], name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"head": ROOT / "checkpoints" / "embedded-head"},
            "groups ending, which a server does not show; .*train.py --traces TRACES --run-dir NEW",
        ),
        ({"upstream": "ftp://somewhere"}, "--upstream: server is 'ftp"),
        ({"upstream": "127.0.0.1:8080"}, "--upstream: .* expected"),
        ({"upstream": "http://"}, "--upstream: .*http"),
        ({"port": 65_536}, "--port is 65536, expected 0 to 65535"),
        ({"port": -1}, "--port is -1"),
        ({"price": float("nan")}, "--price is nan"),
        ({"min_thinking_tokens": -1}, "--min-thinking-tokens is -1"),
        ({"min_thinking_tokens": 5, "max_thinking_tokens": 4}, "--max-thinking-tokens is 4, .* 5"),
        ({"max_thinking_tokens": 0}, "--max-thinking-tokens is 0, expected at least 1"),
        ({"max_streams": 0}, "--max-streams is 0, expected 1 to 100000"),
        ({"max_streams": 10**20}, "--max-streams is 1"),
        ({"max_body_bytes": 0}, "--max-body-bytes is 0"),
        ({"read_timeout": 0.0}, "--read-timeout is 0.0"),
        ({"send_timeout": float("inf")}, "--send-timeout is inf"),
        ({"keep_days": 0.0}, "--keep-days is 0.0, expected above 0"),
        ({"label_hours": float("nan")}, "--label-hours is nan"),
        ({"upstream_key_env": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(
    head: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as raised:
        create_app(ServeConfig(**{"head": head} | settings))
    assert "\n" not in str(raised.value)


def test_a_head_that_learned_from_another_confidence_is_refused(tmp_path: Path) -> None:
    policy = sure_head(probing="always")
    halting = replace(policy.config.halting, confidence_rule="by hand")
    saved_head(tmp_path, HaltHead(replace(policy.config, halting=halting), policy.weights))
    with pytest.raises(InputError, match="confidence rule 'by hand' is none that can be run"):
        create_app(ServeConfig(head=tmp_path))


def test_what_is_found_out_late_is_told_at_start(
    head: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = HaltHead.load(head)
    weak = Certificate(
        risk="net-em-loss", max_em_drop=0.1, confidence=0.9, price=1.0, saving=0.3,
        observed_loss=0.0, num_questions=100, num_traces=100, traces="0" * 64, lm="lm",
        head=own.digest, smallest_em_drop=None, command="by hand",
    )  # fmt: skip
    config = replace(own.config, certificate=weak, segment_prices={"b": 0.1, "a": 0.2})
    HaltHead(config, own.weights).save(tmp_path / "head")
    control: dict[str, Any] = {"control": "apply", "state": tmp_path / "a.db", "target": 0.05}
    create_app(ServeConfig(head=tmp_path / "head", label_hours=1.0, **control))
    unpriced = control | {"target": 0.1, "state": tmp_path / "b.db", "price": 1.0}
    create_app(ServeConfig(head=tmp_path / "head", **unpriced))
    create_app(ServeConfig(head=tmp_path / "head", price=2.0))
    told = [json.loads(record.getMessage())["warning"] for record in caplog.records]
    assert [one.split(", which")[0] for one in told] == [
        "--label-hours waits for labels", "the head's certificate promises 0.1",
        "segments (a, b) have prices of their own",
        "--price 2 is that of all requests that name none: the head's prices of segments (a, b) "
        "are not served",
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "told"), [(None, [NEVER_HALTS]), (0.5, [])])
def test_a_price_of_0_that_nobody_asked_for_is_told_at_start(
    head: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    asked: float | None, told: list[str],
) -> None:  # fmt: skip
    halts = HaltHead.load(head)
    HaltHead(replace(halts.config, default_price=0.0), halts.weights).save(tmp_path)
    create_app(ServeConfig(head=tmp_path, price=asked))
    assert [json.loads(record.getMessage())["warning"] for record in caplog.records] == told


@pytest.mark.parametrize("kind", ["auto", "vllm"])
@pytest.mark.parametrize("lm", ["another", "fake"])
def test_a_head_of_another_lm_is_told_once(
    head: Path, tmp_path: Path, lm: str, kind: ServerKind, caplog: pytest.LogCaptureFixture
) -> None:
    own = HaltHead.load(head)
    HaltHead(replace(own.config, lm=lm), own.weights).save(tmp_path)
    with (
        FakeUpstream("vllm") as upstream,
        proxied(ServeConfig(head=tmp_path, upstream=upstream.url, kind=kind)) as proxy,
    ):
        for n in range(2):
            assert ask(proxy.client, Plan(f"told{n}", thinking=3)).done
    told = [record.getMessage() for record in caplog.records if "warning" in record.getMessage()]
    assert len(told) == (lm == "another")
    assert all("another" in line and "fake" in line for line in told)


def test_a_head_that_was_recorded_from_another_server_is_told(
    head: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = HaltHead.load(head)
    recorded = {"kind": "llama-server", "model": "a.gguf", "quantisation": None}
    HaltHead(replace(own.config, lm="fake", server=recorded), own.weights).save(tmp_path)
    assert HaltHead.load(tmp_path).config.server == recorded
    with (
        FakeUpstream("llama-server") as upstream,
        proxied(ServeConfig(head=tmp_path, upstream=upstream.url)) as proxy,
    ):
        assert ask(proxy.client, Plan("p", thinking=3)).done
    (told,) = (line for record in caplog.records if "warning" in (line := record.getMessage()))
    assert "recorded from a server with model 'a.gguf', this one has ''" in told


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"sk-secret": 1}',
        '{"sk-secret": {"price": "cheap"}}',
        '{"sk-secret": {"price": -1}}',
        '{"sk-secret": {"prize": 1}}',
        '{"": {}, "sk-secret": {}}',
        '{" \\n": {}}',
        '{"sk-secret": {"min_tokens": 5, "max_tokens": 4}}',
        None,
    ],
)
def test_a_bad_file_of_keys_is_refused_without_telling_a_key(
    head: Path, tmp_path: Path, content: str | None
) -> None:
    keys = tmp_path / "keys.json"
    if content is not None:
        keys.write_text(content)
    with pytest.raises(InputError, match=r"keys\.json") as raised:
        create_app(ServeConfig(head=head, keys=keys))
    assert "sk-secret" not in str(raised.value)


def test_a_server_that_does_not_answer_at_start_is_told(
    head: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeUpstream("vllm") as upstream:
        create_server(ServeConfig(head=head, upstream=upstream.url))
    assert not caplog.messages
    create_server(ServeConfig(head=head, upstream="http://127.0.0.1:1"))
    (told,) = caplog.messages
    assert "http://127.0.0.1:1 does not answer at start, it is asked again: " in told


def test_figures_are_of_answers_that_the_server_has_room_for(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = "http://127.0.0.1:1"
    with FakeUpstream("vllm") as one, FakeUpstream("vllm") as another:
        told = ServeConfig(head, one.url, control="observe", state=tmp_path / "told")
        named = replace(told, state=tmp_path / "named", context=700)
        unknown = replace(told, state=tmp_path / "unknown", upstream=nobody)
        monkeypatch.setattr(fake_upstream, "CONTEXT", 600)
        for config in (told, named, unknown):
            create_server(config)
        of_states = [
            read_library(str(one.state)).books.most_tokens for one in (told, named, unknown)
        ]
        assert of_states == [600, 700, 32_768]
        assert told_context(replace(told, large=another.url)) == 600
        assert told_context(replace(told, large=nobody)) is None
        caplog.clear()
        create_server(told)
        create_server(replace(unknown, state=told.state))  # which does not tell anything else
        assert not [one for one in caplog.messages if "does not answer" not in one]
        caplog.clear()
        create_server(replace(told, context=60))
        monkeypatch.setattr(fake_upstream, "CONTEXT", 60_000)
        create_server(told)
    wide, long = caplog.messages
    assert (
        "up to 600 tokens, a new one would be for 60: intervals of savings are 10 times as" in wide
    )
    assert "up to 600 tokens, a new one would be for 32768: longer requests are left out of" in long


def test_it_listens_on_the_loopback_interface_alone(head: Path) -> None:
    with spawned_proxy("--head", str(head)) as proxy, socket.socket() as client:
        port = int(proxy.url.rpartition(":")[2])
        # Another address of this machine.
        assert listens(port) and client.connect_ex(("127.0.0.2", port)) != 0


def process_of(proxy: Proxy) -> "subprocess.Popen[bytes]":
    assert proxy.process is not None
    return proxy.process


@contextmanager
def told_to_end_amid_a_thought(
    head: Path, plan: Plan, *flags: str, log: Path | None = None
) -> Iterator[tuple[FakeUpstream, Proxy, Callable[[], Reply | None]]]:
    """A proxy with one request that hangs upstream; the last one waits for its reply, if any."""
    with FakeUpstream("vllm") as upstream:
        flags = ("--head", str(head), "--upstream", upstream.url, *flags)
        with spawned_proxy(*flags, log=log) as proxy, ThreadPoolExecutor() as pool:
            reply = pool.submit(ask, proxy.client, plan)
            wait_until(lambda: bool(upstream.of(plan)) and upstream.of(plan)[0].num_sent > 0)
            process_of(proxy).send_signal(signal.SIGTERM)

            def got() -> Reply | None:
                return None if reply.exception(PATIENCE) else reply.result()

            yield upstream, proxy, got


def test_requests_that_run_are_finished_before_it_ends(head: Path, tmp_path: Path) -> None:
    plan = Plan("drained", thinking=28, trouble="hangs", at=5, legs=(1,))
    log = tmp_path / "log"
    flags = ("--drain-timeout", str(PATIENCE))
    with told_to_end_amid_a_thought(head, plan, *flags, log=log) as (upstream, proxy, got):
        wait_until(lambda: not listens(int(proxy.url.rpartition(":")[2])))
        assert process_of(proxy).poll() is None
        upstream.free(upstream.of(plan)[0])
        reply = got()
        assert reply is not None and reply.done
        assert reply.text == plan.answer_text(None if reply.is_late else 20)
        assert process_of(proxy).wait(PATIENCE) in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    reasons = [line["reason"] for line in lines if "reason" in line]
    assert reasons == ["halted"] or (reply.is_late and len(reasons) == 1)
    assert "Traceback" not in log.read_text()


@pytest.mark.whole
def test_a_reload_and_an_end_lose_none_of_200_streams(head: Path, tmp_path: Path) -> None:
    plans = [Plan(f"stream{n}", thinking=28, trouble="hangs", at=5, legs=(1,)) for n in range(200)]
    log = tmp_path / "log"
    with FakeUpstream("vllm") as upstream, ExitStack() as stack:
        flags = ("--head", str(head), "--upstream", upstream.url, "--drain-timeout", str(PATIENCE))
        proxy = stack.enter_context(spawned_proxy(*flags, log=log))
        limits = httpx2.Limits(max_connections=None)
        client = stack.enter_context(
            httpx2.Client(base_url=proxy.url, timeout=PATIENCE, limits=limits)
        )
        pool = stack.enter_context(ThreadPoolExecutor(len(plans)))
        replies = [pool.submit(ask, client, plan) for plan in plans]
        wait_until(lambda: all(upstream.of(p) and upstream.of(p)[0].num_sent for p in plans))
        process_of(proxy).send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in log.read_text())
        process_of(proxy).send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(int(proxy.url.rpartition(":")[2])))
        for plan in plans:
            upstream.free(upstream.of(plan)[0])
        for plan, asked in zip(plans, replies, strict=True):
            reply = asked.result(PATIENCE)
            assert reply.done and reply.text == plan.answer_text(None if reply.is_late else 20)
        assert process_of(proxy).wait(PATIENCE) in (0, -signal.SIGTERM)


@pytest.mark.whole
@pytest.mark.parametrize("twice", [False, True])
def test_a_request_that_never_ends_does_not_hold_it_up(
    head: Path, tmp_path: Path, twice: bool
) -> None:
    """The drain expires, or a second signal ends it: the client is told, and so is the log."""
    plan = Plan("endless", thinking=28, trouble="hangs", at=5, legs=(1,))
    log = tmp_path / "log"
    flags = ("--drain-timeout", str(PATIENCE) if twice else "0.5")
    with told_to_end_amid_a_thought(head, plan, *flags, log=log) as (upstream, proxy, got):
        if twice:
            wait_until(lambda: not listens(int(proxy.url.rpartition(":")[2])))
            process_of(proxy).send_signal(signal.SIGINT)
        assert process_of(proxy).wait(PATIENCE) is not None
        reply = got()
        assert reply is not None and not reply.done
        assert reply.events[-1]["error"]["type"] == "ending"
        assert upstream.of(plan)[0].gone.wait(PATIENCE)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["outcome"] for line in lines if "outcome" in line] == ["cut off"]


@pytest.mark.whole
def test_clients_that_leave_do_not_fill_the_log(head: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with FakeUpstream("vllm") as upstream:
        flags = ("--head", str(head), "--upstream", upstream.url)
        with spawned_proxy(*flags, log=log) as proxy:
            for n in range(20):
                plan = Plan(f"left{n}", trouble="endless")
                with connected(proxy) as client:
                    client.sendall(request_bytes(plan, True, True, {"X-Haltwise-Price": "0.1"}))
                    assert b"200" in client.recv(1000)
                    # What is left unread makes this a reset.
            wait_until(
                lambda: proxy.metric("haltwise_requests_total", outcome="disconnected") == 20
            )
            assert proxy.metric("haltwise_streams_in_flight") == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["outcome"] for line in lines if "outcome" in line] == ["disconnected"] * 20


def test_a_serving_process_has_no_framework_in_memory(head: Path) -> None:
    with (
        FakeUpstream("vllm") as upstream,
        spawned_proxy("--head", str(head), "--upstream", upstream.url) as proxy,
    ):
        plan = Plan("small", thinking=28)
        assert ask(proxy.client, plan).done
        maps = Path(f"/proc/{process_of(proxy).pid}/maps").read_text()
        assert "numpy" in maps and "torch" not in maps


def test_tokens_are_sent_at_once(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Running:
        def run(self, sockets: list[socket.socket]) -> None:
            # asyncio lets small pieces go unless the protocol of the listener is unnamed.
            assert [listener.proto for listener in sockets] == [socket.IPPROTO_TCP]

    monkeypatch.setattr("haltwise.proxy.create_server", lambda config: Running())
    cli.serve(ServeConfig(head=head, port=0))


@pytest.mark.whole
def test_the_head_and_the_keys_are_read_anew_and_no_stream_is_dropped(
    plan: Plan, tmp_path: Path
) -> None:
    keys, head, log = tmp_path / "keys", tmp_path / "head", tmp_path / "log"
    saved_head(head)
    keys.write_text('{"old": {}}')

    def asked(proxy: Proxy, key: str, name: str, **changes: Any) -> Reply:
        shown = {"Authorization": f"Bearer {key}"}
        return ask(proxy.client, Plan(plan.name + name, **changes), headers=shown)

    def reload(num: int, said: str) -> None:
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.read_text().count(said) == num)

    flags = ["--head", str(head), "--keys", str(keys)]
    with (
        FakeUpstream("vllm") as upstream,
        spawned_proxy(*flags, "--upstream", upstream.url, log=log) as proxy,
        ThreadPoolExecutor() as pool,
    ):
        hanging = Plan(plan.name, trouble="hangs", at=6, legs=(1,))
        shown = {"Authorization": "Bearer old"}
        running = pool.submit(ask, proxy.client, hanging, headers=shown)
        wait_until(lambda: bool(upstream.of(hanging)))
        assert asked(proxy, "old", "a").haltwise["position"] == 20
        keys.write_text('{"new": {}}')
        HaltHead(replace(sure_head().config, default_price=10.0), sure_head().weights).save(head)
        reload(1, '"reloaded"')
        assert asked(proxy, "new", "b").haltwise["position"] == 12
        assert asked(proxy, "old", "c").status == 401
        sure_head(rule="every 8 tokens").save(head)
        reload(1, "other conditions: decision_rule is 'every 8 tokens', expected 'every 4")
        saved_head(head)
        keys.write_text("{}")
        reload(2, "nothing is reloaded")
        assert asked(proxy, "new", "d").haltwise["position"] == 12
        upstream.free(upstream.of(hanging)[0])
        kept = running.result(PATIENCE)
        assert kept.done and kept.haltwise["position"] == 20


def test_another_head_is_not_read_under_a_control(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"control": "observe", "state": tmp_path / "state"}
    proxy = app.Proxy(ServeConfig(head=saved_head(tmp_path / "head"), **settings))
    other = {name: 2 * weights for name, weights in sure_head().weights.items()}
    HaltHead(sure_head().config, other).save(tmp_path / "head")
    with pytest.raises(InputError, match="the state is about the head before"):
        proxy._reload()
    assert proxy.control is not None
    proxy.control.close()


@pytest.mark.whole
def test_processes_that_share_a_port_share_its_requests(tmp_path: Path, plan: Plan) -> None:
    head, logs = saved_head(tmp_path / "head"), [tmp_path / "one", tmp_path / "two"]
    with FakeUpstream("vllm") as upstream, ExitStack() as stack:
        flags = ["--head", str(head), "--upstream", upstream.url, "--share-port"]
        one = stack.enter_context(spawned_proxy(*flags, log=logs[0]))
        port = one.url.rpartition(":")[2]
        stack.enter_context(spawned_proxy(*flags, "--port", port, log=logs[1]))

        def served() -> list[int]:
            return [log.read_text().count('"endpoint": "chat"') for log in logs]

        def asked(number: int) -> int:
            with httpx2.Client(base_url=one.url, timeout=PATIENCE) as client:
                return ask(client, Plan(f"{plan.name}n{number}")).status

        num = 0
        while not all(served()):
            assert asked(num) == 200
            num += 1
        assert one.process is not None
        one.process.terminate()
        assert one.process.wait(PATIENCE) == -signal.SIGTERM
        assert {asked(num + n) for n in range(10)} == {200}
        assert sum(served()) == num + 10
        refused = run(*flags[:-1], "--port", port)
        assert refused.returncode == 2 and "cannot listen at" in refused.stderr
        assert refused.stderr.endswith("; end what listens there, or name another --port\n")
