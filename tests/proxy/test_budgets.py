"""The proxy spends no more than its budgets, and says in one line why it does not go on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from haltwise import InputError
from haltwise.control.budgets import Budgets
from haltwise.control.store import store_of
from haltwise.control.tariffs import UNIT, Tariff
from haltwise.proxy import ServeConfig, app, create_app
from haltwise.proxy.billing import BudgetFile, Cashier, Size
from haltwise.proxy.client import RefusedError
from haltwise.proxy.completion import WatchedCompletion
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.config import tenant_of
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.upstream import UpstreamLeg
from haltwise.proxy.wire import UpstreamError
from haltwise.session.thought import PointRules
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Plan
from tests.proxy.proxies import PATHS, PATIENCE, Proxy, ask, proxied, saved_head, wait_until

#: Dollars of 1,000,000 tokens: a generated one costs 2,000 nano-dollars, and one of a prompt 1,000.
TARIFFS = {"unit": UNIT, "models": {"fake": {"input": 1, "output": 2}}}
NEVER = {"X-Haltwise-Price": "1e-9"}
Serving = Callable[..., Proxy]


def written(path: Path, told: Any) -> Path:
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """Proxies before a fake, with budgets."""
    with ExitStack() as stack:

        def started(budgets: Any, keys: Any = None, looks: bool = False, **settings: Any) -> Proxy:
            policy = sure_head(CLOSE, probing="always" if looks else "at_halt")
            waits: Any = {"paced": 4, "probed": True} if looks else {}
            settings |= {"probe_timeout": PATIENCE} if looks else {}
            upstream = stack.enter_context(FakeUpstream("vllm", **waits))
            settings = {"tariffs": written(tmp_path / "tariffs", TARIFFS)} | settings
            settings |= {} if keys is None else {"keys": written(tmp_path / "keys", keys)}
            config = ServeConfig(
                head=saved_head(tmp_path / "head", policy),
                upstream=upstream.url,
                state=tmp_path / "state",
                budgets=written(tmp_path / "budgets", budgets),
                **settings,
            )
            return stack.enter_context(proxied(config))

        yield started


def account(proxy: Proxy, scope: str = "everything") -> Any:
    """How an account stands, once nothing is held back any more."""

    def told() -> Any:
        found = proxy.client.get("/v1/haltwise/control").raise_for_status().json()["budgets"]
        assert (found["over"], found["trouble"]) == (0, "")
        return next((one for one in found["accounts"] if one["id"].startswith(scope)), None)

    wait_until(lambda: (one := told()) is not None and not one["held_tokens"])
    return told()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ({}, {}),
        (NEVER, {}),
        ({"X-Haltwise-Off": "1"}, {}),
        ({}, {"stream": False}),
        ({}, {"chat": False}),
    ],
)
def test_a_request_is_billed_what_its_own_usage_tells(
    serving: Serving, plan: Plan, headers: dict[str, str], more: Any, looks: bool
) -> None:
    proxy = serving({"everything": {"dollars": 1, "tokens": 10**6}}, looks=looks)
    usage = ask(proxy.client, plan, headers=headers, **more).usage
    found = account(proxy)
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    assert prompt > 0 and completion > 0
    assert found["spent_tokens"] == prompt + completion
    assert found["spent_nano"] == 1_000 * prompt + 2_000 * completion
    assert found["requests"] == 1


@pytest.mark.whole
def test_64_requests_at_once_spend_no_more_than_there_is(serving: Serving, plan: Plan) -> None:
    proxy = serving({"everything": {"dollars": 0.01}})

    def status(number: int) -> int:
        return ask(proxy.client, plan, max_tokens=60).status

    with ThreadPoolExecutor(64) as pool:
        codes = list(pool.map(status, range(64)))
    assert set(codes) == {200, 429} and codes.count(200) >= 3
    assert 0 < account(proxy)["spent_nano"] <= 10_000_000
    assert "haltwise_budget_refused_total" in proxy.client.get("/metrics").text


def test_a_budget_limits_an_answer_before_it_refuses_one(serving: Serving, plan: Plan) -> None:
    proxy = serving({"request": {"tokens": 3_000}, "everything": {"tokens": 10**6}})
    whole = ask(proxy.client, plan, headers=NEVER)
    assert whole.status == 200 and 0 < account(proxy)["spent_tokens"] < 3_000
    assert "haltwise_budget_cut_total 1.0" in proxy.client.get("/metrics").text
    refused = ask(proxy.client, plan, headers=NEVER | {"X-Haltwise-Max-Cost": "0.0001"})
    assert (refused.status, "retry-after" in refused.headers) == (400, False)
    assert b"the budget of request has too little left for this request, which" in refused.body


def test_whoever_is_short_is_told_when_to_come_again(serving: Serving, plan: Plan) -> None:
    hours = {"hours": 24}
    keys = {"poor": {"budget": {"tokens": 100} | hours}, "rich": {}}
    proxy = serving({"tenant": {"tokens": 10**6} | hours}, keys)
    poor = ask(proxy.client, plan, headers={"Authorization": "Bearer poor"})
    assert poor.status == 429 and b"the budget of tenant has too little left for" in poor.body
    assert 1 <= int(poor.headers["retry-after"]) <= 86_400
    assert ask(proxy.client, plan, headers={"Authorization": "Bearer rich"}).status == 200
    assert account(proxy, "tenant")["requests"] == 1


def test_the_status_tells_the_limit_of_every_account(serving: Serving, plan: Plan) -> None:
    """A tenant's own, else everybody's; null is none, and of a window under another budget too."""
    keys = {"own": {"budget": {"tokens": 50_000}}, "usual": {}}
    budgets = {"everything": {"dollars": 2, "tokens": 10**6}, "tenant": {"dollars": 1}}
    proxy = serving(budgets | {"session": {"tokens": 20_000}}, keys)
    session = {"X-Haltwise-Session": "one"}
    for key in keys:
        headers = {"Authorization": f"Bearer {key}"} | session
        assert ask(proxy.client, plan, headers=headers).status == 200
    told = proxy.client.get("/v1/haltwise/control").raise_for_status().json()["budgets"]
    assert told["num_accounts"] == len(told["accounts"]) == 5
    assert told["accounts"][0]["id"] == "everything"
    found = {one["id"]: (one["limit_nano"], one["limit_tokens"]) for one in told["accounts"]}
    own, usual = (f"tenant {tenant_of(f'Bearer {key}')}" for key in keys)
    assert found.pop("everything") == (2 * 10**9, 10**6)
    assert (found.pop(own), found.pop(usual)) == ((None, 50_000), (10**9, None))
    assert set(found.values()) == {(None, 20_000)}


def test_metrics_tell_of_everything_and_of_no_tenant(
    serving: Serving, plan: Plan, tmp_path: Path
) -> None:
    keys = {"secret": {"budget": {"tokens": 10**6}}}
    proxy = serving({"everything": {"dollars": 2}, "tenant": {"tokens": 10**6}}, keys)

    def told() -> dict[str, float]:
        text = proxy.client.get("/metrics").raise_for_status().text
        assert tenant not in text
        families = text_string_to_metric_families(text)
        return {one.name: one.value for family in families for one in family.samples}

    tenant = tenant_of("Bearer secret")
    assert told()["haltwise_budget_spent_dollars"] == 0
    assert ask(proxy.client, plan, headers={"Authorization": "Bearer secret"}).status == 200
    spent, found = account(proxy), told()
    assert found["haltwise_budget_limit_dollars"] == 2
    assert found["haltwise_budget_spent_dollars"] == pytest.approx(spent["spent_nano"] / 10**9)
    assert found["haltwise_budget_spent_tokens"] == spent["spent_tokens"] > 0
    assert {"haltwise_budget_limit_tokens", "haltwise_budget_urgency"}.isdisjoint(found)
    with closing(sqlite3.connect(tmp_path / "state", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        away = told()
    assert "haltwise_requests_total" in away and "haltwise_budget_spent_dollars" not in away


def test_a_session_has_a_budget_of_its_own(serving: Serving, plan: Plan) -> None:
    proxy = serving({"session": {"tokens": 2_000}})
    first = {"X-Haltwise-Session": "one"}
    replies = [ask(proxy.client, plan, headers=first, max_tokens=64) for _ in range(20)]
    assert (replies[0].status, replies[-1].status) == (200, 429)
    assert "retry-after" not in replies[-1].headers  # no window ends
    assert (
        ask(proxy.client, plan, headers={"X-Haltwise-Session": "two"}, max_tokens=64).status == 200
    )
    assert ask(proxy.client, plan, max_tokens=64).status == 200
    assert account(proxy, "session")["spent_tokens"] <= 2_000


def test_what_fails_before_it_begins_costs_nothing(serving: Serving) -> None:
    proxy = serving({"everything": {"tokens": 10**6}})
    for trouble in ("500", "400"):
        plan = Plan(f"fails{trouble}", trouble=trouble, at=0)
        assert ask(proxy.client, plan).status == int(trouble)
    assert account(proxy)["spent_tokens"] == 0


def test_what_nobody_counts_is_taken_to_cost_all_that_it_can(serving: Serving, plan: Plan) -> None:
    proxy = serving({"everything": {"tokens": 10**6}})
    assert ask(proxy.client, plan, n=2, max_tokens=64).status == 200
    assert account(proxy)["spent_tokens"] >= 2 * 64


def test_an_lm_without_a_tariff_is_never_free(serving: Serving, plan: Plan) -> None:
    proxy = serving({"everything": {"dollars": 1}})
    for model in ("other", "", None, 7):
        found = ask(proxy.client, plan, model=model)
        assert found.status == 400 and b"nobody has said what the tokens" in found.body


def test_what_a_right_answer_is_worth_is_a_price(serving: Serving, plan: Plan) -> None:
    """1,000 tokens cost 0.002 dollars: 0.1 right answers of 2 cents."""
    keys = {"k": {"value": 0.02}, "p": {"price": 0.3}}
    proxy = serving({"everything": {"tokens": 10**9}}, keys, value=0.2)

    def price(key: str, **headers: str) -> Any:
        found = ask(proxy.client, plan, headers={"Authorization": f"Bearer {key}"} | headers)
        return found.usage["haltwise"]["price"] if found.status == 200 else found.status

    assert price("k") == pytest.approx(0.1)
    assert price("k", **{"X-Haltwise-Value": "0.002"}) == pytest.approx(1.0)
    assert price("k", **{"X-Haltwise-Price": "0.7"}) == 0.7
    assert price("p") == 0.3
    for wrong in ("0", "-1", "nan", "inf", "much", "1e-320"):
        assert price("k", **{"X-Haltwise-Value": wrong}) == 400
    assert price("k", **{"X-Haltwise-Value": "1", "X-Haltwise-Price": "1"}) == 400


def test_where_the_state_is_away_nothing_is_spent(
    serving: Serving, plan: Plan, tmp_path: Path
) -> None:
    proxy = serving({"everything": {"tokens": 10**6}})
    with closing(sqlite3.connect(tmp_path / "state", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = ask(proxy.client, plan)
        assert refused.status == 503 and b"the budgets cannot be asked" in refused.body
        assert refused.headers["retry-after"] == "1"
    assert ask(proxy.client, plan).status == 200
    assert account(proxy)["requests"] == 1


def test_a_reload_takes_other_budgets_of_tenants(tmp_path: Path) -> None:
    """Nothing of what nobody could keep."""
    tenant = f"tenant {tenant_of('Bearer k')}"
    proxy = app.Proxy(settings(tmp_path, budgets=TOKENS, keys={"k": {"budget": {"tokens": 5}}}))
    assert proxy.cashier is not None
    for told, tokens in [(5, 5), ({"tokens": 7}, 7), (PACED, 7), ({"dollars": 1}, 7), (None, None)]:
        entry = {} if told is None else {"budget": told}
        written(tmp_path / "keys", {"k": entry})
        proxy.reload()
        own = proxy.cashier._budget_of(tenant)
        assert (own and own.tokens) == tokens
    written(tmp_path / "budgets", {"everything": PACED})
    proxy.reload()
    assert proxy.cashier.everything is not None
    assert proxy.cashier.everything.budget.requests is None
    proxy.cashier.budgets.close()


CHAT, TEXT = PATHS[True], PATHS[False]
PICTURE = [{"content": [{"type": "image_url"}]}]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {"max_completion_tokens": 1, "max_tokens": 60}, (266, 60, 1)),
        (CHAT, {"max_tokens": 60, "n_predict": 70}, (266, 70, 1)),
        (CHAT, {"max_tokens": 60, "n_predict": -1}, (266, None, 1)),
        (CHAT, {"n_predict": 70}, (266, None, 1)),
        (CHAT, {"max_output_tokens": 1}, (266, None, 1)),
        (CHAT, {"max_completion_tokens": 0, "max_tokens": 60}, (266, None, 1)),
        (CHAT, {"max_tokens": "60"}, (266, None, 1)),
        (CHAT, {"max_tokens": True}, (266, None, 1)),
        (TEXT, {"max_completion_tokens": 1}, (266, None, 1)),
        (TEXT, {"prompt": ["a", "b"], "n": 3, "max_tokens": 60}, (266, 60, 6)),
        (TEXT, {"prompt": [[1, 2], [3]], "best_of": 2, "max_tokens": 60}, (266, 60, 4)),
        (TEXT, {"prompt": [1, 2, 3], "max_tokens": 60}, (266, 60, 1)),
        (CHAT, {"messages": PICTURE}, (1_000, None, 1)),
        (CHAT, {"messages": 7, "chat_template": "{{ 'a' * 1000 }}"}, (1_000, None, 1)),
        ("/v1/responses", {"input": PICTURE, "max_output_tokens": 60}, (1_000, 60, 1)),
        ("/v1/responses", {"input": [{"type": "item_reference"}]}, (1_000, None, 1)),
        ("/v1/responses", {"input": "a", "previous_response_id": "r"}, (1_000, None, 1)),
        ("/v1/responses", {"max_tokens": 60}, (266, None, 1)),
        ("/v1/fim/completions", {"max_tokens": 60}, (266, None, 1)),
        ("/v1/embeddings", {"input": ["a"]}, (266, 0, 1)),
        ("/v1/audio/transcriptions", {}, (1_000, None, 1)),
    ],
)
def test_a_request_is_as_large_as_any_server_may_read_it(
    path: str, body: Any, expected: tuple[int, int | None, int], tmp_path: Path
) -> None:
    file, rules = (
        BudgetFile(written(tmp_path / "b", TOKENS)),
        PointRules(sure_head().config.halting),
    )
    with closing(Budgets(store_of(tmp_path / "state"))) as budgets:
        cashier = Cashier(budgets, file, {}, None, rules, 1_000, Metrics())
        asked = {"model": "fake"} | body if body else {}
        size, limit = cashier.size_of(path, 10, asked, is_watched=False, looks=False)
        found = size(limit or 0)
        assert (found.num_input, limit, found.num_choices) == expected
        with pytest.raises(RefusedError, match="n is '3', expected a whole number"):
            cashier.size_of(path, 10, {"n": "3"}, is_watched=False, looks=False)


def test_a_first_leg_that_goes_on_unheard_is_held_back_too() -> None:
    """Halted behind k of 100 tokens, both legs generate all that they may."""
    tariff = Tariff.read({"input": 1, "output": 2})
    held = Size(num_input=10, num_output=100, num_goes_on=1).spent()
    assert held.input_tokens is not None and held.output_tokens is not None
    most = tariff.cost(held.input_tokens, 0, held.output_tokens)
    for k in range(101):
        assert tariff.cost(10 + 10 + k + 64, 0, 100 + 100 - k) <= most


@pytest.mark.parametrize(
    "told",
    [
        '{"prompt_tokens": -5, "completion_tokens": 3}',
        '{"prompt_tokens": 5, "completion_tokens": -3}',
        f'{{"prompt_tokens": {10**24}, "completion_tokens": 3}}',
        f'{{"prompt_tokens": 5, "completion_tokens": {10**24}}}',
        '{"prompt_tokens": NaN, "completion_tokens": "7"}',
        f'{{"prompt_tokens": 5, "prompt_tokens_details": {{"cached_tokens": {-(10**24)}}}}}',
    ],
)
@pytest.mark.parametrize("headers", [{}, NEVER])
def test_a_usage_that_makes_no_sense_costs_what_was_seen(
    serving: Serving, told: str, headers: dict[str, str]
) -> None:
    proxy = serving({"everything": {"dollars": 1, "tokens": 10**6}})
    answer = ask(proxy.client, Plan("lies", told=told), headers=headers, stream=False)
    assert answer.status == 200
    assert 0 < account(proxy)["spent_nano"] < 10**9


@pytest.mark.parametrize("looks", [False, True])
def test_an_answer_that_breaks_off_costs_no_looks_that_it_never_had(
    serving: Serving, looks: bool
) -> None:
    proxy = serving({"everything": {"tokens": 10**12}}, looks=looks)
    broken = Plan("broken", trouble="dies", at=2, legs=(1,))
    assert ask(proxy.client, broken, stream=False).status == 502
    assert 2 < account(proxy)["spent_tokens"] < 2_000


def test_other_endpoints_cost_all_that_they_can(serving: Serving) -> None:
    proxy = serving({"everything": {"tokens": 10**6}}, context=500)
    asked = {"model": "fake"}
    assert proxy.client.post("/v1/echo", json=asked).status_code == 203
    assert account(proxy)["spent_tokens"] == len(json.dumps(asked, separators=(",", ":"))) + 756
    proxy.client.post("/v1/messages/count_tokens", json=asked)
    assert account(proxy)["requests"] == 1


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_more_answers_than_can_be_counted_are_refused(
    serving: Serving, plan: Plan, name: str
) -> None:
    proxy = serving({"everything": {"dollars": 1}})
    more: Any = {name: 10**30}
    assert ask(proxy.client, plan, **more).status == 429


def test_a_server_that_is_lost_later_has_not_answered_for_nothing(
    serving: Serving, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WatchedCompletion.whole

    async def lost(completion: WatchedCompletion, first: UpstreamLeg) -> Any:
        await whole(completion, first)
        raise UpstreamError("unreachable", "upstream cannot be reached")

    monkeypatch.setattr(WatchedCompletion, "whole", lost)
    proxy = serving({"everything": {"tokens": 10**6}})
    assert ask(proxy.client, plan, stream=False).status == 502
    assert account(proxy)["spent_tokens"] > 0


@pytest.mark.parametrize(
    ("chat", "limits", "expected"),
    [
        (True, {}, {"max_tokens": 9}),
        (True, {"max_completion_tokens": 20}, {"max_completion_tokens": 9}),
        (False, {"max_completion_tokens": 20}, {"max_completion_tokens": 9, "max_tokens": 9}),
        (True, {"max_tokens": 20, "n_predict": 30}, {"max_tokens": 9, "n_predict": 9}),
        (True, {"max_tokens": 20, "n_predict": 5}, {"max_tokens": 9, "n_predict": 5}),
        (True, {"max_tokens": -1}, {"max_tokens": 9}),
    ],
)
def test_a_limit_is_set_wherever_a_server_may_heed_it(
    chat: bool, limits: Any, expected: Any
) -> None:
    assert CompletionRequest(chat, limits).limited(9).body == expected


def test_a_client_that_sets_a_limit_learns_that_nobody_keeps_it(tmp_path: Path) -> None:
    with proxied(ServeConfig(head=saved_head(tmp_path / "head"))) as proxy:
        found = ask(proxy.client, Plan("a"), headers={"X-Haltwise-Max-Cost": "1"})
    assert found.status == 400 and b"expected a proxy with --budgets" in found.body


def settings(tmp_path: Path, **more: Any) -> ServeConfig:
    usual: dict[str, Any] = {"state": tmp_path / "state"}
    files = {name: written(tmp_path / name, told) for name, told in more.items() if name in FILES}
    return ServeConfig(head=saved_head(tmp_path / "head"), **usual | more | files)


FILES = ("budgets", "tariffs", "keys")
DOLLARS = {"everything": {"dollars": 1}}
TOKENS = {"everything": {"tokens": 1}}
PACED = {"tokens": 9, "hours": 1, "requests": 9}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"budgets": {}}, "expected budgets of everything, tenant"),
        ({"budgets": {"user": {"tokens": 1}}}, "expected budgets of everything, tenant"),
        ({"budgets": {"tenant": {"tokens": -1}}}, "tenant: tokens is -1"),
        ({"budgets": {"request": {"tokens": 1, "hours": 1}}}, "request: hours are given"),
        ({"budgets": DOLLARS}, "dollars are given, expected --tariffs"),
        ({"budgets": TOKENS, "state": None}, "expected --state"),
        ({"budgets": {"everything": PACED}}, "expected --control apply"),
        ({"budgets": TOKENS, "value": 1.0}, "--value is 1.0, expected --tariffs"),
        ({"budgets": TOKENS, "value": -1.0}, "--value is -1.0, expected dollars above 0"),
        ({"budgets": TOKENS, "tariffs": TARIFFS, "value": 1.0, "price": 1.0}, "expected one of"),
        ({"budgets": TOKENS, "keys": {"k": {"value": 1}}}, "has a value, expected --tariffs"),
        ({"state": None, "keys": {"k": {"budget": {"tokens": 1}}}}, "a budget, expected --budgets"),
        ({"budgets": TOKENS, "keys": {"k": {"budget": {"dollars": 1}}}}, "keys: dollars are given"),
        ({"budgets": TOKENS, "keys": {"k": {"budget": PACED}}}, "keys: requests are given"),
        ({"budgets": TOKENS, "keys": {"k": {"budget": 5}}}, "entry 1: expected dollars or tokens"),
        ({"budgets": TOKENS, "keys": {"k": {"value": "x"}}}, "entry 1: value is 'x'"),
        (
            {"budgets": TOKENS, "tariffs": TARIFFS, "keys": {"k": {"value": 1, "price": 1}}},
            "entry 1: value is given, expected it without",
        ),
    ],
)
def test_settings_about_money_that_make_no_sense_are_refused(
    more: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        create_app(settings(tmp_path, **more))
