"""A small and a large LM within one budget: each at its tariff, the small one alone if short."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from haltwise import InputError
from haltwise.control.budgets import Account, Budget, Budgets
from haltwise.control.store import store_of
from haltwise.control.tariffs import UNIT, Tariffs
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.billing import Bill, BudgetFile, Cashier
from haltwise.proxy.client import RefusedError
from haltwise.proxy.metrics import Metrics
from haltwise.session.request import Spent
from haltwise.session.session import UNGIVEN
from haltwise.session.thought import PointRules
from tests.heads import sure_head
from tests.proxy.fake_upstream import FakeUpstream, Plan
from tests.proxy.proxies import PATHS, PATIENCE, Proxy, Reply, ask, proxied, wait_until
from tests.proxy.test_audited_cascade import audited, by_price
from tests.proxy.test_budgets import account, written
from tests.proxy.test_governed import status
from tests.proxy.test_large import cascade

#: In nano-dollars: the small LM's tokens cost 1,000 and 2,000, the large one's 10,000 and 30,000.
TARIFFS = {
    "unit": UNIT,
    "models": {"fake": {"input": 1, "output": 2}, "big": {"input": 10, "output": 30}},
}
RICH = {"everything": {"dollars": 100, "tokens": 10**9}}
AT_END = {"X-Haltwise-Price": "0.1"}


class Served:
    """A proxy with budgets before two fakes."""

    def __init__(self, proxy: Proxy, small: FakeUpstream, large: FakeUpstream) -> None:
        self.proxy, self.small, self.large = proxy, small, large


Serving = Callable[..., Served]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with ExitStack() as stack:

        def started(where: str, budgets: Any = RICH, trouble: str = "", **settings: Any) -> Served:
            small = stack.enter_context(FakeUpstream("vllm"))
            large = stack.enter_context(FakeUpstream("vllm", trouble=trouble))
            config = ServeConfig(
                head=cascade(where, tmp_path / "cascade"),
                upstream=small.url,
                large=large.url,
                large_model="big",
                tariffs=written(tmp_path / "tariffs", TARIFFS),
                budgets=written(tmp_path / "budgets", budgets),
                state=tmp_path / "state",
                **{"read_timeout": PATIENCE} | settings,
            )
            return Served(stack.enter_context(proxied(config)), small, large)

        yield started


def parts(reply: Reply) -> tuple[int, int, int, int]:
    """Tokens of the small LM's prompts and answers, and of the large one's."""
    legs = reply.haltwise["legs"]
    found = [
        sum(leg[name] or 0 for leg in legs if bool(leg.get("large")) == is_large)
        for is_large in (False, True)
        for name in ("prompt_tokens", "completion_tokens")
    ]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("where", ["start", "point", "end"])
@pytest.mark.parametrize("more", [{}, {"stream": False}, {"chat": False}])
def test_each_lm_is_billed_at_its_own_tariff(
    serving: Serving, plan: Plan, where: str, more: Any
) -> None:
    two = serving(where)
    reply = ask(two.proxy.client, plan, headers=AT_END if where == "end" else {}, **more)
    with httpx2.Client(base_url=two.large.url, timeout=PATIENCE) as direct:
        whole = ask(direct, plan, **more).usage
    prompt, thought, large_prompt, answer = parts(reply)
    assert reply.haltwise["escalated"] == where and two.large.of(plan)[0].body["model"] == "big"
    assert (large_prompt, answer) == (whole["prompt_tokens"], whole["completion_tokens"])
    if where == "start":
        assert (prompt, thought) == (0, 0)
    else:
        assert prompt == large_prompt and thought >= {"point": 20, "end": 28}[where]
    found = account(two.proxy)
    assert found["spent_tokens"] == prompt + thought + large_prompt + answer
    cost = 1_000 * prompt + 2_000 * thought + 10_000 * large_prompt + 30_000 * answer
    assert found["spent_nano"] == cost
    assert found["spent_tokens"] == reply.usage["total_tokens"]


@pytest.mark.parametrize("where", ["start", "point", "end"])
def test_an_answer_that_the_large_lm_breaks_off_is_billed_beside_the_one_asked_anew(
    serving: Serving, plan: Plan, where: str
) -> None:
    """Its prompt, which nobody has counted, as if every byte were a token.

    Of its 30 tokens, the marker behind the thought is not shown.
    """
    two = serving(where, trouble="dies")
    reply = ask(two.proxy.client, plan, headers=AT_END if where == "end" else {})
    assert reply.text == plan.answer_text() and reply.haltwise["fallback"] == "large LM"
    prompt, generated, _, lost = parts(reply)
    assert lost == 29 and generated >= 32
    found = account(two.proxy)
    num_input = found["spent_tokens"] - prompt - generated - lost
    cost = 1_000 * prompt + 2_000 * generated + 10_000 * num_input + 30_000 * lost
    assert num_input > 256 and found["spent_nano"] == cost


def test_a_large_lm_that_refuses_costs_nothing(serving: Serving, plan: Plan) -> None:
    two = serving("start", trouble="500")
    reply = ask(two.proxy.client, plan)
    prompt, generated, *large = parts(reply)
    assert reply.haltwise["fallback"] == "large LM" and large == [0, 0]
    assert account(two.proxy)["spent_nano"] == 1_000 * prompt + 2_000 * generated


def test_what_a_client_leaves_behind_is_billed(serving: Serving, plan: Plan) -> None:
    """It goes amid the large LM's answer: what has come of it, and the longest prompt there is."""
    two = serving("start", trouble="hangs")
    body = {"model": "fake", "messages": plan.messages(), "stream": True}
    content = httpx2.Request("POST", "http://a", json=body).content

    async def leave() -> None:
        async with httpx2.AsyncClient(base_url=two.proxy.url, timeout=PATIENCE) as client:
            asking = asyncio.create_task(client.post(PATHS[True], json=body))
            while not (found := two.large.of(plan)) or not found[0].num_sent:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.wait((asking,))

    asyncio.run(leave())
    assert two.large.of(plan)[0].gone.wait(PATIENCE)
    found, num_input = account(two.proxy), len(content) + 256
    num_seen = found["spent_tokens"] - num_input
    assert 0 <= num_seen <= 30 and two.small.of(plan) == []
    assert found["spent_nano"] == 10_000 * num_input + 30_000 * num_seen


@pytest.mark.parametrize("stream", [True, False])
def test_where_there_is_room_for_the_small_lm_alone_it_answers(
    serving: Serving, plan: Plan, stream: bool
) -> None:
    """Then it is limited, and at last refused."""
    budget = {"everything": {"dollars": 1}}
    two = serving("start", budget, context=1_000)

    def asked(most: str) -> Reply:
        return ask(two.proxy.client, plan, stream=stream, headers={"X-Haltwise-Max-Cost": most})

    def metric(name: str) -> float:
        return two.proxy.metric(f"haltwise_budget_{name}_total")

    both = asked("0.1")
    assert both.haltwise["escalated"] == "start" and "not_escalated" not in both.haltwise
    assert metric("unescalated") == 0
    # Some 350 tokens in, 1,000 out: the small LM takes 0.005 dollars at most, both 0.04.
    small = asked("0.01")
    assert small.haltwise["not_escalated"] == "budget" and "escalated" not in small.haltwise
    assert small.haltwise["halted"] and (metric("unescalated"), metric("cut")) == (1, 0)
    cut = asked("0.003")
    assert cut.haltwise["not_escalated"] == "budget"
    assert (metric("unescalated"), metric("cut"), metric("refused")) == (2, 1, 0)
    refused = asked("0.0001")
    assert refused.status == 400
    assert metric("refused") == 1 and len(two.large.of(plan)) == 1
    assert account(two.proxy)["spent_nano"] < 10**9


@pytest.mark.whole
def test_many_requests_at_once_leave_no_more_to_the_large_lm_than_there_is_money_for(
    serving: Serving, plan: Plan
) -> None:
    two = serving("start", {"everything": {"dollars": 0.02}})

    def asked(_: int) -> Reply:
        return ask(two.proxy.client, plan, max_tokens=60)

    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(asked, range(64)))
    served = [reply.haltwise for reply in replies if reply.status == 200]
    told = [one.get("escalated", one.get("not_escalated")) for one in served]
    assert set(told) == {"start", "budget"} and {one.status for one in replies} <= {200, 429}
    assert 0 < account(two.proxy)["spent_nano"] <= 20_000_000


def test_an_audit_of_a_control_costs_its_client_the_large_lm_alone(
    serving: Serving, plan: Plan
) -> None:
    """What the small LM then answers for the audit is nobody's bill, and is told apart."""
    two = serving("nowhere", control="apply", audit=1.0)
    reply = ask(two.proxy.client, plan)
    assert reply.haltwise["escalated"] == "start"
    assert audited(two.proxy)["audit_tokens"] >= 34 and len(two.small.of(plan)) >= 1
    prompt, answer = parts(reply)[2:]
    assert account(two.proxy)["spent_nano"] == 10_000 * prompt + 30_000 * answer


@pytest.mark.parametrize("control", ["observe", "apply"])
@pytest.mark.parametrize("price", ["", "0", "10"])
def test_a_control_leaves_alone_what_no_budget_lets_the_large_lm_answer(
    serving: Serving, plan: Plan, control: str, price: str, tmp_path: Path
) -> None:
    """The small LM answers in full: no price of it is certified against itself."""
    two = serving("start", context=1_000, control=control, audit=1.0)
    named = {"X-Haltwise-Price": price} if price else {}
    reply = ask(two.proxy.client, plan, headers={"X-Haltwise-Max-Cost": "0.01"} | named)
    assert reply.haltwise["not_escalated"] == "budget" and not reply.haltwise["halted"]
    assert (reply.thought, reply.text) == (plan.thought(), plan.answer_text())
    assert two.large.of(plan) == []
    told = status(two.proxy)
    assert (told["groups"]["everything"]["requests"], told["failures"]) == (0, 0)

    def rows() -> list[Any]:
        with closing(sqlite3.connect(tmp_path / "state")) as file:
            chosen = "price_served, audited, audit_probability"
            return file.execute(f"SELECT {chosen} FROM request").fetchall()

    wait_until(lambda: rows() == [(0, 0, 0)])


def test_what_no_control_watches_is_billed_to_the_large_lm_as_long_as_it_answers(
    serving: Serving, plan: Plan
) -> None:
    """Of its answers nobody counts the tokens: they cost all that they could."""
    two = serving("start", control="apply", audit=1.0, read_timeout=3.0)
    body = {"model": "fake", "messages": plan.messages(), "n": 2, "max_tokens": 60}
    content = httpx2.Request("POST", "http://a", json=body).content
    num_input = len(content) + 256

    spent = 0

    def asked(headers: Any = None) -> int:
        nonlocal spent
        before = spent
        assert two.proxy.client.post(PATHS[True], json=body, headers=headers).status_code == 200
        spent = account(two.proxy)["spent_nano"]
        return int(spent - before)

    at_large = 10_000 * num_input + 30_000 * 120
    assert asked() == at_large and two.small.of(plan) == []
    # There is no room for both.
    at_small = asked({"X-Haltwise-Max-Cost": str((at_large - 1) / 10**9)})
    assert 1_000 * num_input < at_small < at_large and len(two.small.of(plan)) == 1
    two.large.fail("500")
    assert asked() == at_small and len(two.small.of(plan)) == 2
    two.large.fail("hangs")  # whatever it does meanwhile
    assert asked() == at_large + at_small


def test_a_control_tells_what_checked_answers_come_to(serving: Serving, plan: Plan) -> None:
    """By hand: halted behind 20 and 12 tokens, 5 more are refused, and all 34 are thought on."""
    two = serving("nowhere", control="observe", audit=1.0, check_answers=f"{__name__}:says_no")
    ask(two.proxy.client, plan)
    lowest, middle, highest = by_price(audited(two.proxy))
    assert [one["loss"]["estimate"] for one in (lowest, middle, highest)] == [0, 0, 0]
    costs = [34 / 68, 39 / 68, 39 / 68]
    found = [1 - one["saving"]["estimate"] for one in (lowest, middle, highest)]
    assert found == pytest.approx(costs, abs=1e-6)


def held(cashier: Cashier, num: int) -> Coroutine[Any, Any, Bill]:
    """Opens the bill of a request of 10 bytes, which may generate 60 tokens."""
    size, limit = cashier.size_of(PATHS[True], 10, {"max_tokens": 60}, True, False)
    return cashier.open(str(num), {}, None, "fake", size, limit, False, "big")


@pytest.fixture
def budgets(tmp_path: Path) -> Iterator[Budgets]:
    with closing(Budgets(store_of(tmp_path / "state"))) as opened:
        yield opened


#: 266 tokens in and 60 out, once of the large LM: 266 * 10,000 + 60 * 30,000. Of the small one
#: twice, with 64 of a close text.
SMALL = (2 * 266 + 64) * 1_000 + 120 * 2_000
BOTH = SMALL + 266 * 10_000 + 60 * 30_000


def cashier_of(budgets: Budgets, tmp_path: Path, nano: int) -> Cashier:
    file = BudgetFile(written(tmp_path / "b", {"everything": {"dollars": nano / 10**9}}))
    tariffs = Tariffs(written(tmp_path / "t", TARIFFS))
    rules = PointRules(sure_head().config.halting)
    return Cashier(budgets, file, {}, tariffs, rules, 1_000, Metrics())


def test_of_64_at_once_3_have_both_lms_and_2_more_the_small_one(
    budgets: Budgets, tmp_path: Path
) -> None:
    """Held back for good by a process that dies, to the last nano-dollar."""
    limit = 3 * BOTH + 2 * SMALL + 1
    cashier = cashier_of(budgets, tmp_path, limit)

    async def opened() -> list[Bill | BaseException]:
        asked = [held(cashier, num) for num in range(64)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(opened())
    bills = [one for one in found if isinstance(one, Bill)]
    assert sum(isinstance(one, RefusedError) for one in found) == 59
    assert sorted(bill.most().nano for bill in bills) == [SMALL] * 2 + [BOTH] * 3
    assert sum(bill.is_unescalated for bill in bills) == 2
    with closing(Budgets(store_of(tmp_path / "state"))) as other:
        everything = Account("everything", Budget(limit))
        assert other.standing(everything).left.nano == 1


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        (Spent(40, 10, 30, 20), None, 30_000 + 10_000 + 40_000),
        (Spent(40, 0, 30, 20), Spent(41, 0, None, 7), 40_000 + 40_000 + 410_000 + 210_000),
        (None, Spent(41, 0, None, 7), SMALL + 410_000 + 210_000),
        (Spent(40, 0, 30, 20), Spent(None, None, None, 7), 80_000 + 2_660_000 + 210_000),
        (None, None, SMALL),
    ],
)
def test_a_bill_is_the_sum_of_both_lms(
    budgets: Budgets, tmp_path: Path, small: Spent | None, large: Spent | None, expected: int
) -> None:
    """A large LM that was not asked costs nothing, and what is not known all that it could."""
    cashier = cashier_of(budgets, tmp_path, 10**9)

    async def settled() -> None:
        bill = await held(cashier, 1)
        if large is not None:
            assert bill.large is not None
            bill.large.count(large, 1)
        if small is not None:
            bill.count(small, 1)
        await cashier.close(bill)

    asyncio.run(settled())
    assert cashier.everything is not None
    assert budgets.spent(cashier.everything).nano == expected


def test_an_answer_that_cannot_be_given_lets_the_small_lm_think_on(
    serving: Serving, plan: Plan
) -> None:
    """What the large LM says is checked no more than any answer in full."""
    check = f"{__name__}:says_no"
    small = serving("nowhere", check_answers=check)
    reply = ask(small.proxy.client, plan)
    assert reply.haltwise["fallback"] == UNGIVEN and not reply.haltwise["halted"]
    assert reply.text == plan.answer_text() and reply.thought == plan.thought()
    found = account(small.proxy)
    assert small.large.of(plan) == [] and found["spent_nano"] > 0


def test_an_answer_of_the_large_lm_is_given_unchecked(serving: Serving, plan: Plan) -> None:
    two = serving("point", check_answers=f"{__name__}:says_no")
    reply = ask(two.proxy.client, plan)
    assert reply.haltwise["escalated"] == "point" and reply.text == plan.answer_text()


def says_no(body: Any, text: str) -> bool:
    return False


def refused(tmp_path: Path, models: Any, **settings: Any) -> None:
    usual: dict[str, Any] = {"large": "http://127.0.0.1:8081", "large_model": "big"}
    tariffs = written(tmp_path / "tariffs", {"unit": UNIT, "models": models})
    folder = cascade("end", tmp_path / "cascade")
    create_app(ServeConfig(head=folder, tariffs=tariffs, **usual | settings))


def test_a_large_lm_without_a_tariff_is_refused_at_start(tmp_path: Path) -> None:
    small, price = {"fake": {"input": 1, "output": 2}}, {"input": 1, "output": 2}
    start = partial(refused, tmp_path)
    with pytest.raises(InputError, match="--large-model is 'big', expected a tariff of it in"):
        start(small)
    with pytest.raises(InputError, match="--tariffs is given, expected --large-model with the"):
        start(small, large_model=None)
    start({"*": price})
    start(small | {"big": price})


def test_a_budget_of_dollars_beside_a_large_lm_needs_tariffs(tmp_path: Path) -> None:
    budgets = written(tmp_path / "budgets", {"everything": {"dollars": 1}})
    config = ServeConfig(
        head=cascade("end", tmp_path / "cascade"),
        large="http://127.0.0.1:8081",
        budgets=budgets,
        state=tmp_path / "state",
    )
    with pytest.raises(InputError, match="dollars are given, expected --tariffs"):
        create_app(config)


def test_tokens_of_both_lms_count_alike(serving: Serving, plan: Plan) -> None:
    two = serving("start", {"everything": {"tokens": 10**6}})
    reply = ask(two.proxy.client, plan)
    wait_until(lambda: account(two.proxy)["requests"] == 1)
    assert account(two.proxy)["spent_tokens"] == reply.usage["total_tokens"]
