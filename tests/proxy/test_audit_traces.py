"""The proxy keeps dense audits as traces, which say what the audits said; clients never notice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.outcome import halt_outcome
from haltwise import InputError
from haltwise.control.audit_traces import AuditTraces, LineWriter
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.auditor import Auditor
from lms.scorers import scorer_of
from policies.head import HeadPolicy
from tests.heads import sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan
from tests.proxy.proxies import PATIENCE, Proxy, ask, proxied, saved_head, wait_until
from traces import TraceFiles, Traces, import_json_lines

Kept = Callable[..., Proxy]
OPERATOR = {"Authorization": "Bearer secret"}


@pytest.fixture
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Proxies before a kind of fake, which audit everything, with all answers, if none is said."""
    monkeypatch.setenv("OPERATOR", "secret")
    head = saved_head(tmp_path / "head")
    with ExitStack() as stack:

        def started(kind: Kind = "vllm", **settings: Any) -> Proxy:
            usual: dict[str, Any] = {"control": "observe", "audit": 1.0, "dense_audits": 1.0}
            usual |= {"state": tmp_path / "state", "audit_traces": tmp_path / "audits"}
            usual = {} if settings.get("control") == "off" else usual
            upstream = stack.enter_context(FakeUpstream(kind))
            config = ServeConfig(
                head=head,
                upstream=upstream.url,
                operator_key_env="OPERATOR",
                **usual | settings,
            )
            return stack.enter_context(proxied(config))

        yield started


def now(proxy: Proxy) -> Any:
    return proxy.client.get("/v1/haltwise/control", headers=OPERATOR).raise_for_status().json()


def status(proxy: Proxy, num_audits: int = 1) -> Any:
    """Once so many audits have told all, and each trace of theirs is written or lost."""

    def is_over(found: Any) -> bool:
        kept = found["traces"]
        dense = num_audits if kept and kept["share"] == 1.0 else 0
        audits = found["groups"]["everything"]["audits"]
        return bool(audits == num_audits and (not dense or done(kept) >= dense))

    wait_until(lambda: is_over(now(proxy)))
    return now(proxy)


def done(kept: Any) -> int:
    return int(kept["written"] + kept["lost"])


def imported(folder: Path) -> Traces:
    import_json_lines(folder / "audits", folder / "imported", 100, scorer_of)
    files = TraceFiles.open(folder / "imported")
    return files.read(files.rows())


def kept(folder: Path, what: str) -> list[Any]:
    """Rows of the record."""
    with closing(sqlite3.connect(folder / "state")) as file:
        return file.execute(f"SELECT {what}").fetchall()


# A word that tells where it was halted, the same number everywhere, and nothing that can be read.
READ: dict[str, Any] = {"answer": 1}
SAME: dict[str, Any] = {"mention": r"\boxed{7} "}
UNREAD: dict[str, Any] = {}


@pytest.mark.parametrize("says", [READ, SAME, UNREAD])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang", "ollama"])
def test_the_trace_says_of_every_price_what_the_audit_said(
    kind: Kind, chat: bool, says: dict[str, Any], keeping: Kept, plan: Plan, tmp_path: Path
) -> None:
    proxy = keeping(kind)
    ask(proxy.client, Plan(plan.name, **says), chat)
    told = status(proxy)
    assert (told["traces"]["written"], told["traces"]["lost"], told["failures"]) == (1, 0, 0)
    traces, policy = imported(tmp_path), HeadPolicy(sure_head())
    assert traces.position.tolist() == [4, 8, 12, 16, 20, 24, 28][: traces.num_points]
    assert traces.finished.all() and traces.num_points >= 6 and traces.probe_tokens.min() > 0
    assert told["audit_tokens"] == traces.probe_tokens.sum()
    assert proxy.metric("haltwise_audit_tokens_total") == told["audit_tokens"]
    wait_until(lambda: kept(tmp_path, "position FROM answer") != [])  # written in the background
    assert kept(tmp_path, "audit_tokens FROM request") == [(told["audit_tokens"],)]
    answers = kept(tmp_path, "position, answer FROM answer ORDER BY rowid")
    of_trace = dict(zip(traces.position.tolist(), traces.answer, strict=True))
    assert [(at, of_trace[at]) for at in (12, 20)] == [
        (at, answer if says else "") for at, answer in answers[:-1]
    ]
    signal = policy.signal(traces)
    for measured in told["groups"]["everything"]["by_price"]:
        outcome = halt_outcome(traces, policy.halts(signal, measured["price"]), "at_halt")
        assert measured["loss"]["estimate"] == 1 - outcome.em.mean()
        saved = 1 - outcome.cost.sum() / traces.num_tokens.sum()
        assert measured["saving"]["estimate"] == pytest.approx(saved, abs=1e-6)


def test_the_trace_of_a_head_that_looks_at_answers_has_what_it_saw(
    tmp_path: Path, plan: Plan
) -> None:
    head = sure_head(probing="always")
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream("vllm", paced=4, probed=True))
        config = ServeConfig(
            head=saved_head(tmp_path / "head", head),
            upstream=upstream.url,
            control="observe",
            audit=1.0,
            dense_audits=1e-9,  # of such a head all are
            state=tmp_path / "state",
            audit_traces=tmp_path / "audits",
            probe_timeout=PATIENCE,
        )
        proxy = stack.enter_context(proxied(config))
        reply = ask(proxy.client, Plan(plan.name, **SAME))
        wait_until(lambda: done(now(proxy)["traces"]) == 1)
        told = now(proxy)
    traces, policy = imported(tmp_path), HeadPolicy(head)
    assert traces.position.tolist() == [4, 8, 12, 16, 20, 24, 28] and traces.correct.all()
    probes = reply.haltwise["probes"]["completion_tokens"]
    assert told["audit_tokens"] == traces.probe_tokens.sum() == probes
    (audits,) = (tmp_path / "audits").iterdir()
    seen = json.loads(audits.read_text().splitlines()[1])["answer_logprobs"]
    assert [len(one) + 1 for one in seen] == traces.probe_tokens.tolist()
    assert traces.confidence == pytest.approx([np.exp(np.mean(one)) for one in seen])
    signal = policy.signal(traces)
    for measured in told["groups"]["everything"]["by_price"]:
        outcome = halt_outcome(traces, policy.halts(signal, measured["price"]), "always")
        assert measured["loss"]["estimate"] == 1 - outcome.em.mean()
        saved = 1 - outcome.cost.sum() / traces.num_tokens.sum()
        assert measured["saving"]["estimate"] == pytest.approx(saved, abs=1e-6)


@pytest.mark.whole
def test_a_share_of_the_audits_is_dense(keeping: Kept, plan: Plan, tmp_path: Path) -> None:
    proxy = keeping(dense_audits=0.5)
    for _ in range(30):
        ask(proxy.client, plan)
    status(proxy, 30)
    wait_until(lambda: 5 < done(now(proxy)["traces"]) < 25)
    assert len(np.unique(imported(tmp_path).question_id)) == 1


@pytest.mark.parametrize("settings", [{"dense_audits": 0.0}, {"audit_traces": None}])
def test_without_dense_audits_no_more_is_asked_and_nothing_kept(
    settings: Any, keeping: Kept, plan: Plan, tmp_path: Path
) -> None:
    proxy = keeping(**settings)
    ask(proxy.client, plan)
    told = status(proxy)
    assert told["traces"] is None and not (tmp_path / "audits").exists()
    wait_until(lambda: kept(tmp_path, "position FROM answer") != [])  # written in the background
    positions = kept(tmp_path, "position FROM answer ORDER BY rowid")
    assert [at for (at,) in positions[:-1]] == [12, 20]


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("broken", ["row", "put", "append", "folder"])
def test_what_fails_costs_the_trace_alone(
    broken: str, keeping: Kept, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(keeping(control="off").client, plan,
                   headers={"X-Haltwise-Price": "1e-9"})  # fmt: skip
    failing = keeping()
    methods = {"row": (AuditTraces, "_row"), "put": (LineWriter, "put")}
    methods["append"] = (LineWriter, "_append")
    if broken == "folder":
        (tmp_path / "audits").rmdir()
    else:
        monkeypatch.setattr(*methods[broken], boom)
    found = ask(failing.client, plan)
    assert found.body == expected.body.replace(b"1e-09", b"0.0")
    told = status(failing)
    assert (told["traces"]["written"], told["traces"]["lost"]) == (0, 1)
    assert told["failures"] == 0 and told["groups"]["everything"]["audits"] == 1
    assert failing.metric("haltwise_audit_traces_lost") == 1


def test_answers_at_other_points_that_do_not_come_cost_the_trace_alone(
    keeping: Kept, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Auditor._answer

    async def failing(auditor: Auditor, reader: Any, position: int) -> Any:
        return boom() if position == 16 else await answer(auditor, reader, position)

    monkeypatch.setattr(Auditor, "_answer", failing)
    proxy = keeping()
    ask(proxy.client, plan)
    told = status(proxy)
    assert told["traces"]["lost"] == 1 and "broken" in told["traces"]["trouble"]
    assert told["failures"] == 0 and told["groups"]["everything"]["audits"] == 1
    assert told["audit_tokens"] > 0


@pytest.mark.parametrize("label_hours", [0.0, 1.0])
def test_a_label_is_the_traces_too(
    label_hours: float, keeping: Kept, plan: Plan, tmp_path: Path
) -> None:
    proxy = keeping(audit_content=True, label_hours=label_hours)
    plan = Plan(plan.name, answer=1)
    name = ask(proxy.client, plan, chat=True).headers["x-haltwise-request"]
    wait_until(lambda: done(now(proxy)["traces"]) == 1)
    (audits,) = (tmp_path / "audits").iterdir()
    trace = json.loads(audits.read_text().splitlines()[1])
    assert plan.text() in trace["question"] and trace["text"] and trace["final_answer"]

    def label(gold: str) -> int:
        said = {"request": name, "gold": gold}
        return proxy.client.post("/v1/haltwise/labels", headers=OPERATOR, json=said).status_code

    assert [label(trace["answer"][2]), label("x")] == [204, 400]
    wait_until(lambda: done(now(proxy)["traces"]) == 2)
    traces = imported(tmp_path)
    assert traces.labelled.all() and not traces.final_correct.any()
    assert traces.correct.tolist() == [answer == trace["answer"][2] for answer in trace["answer"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"control": "off", "audit_traces": Path("x")},
            "--audit-traces is given, expected it with",
        ),
        ({"audit_content": True}, "--audit-content is on, expected --audit-traces"),
        ({"dense_audits": 1.5}, "--dense-audits is 1.5, expected from 0 to 1"),
        ({"dense_audits": float("nan")}, "--dense-audits is nan"),
        ({"audit_traces": Path("state")}, "expected a folder for traces"),
    ],
)
def test_bad_settings_are_refused(
    settings: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").touch()
    usual = {"control": "observe"} | settings
    usual |= {"state": tmp_path / "db"} if usual["control"] != "off" else {}
    with pytest.raises(InputError, match=expected):
        create_app(ServeConfig(head=saved_head(tmp_path / "head"), **usual))
