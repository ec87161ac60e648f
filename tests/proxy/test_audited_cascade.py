"""A control of a small and a large LM: its audits, what it serves, and whoever fails."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import pytest

from haltwise import HaltHead, InputError
from haltwise.control import cascade_replay, governed
from haltwise.control.status import read_library, table_of
from haltwise.policy.cascade import Cascade
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.app import Proxy as AppProxy
from lms.embedded import prompt_of
from lms.gguf import write_gguf
from lms.tasks import questions
from tests.control.test_governed import certified_head
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Plan
from tests.proxy.llama_server import NAME, llama_server
from tests.proxy.proxies import PATIENCE, PLAIN, Proxy, Reply, ask, proxied, wait_until
from tests.proxy.test_governed import answers_of, status
from tests.proxy.test_large import Serving, Two, cascade

OPERATOR = {"Authorization": "Bearer secret"}
# By place of the cascade that escalates there alone: at most at which prices (0.1, 1, 10) it takes
# the small LM's answer, and behind how many tokens; None where it escalates.
AT = {
    "nowhere": (28, 20, 12),
    "start": (None, None, None),
    "point": (None, None, 12),
    "end": (None, 20, 12),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, Any]]:
    """What tests may share: fakes that nothing is told, and proxies without a control."""
    with ExitStack() as stack:
        yield {"stack": stack}


@pytest.fixture
def serving(
    shared: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Proxies before two fakes; with a control all their requests are audits if none is said.

    Whoever tells its fakes something has to have its own.
    """

    def once(key: str, begin: Callable[[], Any]) -> Any:
        if key not in shared:
            shared[key] = shared["stack"].enter_context(begin())
        return shared[key]

    with ExitStack() as stack:

        def started(
            where: str, trouble: str = "", looks: bool = False, own: bool = False, **settings: Any
        ) -> Two:
            waits: Any = {"paced": 4, "probed": True} if looks else {}
            if own:
                small, large = (stack.enter_context(FakeUpstream()) for _ in range(2))
            else:
                small = once(f"small {looks}", lambda: FakeUpstream(**waits))
                large = once(f"large {trouble}", lambda: FakeUpstream(trouble=trouble))
            folder = tmp_path_factory.mktemp("cascade")
            cascade(where, folder, sure_head(probing="always") if looks else None)
            wanted: dict[str, Any] = {"large": large.url, "read_timeout": PATIENCE}
            wanted |= {"probe_timeout": PATIENCE} if looks else {}
            is_governed = settings.get("control", "off") != "off"
            wanted |= {"state": tmp_path / "state", "audit": 1.0} if is_governed else {}
            config = ServeConfig(head=folder, upstream=small.url, **wanted | settings)
            if is_governed or own:
                proxy = stack.enter_context(proxied(config))
            else:
                proxy = once(f"{where} {trouble} {looks} {settings}", lambda: proxied(config))
            direct = httpx2.Client(base_url=large.url, timeout=PATIENCE, verify=PLAIN)
            stack.enter_context(direct)
            return Two(proxy, small, large, direct)

        yield started


def audited(proxy: Proxy, num: int = 1) -> Any:
    """The status once so many audits have told something."""
    wait_until(lambda: status(proxy)["groups"]["everything"]["audits"] >= num)
    return status(proxy)


def by_price(told: Any) -> list[Any]:
    """What the lowest, the middle and the highest price lose and save: 0.1, just above 1, 10."""
    found = told["groups"]["everything"]["by_price"]
    return [found[0], found[18], found[-1]]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize("where", AT)
def test_an_audit_tells_what_every_price_would_have_lost_and_saved(
    serving: Serving, plan: Plan, where: str, chat: bool
) -> None:
    """By hand: a token of the large LM costs two; its answer is what nothing is lost against."""
    two = serving(where, control="observe")
    reply, full = ask(two.proxy.client, plan, chat), ask(two.direct, plan, chat)
    assert (reply.thought, reply.text, reply.finish) == (full.thought, full.text, full.finish)
    assert reply.haltwise["escalated"] == "start" and reply.haltwise["price"] == 0
    num = full.usage["completion_tokens"]
    assert num == 34  # 28 of the thought, its marker, 4 of the answer, and its end
    told = audited(two.proxy)
    assert (told["failures"], told["groups"]["everything"]["audits"]) == (0, 1)
    ends = {"nowhere": 0, "start": 0, "point": 20, "end": 29}
    for found, at in zip(by_price(told), AT[where], strict=True):
        small = num if at == 28 else ends[where] if at is None else at + 5
        cost = small + (2 * num if at is None else 0)
        assert found["saving"]["estimate"] == pytest.approx(1 - cost / (2 * num), abs=1e-6)
        assert found["loss"]["estimate"] == (at in (12, 20))
    halted = {at for at in AT[where] if at in (12, 20)}
    assert told["audit_tokens"] == num + 5 * len(halted)
    assert two.proxy.metric("haltwise_audit_tokens_total") == told["audit_tokens"]


@pytest.mark.parametrize("looks", [False, True], ids=["blind", "looks"])
@pytest.mark.parametrize("where", AT)
def test_what_an_audit_tells_is_what_serving_comes_to(
    serving: Serving, plan: Plan, where: str, looks: bool
) -> None:
    """Every look at an answer is paid until the small LM is left."""
    plain, looking = (serving(where, looks=looks, control=one) for one in ("off", "observe"))
    full = ask(looking.proxy.client, plan)
    num = 2 * full.usage["completion_tokens"]
    for found in by_price(audited(looking.proxy)):
        again = replace(plan, name=f"{plan.name}x{found['price']:.0f}")
        reply = ask(plain.proxy.client, again, headers={"X-Haltwise-Price": str(found["price"])})
        told, legs = reply.haltwise, [leg["completion_tokens"] for leg in reply.haltwise["legs"]]
        is_left, escalated = len(legs) > 1, told.get("escalated")
        until = 29 if escalated == "end" else told["position"]  # its thought's end marker counts
        held = legs[0] - until if is_left else 0  # while another leg begins
        spent = reply.usage["completion_tokens"] - held + (legs[-1] if escalated else 0)
        assert found["saving"]["estimate"] == pytest.approx(1 - spent / num, abs=1e-6)
        is_same = reply.text.replace(again.name, plan.name).strip() == full.text.strip()
        assert found["loss"]["estimate"] == (not is_same)


def test_a_cap_is_replayed_too(serving: Serving, plan: Plan) -> None:
    """The head halts after 4 tokens at a price of 10; the cap closes the thought at 6.

    The log-odds of halting are tanh(tanh(log10(price) - 0.25)), those of escalating -0.2: so the
    cascade escalates at the cap at a price of 0.1, and answers there at 1.39.
    """
    two, sure = serving("cap", control="observe"), replace(plan, logprobs=((0, -1.5),))
    full = ask(two.proxy.client, sure, headers={"X-Haltwise-Max-Tokens": "6"})
    assert full.thought == sure.thought() and full.text == sure.answer_text()  # it knows no cap
    found = audited(two.proxy)["groups"]["everything"]["by_price"]
    at_cap, answered, halted = found[0], found[20], found[-1]
    assert [one["loss"]["estimate"] for one in (at_cap, answered, halted)] == [0, 1, 1]
    assert at_cap["saving"]["estimate"] == pytest.approx(1 - (6 + 68) / 68, abs=1e-6)
    assert halted["saving"]["estimate"] == pytest.approx(1 - (4 + 5) / 68, abs=1e-6)
    # While the answer at the cap begins, the small LM goes on, to its end at most.
    assert 1 - (34 + 5) / 68 < answered["saving"]["estimate"] <= 1 - (6 + 5) / 68 + 1e-6


def test_labels_tell_who_of_the_two_was_right(
    serving: Serving, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the price that answers behind 20 tokens the small LM is right, and the large one wrong."""
    monkeypatch.setenv("OPERATOR", "secret")
    two = serving("point", control="observe", label_hours=1.0, operator_key_env="OPERATOR")

    def told(path: str = "control") -> Any:
        return two.proxy.client.get(f"/v1/haltwise/{path}", headers=OPERATOR).json()

    reply = ask(two.proxy.client, plan)
    wait_until(lambda: bool(told()["labels_due"]))
    (due,) = told("labels")
    assert due["request"] == reply.headers["x-haltwise-request"]
    assert due["places"] == ["full", "12"]
    verdict = {"request": due["request"], "source": "judge", "right": {"full": 0, "12": 1}}
    said = two.proxy.client.post("/v1/haltwise/labels", headers=OPERATOR, json=verdict)
    assert said.status_code == 204
    wait_until(lambda: not told()["labels_due"])
    lowest, _, highest = by_price(told())
    assert (lowest["loss"]["estimate"], highest["loss"]["estimate"]) == (0, -1)


@pytest.mark.whole
def test_the_large_lm_alone_serves_until_a_price_is_certified_and_again_after_a_drift(
    serving: Serving, plan: Plan
) -> None:
    """The small LM's own answers are the large one's; halted ones are not, and at last none is."""
    two = serving("nowhere", own=True, control="apply", audit=0.5, target=0.4)
    numbers = iter(range(10**6))

    def everything() -> Any:
        return status(two.proxy)["groups"]["everything"]

    def served(num: int) -> list[Any]:
        names = [f"{plan.name}x{next(numbers)}" for _ in range(num)]
        return [ask(two.proxy.client, replace(plan, name=name)).haltwise for name in names]

    due = status(two.proxy)["audits_due"]
    assert due > 1
    assert {(one.get("escalated"), one["price"]) for one in served(due)} == {("start", 0)}
    audited(two.proxy, due)
    assert 0.1 <= everything()["price"] < 1  # from 1 on it is halted, and then nothing agrees
    assert everything()["at_price"]["saving"]["estimate"] == pytest.approx(0.5)
    both = served(24)  # half of them are audits
    assert {one.get("escalated") for one in both} == {None, "start"}
    assert all(one["price"] == 0 for one in both if "escalated" in one)
    two.small.err()
    while everything()["price"]:
        served(4)
    assert {(one.get("escalated"), one["price"]) for one in served(2)} == {("start", 0)}


@pytest.mark.parametrize("where", AT)
def test_whom_nobody_audits_gets_the_bytes_of_who_has_no_control(
    serving: Serving, plan: Plan, where: str
) -> None:
    both = serving(where), serving(where, control="observe", audit=1e-9)
    for price, stream in product(("0.1", "1", "10"), (True, False)):
        headers = {"X-Haltwise-Price": price}
        one, other = (ask(two.proxy.client, plan, True, stream, headers) for two in both)
        assert without_held(one) == without_held(other)


def without_held(reply: Reply) -> bytes:
    """Its bytes, but for how far the small LM came while another leg began."""
    told = reply.haltwise
    if len(told["legs"]) < 2:
        return reply.body
    numbers = {"completion_tokens", "total_tokens", "prompt_tokens"}
    return json.dumps(
        json.loads(
            json.dumps(reply.events),
            object_hook=lambda one: {n: v for n, v in one.items() if n not in numbers},
        )
    ).encode()


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("broken")


FAILURES = ["draw_audit", "groups_of", "replay_of", "Bookkeeper.put", "Record.put", "digest"]
FAILURES += ["Roster.head_for", "Roster.ended", "Raters.rater_of", "CascadeReplay.add"]
FAILURES += ["CascadeReplay.end", "CascadeReplay.outcomes"]


@pytest.mark.parametrize("broken", FAILURES)
@pytest.mark.parametrize(("control", "audit"), [("observe", 1e-9), ("apply", 1.0)])
def test_no_failure_of_the_control_moves_a_byte(
    broken: str,
    control: str,
    audit: float,
    serving: Serving,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the price is the control's own, a client gets what the large LM says."""
    plain, failing = serving("end"), serving("end", control=control, audit=audit)
    owner, _, name = broken.rpartition(".")
    module = cascade_replay if owner == "CascadeReplay" else governed
    monkeypatch.setattr(getattr(module, owner) if owner else module, name, boom)
    found = ask(failing.proxy.client, plan)
    if control == "apply":
        full = ask(failing.direct, plan)
        assert (found.thought, found.text, found.finish) == (full.thought, full.text, full.finish)
        assert found.haltwise["escalated"] == "start"
    else:
        assert without_held(found) == without_held(ask(plain.proxy.client, plan))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("trouble", ["500", "dies", "html"])
def test_if_the_large_lm_fails_in_an_audit_the_small_one_answers_in_full(
    serving: Serving, plan: Plan, trouble: str, stream: bool
) -> None:
    two = serving("point", trouble=trouble, control="apply")
    reply = ask(two.proxy.client, plan, True, stream)
    assert (reply.thought, reply.text) == (plan.thought(), plan.answer_text())
    assert reply.haltwise["fallback"] == "large LM" and not reply.haltwise["halted"]
    told = status(two.proxy)
    assert (told["groups"]["everything"]["audits"], told["failures"]) == (0, 0)
    assert len(two.small.of(plan)) == 1


@pytest.mark.parametrize("trouble", ["500", "dies", "html", "ends"])
def test_if_the_small_lm_fails_in_an_audit_its_client_notices_nothing(
    serving: Serving, plan: Plan, trouble: str
) -> None:
    two = serving("nowhere", own=True, control="apply")
    two.small.fail(trouble)
    reply = ask(two.proxy.client, plan)
    assert (reply.thought, reply.text) == (plan.thought(), plan.answer_text())
    assert reply.haltwise["escalated"] == "start" and "fallback" not in reply.haltwise
    wait_until(lambda: bool(status(two.proxy)["failures"]))
    told = status(two.proxy)
    assert (told["groups"]["everything"]["audits"], told["failures"]) == (0, 1)
    assert bool(told["audit_tokens"]) == (trouble in ("dies", "ends"))  # after 30 of them


@pytest.mark.parametrize("control", ["observe", "apply"])
def test_a_price_of_0_is_the_large_lm_alone_and_no_audit(
    serving: Serving, plan: Plan, control: str
) -> None:
    two = serving("nowhere", control=control, large_model="big")
    for headers in ({"X-Haltwise-Price": "0"}, {"X-Haltwise-Off": "1"}):
        reply = ask(two.proxy.client, plan, headers=headers)
        assert reply.haltwise["escalated"] == "start"
    assert [one.body["model"] for one in two.large.of(plan)] == ["big", "big"]
    assert two.small.of(plan) == [] and status(two.proxy)["groups"]["everything"]["requests"] == 0


def test_what_nobody_watches_is_the_large_lms_while_it_lives(serving: Serving, plan: Plan) -> None:
    two = serving("nowhere", own=True, control="apply", large_model="big")
    several = ask(two.proxy.client, plan, n=2)
    assert several.status == 200 and json.loads(several.headers["x-haltwise"])["reason"]
    assert [one.body["model"] for one in two.large.of(plan)] == ["big"]
    assert two.small.of(plan) == []
    two.large.fail("500")
    assert ask(two.proxy.client, plan, n=2).status == 200
    assert [one.body["model"] for one in two.small.of(plan)] == ["fake"]


def test_the_record_tells_who_has_answered(serving: Serving, plan: Plan, tmp_path: Path) -> None:
    two = serving("point", control="observe", audit=1e-9)
    ask(two.proxy.client, plan)
    names = "reason, halted, position, head"

    def rows() -> list[Any]:
        with sqlite3.connect(tmp_path / "state") as file:
            return file.execute(f"SELECT {names} FROM request").fetchall()

    wait_until(lambda: bool(rows()))
    ((*told, head),) = rows()
    assert told == ["escalated", 0, 20] and head.startswith("cascade-")


def test_what_is_told_is_about_the_large_lm(serving: Serving, plan: Plan, tmp_path: Path) -> None:
    two = serving("point", control="observe")
    ask(two.proxy.client, plan)
    told = audited(two.proxy)
    assert told["reference"] == "large LM" and told["loss"] == "disagreement"
    answers = answers_of(tmp_path / "state")
    # The highest price answers behind 12 tokens; none at the small LM's own end.
    assert [(at, agrees, num) for at, _, agrees, num in answers] == [(12, 0, 17), (0, 1, 34)]
    table = table_of(read_library(tmp_path / "state"))
    assert "before the small LM answers under apply; all beside the large LM alone" in table
    text = two.proxy.client.get("/metrics").text
    assert "share of the bill at a price of 0 that is saved" in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"control": "json:loads"}, "--control is 'json:loads', expected observe or apply with"),
        ({"shadow": True}, "--shadow is given, which does not know of --large under --control app"),
        ({"challenger": (Path("x"),)}, "--challenger is given, which does not know of --large"),
        ({"promotion": "auto"}, "--promotion is given, which does not know of --large under"),
        ({"audit_traces": Path("x")}, "--audit-traces is given, which does not know of --large"),
        ({"replay_all": True}, "--replay-all is given, which does not know of --large under"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"control": "apply", "state": tmp_path / "state"} | settings
    if usual["control"] == "json:loads":
        del usual["state"]
    with pytest.raises(InputError, match=expected):
        create_app(of_both(cascade("end", tmp_path / "head"), **usual))
    assert not (tmp_path / "state").exists()


def of_both(head: Path, **settings: Any) -> ServeConfig:
    urls = {"upstream": "http://127.0.0.1:9", "large": "http://127.0.0.1:10"}
    return ServeConfig(head=head, **urls | settings)


def test_a_state_is_about_a_cascade_its_ratio_and_both_lms(tmp_path: Path) -> None:
    folder, settings = cascade("end", tmp_path / "end"), {"control": "observe"}
    about = {"of both": {}, "alone": {"large": None}}
    for name, more in about.items():
        config = of_both(folder, **settings | {"state": tmp_path / name} | more)
        control = AppProxy(config).control
        assert control is not None
        control.close()
    found = Cascade.load(folder)
    dear = replace(found.config, price_ratio=3.0)
    Cascade(found.head, dear, found.weights).save(tmp_path / "dear")
    other = replace(found.config, large_lm="another")
    Cascade(found.head, other, found.weights).save(tmp_path / "other")
    another = "the state is about another cascade: expected the same folder, price ratio and LMs"
    wrong: list[tuple[str, Path, dict[str, Any], str]] = [
        (
            "of both",
            folder,
            {"large": None},
            "about a cascade and this is a head: expected --large",
        ),
        ("alone", folder, {}, "about a head and this is a cascade: expected no --large"),
        ("of both", tmp_path / "dear", {}, another),
        ("of both", tmp_path / "other", {}, another),
        ("of both", cascade("start", tmp_path / "start"), {}, another),
        ("of both", folder, {"large_model": "big"}, another),
    ]
    for name, head, more, expected in wrong:
        with pytest.raises(InputError, match=expected):
            create_app(of_both(head, **settings | {"state": tmp_path / name} | more))


def test_a_certificate_of_the_head_alone_is_none_of_the_cascade(tmp_path: Path) -> None:
    folder = cascade("end", tmp_path / "head", certified_head())
    settings: dict[str, Any] = {"control": "apply", "target": 0.5}
    alone = AppProxy(of_both(folder, **settings | {"large": None, "state": tmp_path / "alone"}))
    both = AppProxy(of_both(folder, **settings | {"state": tmp_path / "both"}))
    for proxy, is_certified in ((alone, True), (both, False)):
        assert proxy.control is not None
        assert (proxy.control.status()["audits_due"] == 0) == is_certified
        proxy.control.close()


@pytest.mark.whole
def test_two_real_lms_are_audited_and_then_the_small_one_answers(tmp_path: Path) -> None:
    """Both have the embedded LM here: unhalted, the small one says what the large one says."""
    write_gguf(tmp_path / "embedded.gguf")
    asked = [
        {"role": "user", "content": prompt_of(question).removesuffix("<think>").strip()}
        for question in questions("sum", "test", 40)
    ]
    head = sure_head(CLOSE, "every 12 tokens")
    patient = HaltHead(head.config, head.weights | {"b0": head.weights["b0"] - 9})
    folder = cascade("nowhere", tmp_path / "cascade", patient)
    with ExitStack() as stack:
        servers = [stack.enter_context(llama_server(tmp_path / "embedded.gguf")) for _ in range(2)]
        config = ServeConfig(
            head=folder,
            upstream=servers[0].url,
            large=servers[1].url,
            control="apply",
            target=0.7,
            audit=0.05,
            state=tmp_path / "state",
            context=1024,
        )
        proxy = stack.enter_context(proxied(config))

        def told(message: Any) -> Any:
            body = {"model": NAME, "messages": [message], "temperature": 0}
            found = proxy.client.post("/v1/chat/completions", json=body).raise_for_status()
            return found.json()["usage"]["haltwise"]

        due = status(proxy)["audits_due"]
        assert 0 < due < 20
        assert {told(message)["escalated"] for message in asked[:due]} == {"start"}
        everything = audited(proxy, due)["groups"]["everything"]
        assert (everything["audits"], everything["price"] > 0) == (due, True)
        assert any("escalated" not in told(message) for message in asked[due:])
