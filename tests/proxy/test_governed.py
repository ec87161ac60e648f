"""The proxy with its control: audits, the status page, and clients who never notice a failure."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from haltwise import HaltHead, InputError
from haltwise.control import governed
from haltwise.control.answers import GivenAnswer
from haltwise.control.installation import installation_key, key_file_of
from haltwise.control.record import Record, RequestRow, digest
from haltwise.control.store import store_of
from haltwise.proxy import ServeConfig, auditor, create_app
from haltwise.proxy.auditor import Auditor
from haltwise.proxy.config import tenant_of
from haltwise.proxy.wire import UpstreamError
from haltwise.session.thought import ForcedAnswer, PointRules
from lms.embedded import EMBEDDED, prompt_of
from lms.gguf import write_gguf
from lms.tasks import questions
from tests.control.test_governed import certified_head
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import CUE, FakeUpstream, Kind, Plan, Thoughts
from tests.proxy.llama_server import NAME, SLOT_TOKENS, llama_server
from tests.proxy.proxies import (
    PATIENCE,
    Proxy,
    Reply,
    ask,
    connected,
    proxied,
    saved_head,
    wait_until,
)
from tests.proxy.proxies import request_bytes as bytes_of

Governed = Callable[..., Proxy]
OFF, NEVER = {"X-Haltwise-Off": "1"}, {"X-Haltwise-Price": "1e-9"}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Governed]:
    """Proxies before a kind of fake; with a control all its requests are audits if none is said."""
    with ExitStack() as stack:

        def started(
            kind: Kind = "vllm", is_open: bool = False, looks: bool = False, **settings: Any
        ) -> Proxy:
            policy = sure_head(CUE if is_open else CLOSE, probing="always" if looks else "at_halt")
            head = saved_head(tmp_path / "head", policy)
            waits: Any = {"paced": 4, "probed": True} if looks else {}
            settings |= {"probe_timeout": PATIENCE} if looks else {}
            if settings.get("control", "off") != "off":
                settings = {"state": tmp_path / "state", "audit": 1.0} | settings
            thoughts: Thoughts = "written" if is_open else "field"
            upstream = stack.enter_context(FakeUpstream(kind, thoughts=thoughts, **waits))
            config = ServeConfig(head=head, upstream=upstream.url, **settings)
            return stack.enter_context(proxied(config))

        yield started


def status(proxy: Proxy) -> Any:
    """Once no audit is under way any more; twice, as one may have been about to be."""

    def told() -> Any:
        return proxy.client.get("/v1/haltwise/control").raise_for_status().json()

    def is_settled() -> bool:
        before = told()
        time.sleep(0.05)
        after = told()
        both = (before["groups"]["everything"], after["groups"]["everything"])
        return before["under_way"] == after["under_way"] == 0 and bool(both[0] == both[1])

    wait_until(is_settled)
    return told()


def answers_of(state: Path) -> list[tuple[int, str, int, int]]:
    """Position, digest, agreement and tokens of every answer in the record, once there are any."""

    def found() -> list[tuple[int, str, int, int]]:
        with sqlite3.connect(state) as file:
            names = "position, answer, agrees, tokens"
            return file.execute(f"SELECT {names} FROM answer ORDER BY rowid").fetchall()

    wait_until(lambda: found() != [])
    return found()


def mac(state: Path, reply: Reply, halted: bool, is_open: bool) -> str:
    """The digest that the record has of an answer."""
    rules = PointRules(sure_head().config.halting)
    text = reply.text
    if halted or not is_open:  # the whole of an answer in the open is read
        text = text.rpartition(CUE if is_open else "</think>")[2]
    read = rules.read(ForcedAnswer([text], [], 1)).answer if halted else rules.read_answer(text)
    key = installation_key(key_file_of(state))
    return digest(key, GivenAnswer(read, text, 1).compared)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_open", [False, True], ids=["markers", "in the open"])
@pytest.mark.parametrize(
    ("kind", "chat"),
    [
        (kind, chat)
        for kind in ("vllm", "llama-server", "sglang", "ollama")
        for chat in (True, False)
    ]
    + [("plain", False)],
)
@pytest.mark.whole
def test_an_audit_knows_the_answers_that_halting_would_have_given(
    kind: Kind,
    chat: bool,
    stream: bool,
    is_open: bool,
    serving: Governed,
    plan: Plan,
    tmp_path: Path,
) -> None:
    plan = replace(plan, open=True, answer=2) if is_open else plan  # 32 tokens in all
    plain, looking = serving(kind, is_open), serving(kind, is_open, control="observe")
    full = ask(looking.client, plan, chat, stream)
    expected = ask(plain.client, plan, chat, stream, NEVER)
    assert (full.thought, full.text, full.finish) == (
        expected.thought,
        expected.text,
        expected.finish,
    )
    assert full.usage["completion_tokens"] == expected.usage["completion_tokens"]
    told = status(looking)
    assert told["failures"] == 0 and told["groups"]["everything"]["audits"] == 1
    # At most prices of 10, 1 and 0.1 the head halts after 12 tokens, 20, and never.
    found = answers_of(tmp_path / "state")
    assert [position for position, *_ in found[:-1]] == [12, 20]
    for price, (position, answer, agrees, tokens) in zip(("10", "1"), found, strict=False):
        halted = ask(plain.client, plan, chat, stream, {"X-Haltwise-Price": price})
        assert halted.haltwise["halted"]
        # A thought that a server closes by a request beside it may have gone on meanwhile.
        if halted.haltwise.get("length", position) == position:
            assert answer == mac(tmp_path / "state", halted, True, is_open) and not agrees
        legs = [leg["completion_tokens"] for leg in halted.haltwise["legs"]]
        assert len(legs) == 1 or tokens == halted.haltwise["position"] + legs[1]
    assert found[-1][1] == mac(tmp_path / "state", full, False, is_open)


def test_an_audit_counts_the_full_answer_where_halting_would_have_been_taken_back(
    serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    """At the tokens of both, as a request that is halted and taken up again."""
    check = "tests.proxy.test_acceptance:refuse"
    plain, looking = serving(check_answers=check), serving(control="observe", check_answers=check)
    full = ask(looking.client, plan).usage["completion_tokens"]
    everything = status(looking)["groups"]["everything"]
    assert everything["audits"] == 1
    *found, whole = answers_of(tmp_path / "state")
    assert [position for position, *_ in found] == [12, 20] and whole[3] == full
    for price, (_, answer, agrees, tokens) in zip(("10", "1"), found, strict=True):
        resumed = ask(plain.client, plan, True, True, {"X-Haltwise-Price": price})
        assert resumed.haltwise["fallback"] == "answer refused"
        assert agrees and answer == whole[1]
        assert tokens == resumed.usage["completion_tokens"] > full
    (at,) = [one for one in everything["by_price"] if one["price"] == 1][:1] or [None]
    assert at is None or at["saving"]["estimate"] < 0


@pytest.mark.parametrize("answers", ["seen", "free"])
@pytest.mark.parametrize(("kind", "chat"), [("vllm", True), ("sglang", True), ("vllm", False)])
def test_an_audit_pays_for_looks_as_who_halts_does(
    kind: Kind, chat: bool, answers: str, serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"looks": True, "answers": answers}
    plain, looking = (serving(kind, control=one, **settings) for one in ("off", "observe"))
    full = ask(looking.client, plan, chat)
    looks = full.haltwise["probes"]
    assert not full.haltwise["halted"] and looks["num"] == 7
    num_full = full.usage["completion_tokens"] - looks["completion_tokens"]
    wait_until(lambda: status(looking)["groups"]["everything"]["audits"] == 1)
    told = status(looking)
    assert (told["failures"], told["too_long"]) == (0, 0)
    asked_after = 0 if answers == "seen" else 2 * (plan.answer + 1)
    assert told["audit_tokens"] == looks["completion_tokens"] + asked_after
    by_price = told["groups"]["everything"]["by_price"]
    for i in (0, 18, 35):
        measured, again = by_price[i], replace(plan, name=f"{plan.name}x{i}")
        price = {"X-Haltwise-Price": str(measured["price"])}
        halted = ask(plain.client, again, chat, headers=price)
        assert halted.haltwise["halted"] == (i > 0)
        held = halted.haltwise["legs"][0]["completion_tokens"] - halted.haltwise["position"]
        num = halted.usage["completion_tokens"] - (held if i else 0)  # while a second leg begins
        saved = 1 - num / num_full
        assert measured["saving"]["estimate"] == pytest.approx(saved, abs=1e-6)
        assert measured["loss"]["estimate"] == halted.haltwise["halted"]
    assert [at for at, *_ in answers_of(tmp_path / "state")[:-1]] == [12, 20]


def test_whom_nobody_audits_gets_the_bytes_of_who_has_no_control(
    serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    plain, looking = serving(), serving(control="observe", audit=1e-9)
    for headers in ({}, {"X-Haltwise-Price": "10"}, OFF):
        one, other = (ask(p.client, plan, headers=headers) for p in (plain, looking))
        assert one.body == other.body


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("broken")


FAILURES = ["draw_audit", "Bookkeeper.put", "Record.put", "Replay.add", "digest", "groups_of"]
FAILURES += ["Roster.head_for", "Roster.ended", "Raters.rater_of"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("broken", FAILURES)
@pytest.mark.parametrize(
    ("control", "audit"), [("observe", 1e-9), ("observe", 1.0), ("apply", 1.0)]
)
@pytest.mark.whole
def test_no_failure_of_the_control_moves_a_byte(
    broken: str,
    control: str,
    audit: float,
    stream: bool,
    serving: Governed,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, failing = serving(), serving(control=control, audit=audit)
    owner, _, name = broken.rpartition(".")
    monkeypatch.setattr(getattr(governed, owner) if owner else governed, name, boom)
    found = ask(failing.client, plan, stream=stream)
    begins = broken not in ("draw_audit", "groups_of", "Raters.rater_of")
    unhalted = control == "apply" or (audit == 1.0 and begins)
    expected = ask(plain.client, plan, stream=stream, headers=NEVER if unhalted else {})
    assert found.status == expected.status
    assert found.body == expected.body.replace(b"1e-09", b"0.0")


def test_a_client_that_leaves_makes_no_audit(serving: Governed, plan: Plan) -> None:
    looking = serving(control="observe")
    hanging = Plan(plan.name, trouble="hangs", at=10, legs=(1,))
    with connected(looking) as client:
        client.sendall(bytes_of(hanging, True, True, {}))
        client.recv(1)
    assert status(looking)["groups"]["everything"]["audits"] == 0


@pytest.mark.parametrize(("days", "num"), [(1e-12, 0), (1.0, 1)])
def test_the_state_keeps_rows_for_as_many_days_as_are_asked(
    days: float, num: int, plan: Plan, tmp_path: Path
) -> None:
    head = saved_head(tmp_path / "head", sure_head())
    settings: dict[str, Any] = {"control": "observe", "state": tmp_path / "state"}
    with FakeUpstream("vllm") as upstream:
        config = ServeConfig(head=head, upstream=upstream.url, keep_days=days, **settings)
        with proxied(config) as proxy:
            ask(proxy.client, plan)
    with sqlite3.connect(tmp_path / "state") as file:
        assert file.execute("SELECT count(*) FROM request").fetchone() == (num,)


def test_audits_that_the_server_does_not_answer_are_none(serving: Governed, plan: Plan) -> None:
    looking = serving(control="observe")
    ask(looking.client, Plan(plan.name, trouble="500", legs=(2, 3)))
    told = status(looking)
    assert told["groups"]["everything"]["audits"] == 0 and told["failures"] == 1
    assert told["broken_off"] == {"audits": 1, "why": "asking for its answers failed: no answer"}


def test_audits_wait_for_a_server_that_has_no_time_now(
    serving: Governed, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "_PAUSES", (0.01,) * 3)
    answer, tries = Auditor._answer, list[int]()
    errors = [UpstreamError("timeout", "busy"), UpstreamError("status", "busy", wait=0.01)]

    async def busy(asking: Auditor, reader: Any, position: int) -> Any:
        tries.append(position)
        if errors:
            raise errors.pop()
        return await answer(asking, reader, position)

    monkeypatch.setattr(Auditor, "_answer", busy)
    looking = serving(control="observe")
    ask(looking.client, plan)
    told = status(looking)
    assert told["groups"]["everything"]["audits"] == 1 and told["failures"] == 0
    assert tries == [12, 12, 12, 20]


def test_groups_are_tasks_segments_and_what_a_tenant_asks_of_a_task(
    serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    looking, names = serving(control="observe"), {"X-Haltwise-Task", "X-Haltwise-Segment"}
    for key, more in (("k", names), ("k", set()), ("other", names)):
        headers = {"Authorization": f"Bearer {key}"} | dict.fromkeys(more, "sums")
        ask(looking.client, plan, headers=headers)
    one, other = tenant_of("Bearer k"), tenant_of("Bearer other")
    assert {name: group["audits"] for name, group in status(looking)["groups"].items()} == {
        "everything": 3,
        "task:sums": 2,
        "segment:sums": 2,
        f"tenant:{one} task:sums": 1,
        f"tenant:{one}": 1,
        f"tenant:{other} task:sums": 1,
    }

    def kept() -> set[tuple[str, str]]:
        with sqlite3.connect(tmp_path / "state") as file:
            return {*file.execute("SELECT task, segment FROM request")}

    wait_until(lambda: len(kept()) == 2)  # written in the background
    hidden = digest(installation_key(key_file_of(tmp_path / "state")), "sums")
    assert kept() == {(hidden, hidden), (None, None)}


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_a_row_with_all_that_was_spent(
    stream: bool, serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    looking = serving(control="observe", audit=1e-9)
    headers = {"X-Haltwise-Session": "s", "Authorization": "Bearer k"}
    reply = ask(looking.client, plan, stream=stream, headers=headers, user="u")
    off = ask(looking.client, plan, stream=stream, headers={"X-Haltwise-Price": "1e-9"})
    looking.client.close()
    usage, told = reply.usage, reply.haltwise
    assert told["halted"] and len(told["legs"]) == 2 and not off.haltwise["halted"]
    names = 'session, "user", input_tokens, cached_tokens, reasoning_tokens, output_tokens, outcome'

    def rows() -> list[Any]:
        with sqlite3.connect(tmp_path / "state") as file:
            query = f"SELECT {names}, halted, seconds FROM request ORDER BY rowid"
            return file.execute(query).fetchall()

    wait_until(lambda: len(rows()) == 2)
    key = installation_key(key_file_of(tmp_path / "state"))
    spent = [usage["prompt_tokens"], None, told["position"], usage["completion_tokens"], "stop"]
    first, second = rows()
    assert list(first[:-1]) == [digest(key, "s"), digest(key, "u"), *spent, 1]
    num_full = off.usage["completion_tokens"]
    assert list(second[:2]) == [None, None] and second[5] == num_full and second[-2] == 0
    assert first[-1] > 0


def test_the_status_is_the_operators_if_there_is_a_key(
    serving: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    looking = serving(control="observe", operator_key_env="OPERATOR")
    for key, code in ((None, 401), ("Bearer other", 401), ("Basic secret", 401)):
        headers = {} if key is None else {"Authorization": key}
        assert looking.client.get("/v1/haltwise/control", headers=headers).status_code == code
    found = looking.client.get(
        "/v1/haltwise/control", headers={"Authorization": "Bearer secret"}
    ).json()
    assert found["mode"] == "observe" and found["audits_due"] > 0
    assert set(found["groups"]) == {"everything"}


def test_feedback_is_the_operators(
    serving: Governed, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    path, client, key = "/v1/haltwise/feedback", {"Authorization": "Bearer k"}, "Bearer secret"
    looking = serving(control="observe", operator_key_env="OPERATOR")
    found = ask(looking.client, plan, headers=client)
    said: Any = {"request": found.headers["x-haltwise-request"], "score": 0.0}
    codes = [
        looking.client.post(path, headers={"Authorization": shown}, content=content).status_code
        for shown, content in [
            (client["Authorization"], json.dumps(said)),
            (key, "[]"),
            (key, json.dumps(said | {"score": float("nan")})),
            (key, " " * 70_000),
            (key, json.dumps(said)),
            (key, json.dumps(said)),
        ]
    ]
    assert codes == [401, 400, 400, 413, 204, 400]


def test_labels_are_the_operators_and_know_the_right_answer(
    serving: Governed, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    looking = serving(control="observe", operator_key_env="OPERATOR", label_hours=1.0)
    full = ask(looking.client, plan)
    key = {"Authorization": "Bearer secret"}

    def told() -> Any:
        return looking.client.get("/v1/haltwise/control", headers=key).json()

    wait_until(lambda: told()["labels_due"] == 1)
    path = "/v1/haltwise/labels"
    waits = looking.client.get(path, headers=key).json()
    assert [one["request"] for one in waits] == [full.headers["x-haltwise-request"]]
    assert waits[0]["places"][0] == "full" and len(waits[0]["places"]) > 1
    assert looking.client.get(path).status_code == 401
    said: Any = {"request": full.headers["x-haltwise-request"], "gold": "nothing of it"}
    codes = [
        looking.client.post("/v1/haltwise/labels", headers=key, json=said | more).status_code
        for more in ({"gold": 7}, {"request": "other"}, {"self": 1}, {}, {})
    ]
    assert codes == [400, 400, 400, 204, 400]
    wait_until(lambda: told()["labels_due"] == 0)
    verdict = said | {"source": "judge", "right": {"full": 1}}
    del verdict["gold"]
    assert looking.client.post("/v1/haltwise/labels", headers=key, json=verdict).status_code == 400
    found = told()["groups"]["everything"]["by_price"]
    assert {one["loss"]["estimate"] for one in found} == {0.0} and told()["refused"] == 5
    for page in ("feedback", "breaker"):
        odd = looking.client.post(f"/v1/haltwise/{page}", headers=key, json={"self": 1})
        assert odd.status_code == 400


def test_what_nobody_watches_after_all_is_no_audit_and_has_a_row(
    serving: Governed, plan: Plan, tmp_path: Path
) -> None:
    looking = serving(control="observe")
    reply = ask(looking.client, replace(plan, top="400"))  # whoever asks for log probabilities
    assert reply.status == 200
    told = status(looking)
    assert told["groups"]["everything"]["audits"] == 0 and told["failures"] == 0

    def kept() -> list[Any]:
        with sqlite3.connect(tmp_path / "state") as file:
            asked = "SELECT outcome, reasoning_tokens, output_tokens FROM request"
            return file.execute(asked).fetchall()

    wait_until(lambda: bool(kept()))
    assert kept() == [("passed on", None, None)]


@dataclass
class Rivals:
    """A proxy with two heads, of which the challenger halts at 12 tokens and the champion at 20."""

    proxy: Proxy
    upstream: FakeUpstream
    sure: str
    bold: str

    def position(self, plan: Plan, name: str, session: str = "") -> Any:
        headers = {"X-Haltwise-Session": session} if session else {}
        reply = ask(self.proxy.client, replace(plan, name=name), headers=headers)
        return reply.haltwise["position"]

    def post(self, what: str, **body: Any) -> int:
        path, key = f"/v1/haltwise/{what}", {"Authorization": "Bearer secret"}
        return self.proxy.client.post(path, json=body, headers=key).status_code

    def told(self) -> Any:
        key = {"Authorization": "Bearer secret"}
        return self.proxy.client.get("/v1/haltwise/control", headers=key).json()

    def champion(self) -> Any:
        return next(one["head"] for one in self.told()["heads"] if one["role"] == "champion")


@pytest.fixture
def rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rivals]:
    monkeypatch.setenv("OPERATOR", "secret")
    sure = sure_head()
    bold = HaltHead(sure.config, sure.weights | {"b0": sure.weights["b0"] + 1})
    with FakeUpstream("vllm") as upstream:
        config = ServeConfig(
            saved_head(tmp_path / "sure", sure),
            upstream.url,
            challenger=(saved_head(tmp_path / "bold", bold),),
            control="observe",
            audit=0.0,
            operator_key_env="OPERATOR",
            state=tmp_path / "state",
        )
        with proxied(config) as proxy:
            yield Rivals(proxy, upstream, sure.digest, bold.digest)


def test_a_promoted_head_halts_from_the_next_request_on(plan: Plan, rivals: Rivals) -> None:
    """Streams that run are the old one's, and so are those behind a rollback."""
    upstream = rivals.upstream
    with ThreadPoolExecutor() as pool:
        assert rivals.position(plan, "a") == 20 and rivals.champion() == rivals.sure
        hanging = replace(plan, name="b", trouble="hangs", at=6, legs=(1,))
        running = pool.submit(ask, rivals.proxy.client, hanging)
        wait_until(lambda: bool(upstream.of(hanging)))
        assert rivals.post("promote", head=rivals.bold) == 400  # nobody knows if it is as good
        assert rivals.post("promote", head=rivals.bold, anyway=True) == 204
        wait_until(lambda: rivals.champion() == rivals.bold)
        assert rivals.position(plan, "c") == 12
        upstream.free(upstream.of(hanging)[0])
        assert running.result(PATIENCE).haltwise["position"] == 20
        assert rivals.post("rollback", all=True) == 400
        assert rivals.post("rollback") == 204
        wait_until(lambda: rivals.champion() == rivals.sure)
        assert rivals.position(plan, "d") == 20


@pytest.mark.whole
def test_a_challenger_serves_a_share_of_the_sessions_until_a_rollback(
    plan: Plan, rivals: Rivals, tmp_path: Path
) -> None:
    """Whoever it serves is served by it again, and the record has which head and how likely."""
    for wrong in (0, 1, "x", None, True):
        assert rivals.post("experiment", head=rivals.bold, share=wrong) == 400
    assert rivals.post("experiment", head=rivals.bold, share=0.5) == 204
    wait_until(lambda: bool(rivals.told()["canary"]))
    assert rivals.post("experiment", head=rivals.bold, share=0.5) == 400  # one serves already
    names = [[(f"s{n}", f"{n}x{m}") for n in range(12)] for m in range(3)]
    found = [[rivals.position(plan, name, one) for one, name in some] for some in names[:2]]
    assert found[0] == found[1] and set(found[0]) == {12, 20}
    assert rivals.post("rollback") == 204
    wait_until(lambda: not rivals.told()["canary"])
    assert {rivals.position(plan, name, one) for one, name in names[2]} == {20}
    expected = {(rivals.bold, 12, 0.5), (rivals.sure, 20, 0.5), (rivals.sure, 20, None)}

    def rows() -> list[Any]:
        with sqlite3.connect(tmp_path / "state") as file:
            asked = "SELECT head, position, head_probability FROM request"
            return file.execute(asked).fetchall()

    wait_until(lambda: len(rows()) == 36)
    assert set(rows()) == expected


def test_a_challenger_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = saved_head(tmp_path / "other", sure_head(rule="every 8 tokens"))
    head = saved_head(tmp_path / "head")
    told = r"than --head: decision_rule is 'every 8 tokens', expected 'every 4 tokens'$"
    with pytest.raises(InputError, match=told):
        create_app(
            ServeConfig(head, challenger=(other,), control="observe", state=tmp_path / "state")
        )
    with pytest.raises(InputError, match="--challenger is given, expected it with --control"):
        create_app(ServeConfig(head, challenger=(other,)))


def test_a_session_that_asks_again_is_followed(serving: Governed, plan: Plan) -> None:
    looking = serving(control="apply", follow_doubts=True)
    for session in ("", "one", "one", "two"):
        ask(looking.client, plan, headers={"X-Haltwise-Session": session})
    control = looking.client.get("/v1/haltwise/control").json()
    assert control["failures"] == 0
    wait_until(lambda: looking.client.get("/v1/haltwise/control").json()["dials"] == 1)


def test_who_asks_again_for_want_of_an_answer_doubts_none(serving: Governed) -> None:
    looking = serving(control="apply", follow_doubts=True)
    for trouble in ("500", "dies"):
        failing = Plan(f"x{trouble}", trouble=trouble, legs=(1,))
        for _ in range(2):
            ask(looking.client, failing, stream=False, headers={"X-Haltwise-Session": trouble})
    ask(looking.client, Plan("y"))  # its entry comes behind theirs
    told = looking.client.get
    wait_until(lambda: told("/v1/haltwise/control").json()["groups"]["everything"]["audits"] == 1)
    assert told("/v1/haltwise/control").json()["dials"] == 0


def test_without_a_key_or_a_control_nobody_tells_anything(
    serving: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serving(control="observe").client.post("/v1/haltwise/feedback").status_code == 403
    monkeypatch.setenv("OPERATOR", "secret")
    found = serving(operator_key_env="OPERATOR").client.post(
        "/v1/haltwise/feedback", headers={"Authorization": "Bearer secret"}
    )
    assert found.status_code == 404 and "control is off" in found.json()["error"]["message"]


def test_without_a_control_the_status_says_so(serving: Governed) -> None:
    assert serving().client.get("/v1/haltwise/control").json() == {"mode": "off"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"control": "observe"}, "--control is observe, expected --state with a file"),
        ({"state": Path("state")}, "--state is given, expected it with --control observe"),
        ({"target": 0.5}, "--target is given, expected it with --control observe or apply"),
        ({"control": "json:loads", "label_hours": 1.0}, "--label-hours is given, expected it with"),
        ({"control": "watch"}, "--control is 'watch', expected off, observe, apply or MODULE:NAME"),
        ({"control": "apply", "audit": 0.0}, "--audit is 0, expected above 0"),
        ({"control": "observe", "audit": -0.1}, "--audit is -0.1"),
        ({"control": "observe", "target": 1.0}, "--target is 1.0"),
        ({"control": "observe", "context": 0}, "--context is 0"),
        ({"control": "observe", "state": "postgresql://x/y"}, "expected --state-key with a file"),
        ({"telemetry": True}, "--telemetry is given, expected it with --control"),
        ({"replay_all": True}, "--replay-all is given, expected it with --control"),
        ({"control": "observe", "state": Path("no") / "where"}, "expected the file of a state"),
        ({"operator_key_env": "HALTWISE_NOT_SET"}, "HALTWISE_NOT_SET is not set"),
    ],
)
def test_bad_settings_are_refused(settings: Any, expected: str, tmp_path: Path) -> None:
    if settings.get("control") in ("observe", "apply") and len(settings) > 1:
        settings = {"state": tmp_path / "state"} | settings
    with pytest.raises(InputError, match=expected):
        create_app(ServeConfig(head=saved_head(tmp_path / "head"), **settings))


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_state_that_is_none_is_refused_or_made(content: bytes, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(content)
    config = ServeConfig(head=saved_head(tmp_path / "head"), control="observe", state=state)
    if content:
        with pytest.raises(InputError, match="not a database"):
            create_app(config)
    else:
        create_app(config)


@pytest.mark.whole
def test_apply_certifies_by_audits_and_then_halts_a_real_lm(tmp_path: Path) -> None:
    write_gguf(tmp_path / "embedded.gguf")
    asked = [
        {"role": "user", "content": prompt_of(question).removesuffix("<think>").strip()}
        for question in questions("sum", "test", 40)
    ]
    head = EMBEDDED.parent / "embedded-blind-head"
    with ExitStack() as stack:
        server = stack.enter_context(llama_server(tmp_path / "embedded.gguf"))
        settings: dict[str, Any] = {"control": "apply", "target": 0.7, "audit": 0.05}
        config = ServeConfig(head=head, upstream=server.url, state=tmp_path / "state", **settings)
        proxy = stack.enter_context(proxied(config))

        def halts(message: Any) -> bool:
            body = {"model": NAME, "messages": [message], "temperature": 0}
            found = proxy.client.post("/v1/chat/completions", json=body).raise_for_status()
            return bool(found.json()["usage"]["haltwise"]["halted"])

        due, num = status(proxy)["audits_due"], 0
        assert 0 < due < len(asked)
        while status(proxy)["audits_due"]:
            assert not halts(asked[num])
            num += 1
        assert num >= due
        told = status(proxy)
        everything = told["groups"]["everything"]
        assert told["failures"] == 0 and everything["audits"] == num
        assert told["most_tokens"] == SLOT_TOKENS  # as the server tells
        assert 0 < everything["price"] <= everything["ceiling"]
        assert everything["at_price"]["saving"]["estimate"] > 0.2
        wait_until(lambda: halts(asked[0]))  # it may be one of the few audits


def test_a_key_that_is_lost_or_readable_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, head = tmp_path / "state", saved_head(tmp_path / "head")
    config = ServeConfig(head=head, control="observe", state=state)
    create_app(config)
    key = key_file_of(state)
    key.unlink()
    create_app(config)  # nothing is known by a key yet
    assert not caplog.messages
    record = Record(store_of(state))
    record.put(RequestRow("a", 1.0))
    record.close()
    key.unlink()
    key.with_name("keys.json").write_text('{"sk": {}}')
    key.with_name("keys.json").chmod(0o640)
    create_app(replace(config, keys=key.with_name("keys.json")))
    (told,) = caplog.messages
    assert told.startswith(f"{key} was not there, and is a new key: what the state knows of")
    caplog.clear()
    for one in (key, key.with_name("keys.json")):
        one.chmod(0o644)
    create_app(replace(config, keys=key.with_name("keys.json")))
    expected = "holds keys and can be read by everybody (mode 644), expected 600"
    assert sorted(caplog.messages) == [f"{tmp_path / 'keys.json'} {expected}", f"{key} {expected}"]


@pytest.mark.parametrize("own", [0.01, 0.0])
def test_apply_serves_a_segment_what_the_status_says_whatever_the_heads_own_price_of_it(
    own: float, plan: Plan, tmp_path: Path
) -> None:
    certified = certified_head()
    config = replace(certified.config, default_price=0.1, segment_prices={"chains": own})
    head = saved_head(tmp_path / "head", HaltHead(config, certified.weights))
    keys = tmp_path / "keys"
    keys.write_text('{"k": {}, "cap": {"price": 0.2}, "same": {"price": 0.1}}')
    settings: dict[str, Any] = {"control": "apply", "state": tmp_path / "state", "keys": keys}
    with FakeUpstream("vllm") as upstream:
        settings |= {"upstream": upstream.url, "target": 0.3, "audit": 1e-9}
        with proxied(ServeConfig(head=head, **settings)) as proxy:

            def served(key: str = "k", **named: str) -> float:
                headers = {f"X-Haltwise-{name}": told for name, told in named.items()}
                headers |= {"Authorization": f"Bearer {key}"}
                return float(ask(proxy.client, plan, headers=headers).haltwise["price"])

            assert served(Segment="chains") == served() == 0.5
            assert served(Segment="chains", Price="0.3") == 0.3
            assert served("cap", Segment="chains") == served("cap") == 0.2
            assert served("same") == 0.1
            groups = status(proxy)["groups"]
    assert groups["everything"]["price"] == 0.5
