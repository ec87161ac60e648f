"""The live page, in a real browser where there is one."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import uvicorn

from haltwise import HaltHead
from haltwise.control import history
from haltwise.control.books import Entry
from haltwise.control.budgets import Amount
from haltwise.control.canary import Arms, Canary, Harm
from haltwise.control.governed import GovernedControl
from haltwise.control.groups import EVERYTHING, Opened
from haltwise.control.library import Note
from haltwise.control.tariffs import UNIT
from haltwise.proxy import ServeConfig, app, load
from haltwise.proxy.billing import Cashier
from tests import browser as driver
from tests.browser import CHROMIUM, Page
from tests.control.population import Population
from tests.heads import sure_head
from tests.proxy.proxies import Proxy, listening, saved_head

chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
TIPS = ".tip:not([hidden])"
#: What the keyboard has to reach, in its order.
CONTROLS = ["group", "span", "saving", "loss", "price", "series-rows", "frontier", "frontier-rows"]
CONTROLS += ["differ", "moves"]


@dataclass
class Watched:
    """A proxy, and the population whose audits its control is told."""

    proxy: Proxy
    app: app.Proxy
    people: Population
    clock: list[float]
    num: int = 0

    @property
    def control(self) -> GovernedControl:
        return self.people.control

    def ask(self, num: int) -> None:
        """Lets so many requests come, 6 seconds apart."""
        for _ in range(num):
            task = "math" if self.num % 3 else "<b>code</b>"
            self.people.ask(f"request-{self.num}", {"task": task})
            self.num += 1
            self.clock[0] += 6
            if self.num % 10 == 0:
                self.people.settle()
        self.people.settle()


@contextmanager
def watched(folder: Path, **settings: Any) -> Iterator[Watched]:
    """A proxy with a control; its upstream is never asked."""
    usual: dict[str, Any] = {"control": "apply", "target": 0.05, "audit": 0.5, "context": 32_768}
    config = ServeConfig(
        head=saved_head(folder / "head"),
        upstream="http://127.0.0.1:9",
        state=folder / "state",
        **usual | settings,
    )
    proxy = app.Proxy(config)
    assert proxy.control is not None
    clock = [1_764_400_000.0]
    proxy.control.history.clock = lambda: clock[0]
    server = uvicorn.Server(uvicorn.Config(app.app_of(proxy), log_config=None, lifespan="on"))
    with listening(server) as running:
        people = Population(proxy.control, np.random.default_rng(0))
        yield Watched(running, proxy, people, clock)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """With a morning behind it, in which a price was certified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "_MOST_MEASURED", 60)  # so that it is full soon
        with watched(tmp_path_factory.mktemp("busy"), label_hours=24.0) as found:
            found.ask(700)
            yield found


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    with driver.browser() as page:
        yield page


@pytest.fixture
def page(window: Page, busy: Watched) -> Page:
    """The page of the busy proxy, once it shows something."""
    window.errors.clear()
    window.run("sessionStorage.clear()") if "127.0.0.1" in window.run("location.host") else None
    window.look(1280)
    window.open("about:blank")
    show(window, busy.proxy)
    return window


def show(page: Page, proxy: Proxy, where: str = "") -> None:
    """Opens the page of a proxy and waits until it is live."""
    page.open(f"{proxy.url}/haltwise{where}")
    page.until("document.getElementById('state').textContent.includes('live')")


def shown(page: Page, name: str) -> str:
    """The text of an element."""
    return str(page.run(f"document.getElementById('{name}').innerText"))


# The endpoint


@pytest.mark.whole
def test_the_page_runs_nothing_but_its_own_and_asks_nobody_else(busy: Watched) -> None:
    found = busy.proxy.client.get("/haltwise")
    rules = dict(
        part.strip().split(" ", 1) for part in found.headers["content-security-policy"].split(";")
    )
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        digest = b64encode(sha256(block.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    # No address but the name of SVG's elements.
    assert re.findall(r"https?:[^\"' ]*", found.text) == ["http://www.w3.org/2000/svg"]
    assert "innerHTML" not in found.text and "style=" not in found.text


@pytest.mark.whole
def test_one_group_is_told_of_with_its_history(busy: Watched) -> None:
    client = busy.proxy.client
    everything = client.get("/v1/haltwise/control").raise_for_status().json()
    assert "history" not in everything["groups"][EVERYTHING]
    told = client.get("/v1/haltwise/control", params={"group": "task:math"}).json()
    assert list(told["groups"]) == ["task:math"]
    assert list(told["breakers"]) == list(everything["groups"])
    series = told["groups"]["task:math"]["history"]
    assert series["at"] == sorted(series["at"]) and series["at"][-1] <= told["at"]
    lengths = {len(series[name]) for name in ("at", "price", "ceiling")}
    lengths |= {len(one) for name in ("loss", "saving") for one in series[name].values()}
    assert lengths == {len(series["at"])} and len(series["at"]) == 60
    assert series["price"][-1] == told["groups"]["task:math"]["price"]
    assert {one["group"] for one in told["moves"]} <= {"task:math"}
    assert all("task:math" in one["groups"] for one in told["disagreements"])
    assert any(one["label_until"] for one in told["disagreements"])


@pytest.mark.parametrize("group", ["", "task:none", "\n", "é" * 10_000])
def test_a_group_that_is_none_is_not_found(group: str, busy: Watched) -> None:
    found = busy.proxy.client.get("/v1/haltwise/control", params={"group": group})
    assert found.status_code == 404 and found.json()["error"]["message"].startswith("no group has")


def test_a_page_that_has_lent_the_proxy_its_name_is_told_nothing(busy: Watched) -> None:
    codes = [
        busy.proxy.client.get("/v1/haltwise/control", headers=headers).status_code
        for headers in (
            {"Host": "evil.example", "Sec-Fetch-Site": "same-origin"},
            {"Host": "evil.example", "User-Agent": "Mozilla/5.0"},
            {"Host": "evil.example"},
            {"Host": "localhost:1", "Sec-Fetch-Site": "same-origin"},
        )
    ]
    assert codes == [421, 421, 200, 200]


# The page


@chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1920])
def test_it_fits_any_window_on_light_and_dark_paper(
    width: int, scheme: str, page: Page, busy: Watched
) -> None:
    page.look(width, scheme=scheme)
    show(page, busy.proxy)
    assert page.run("document.documentElement.scrollWidth") <= page.run("innerWidth") == width
    paper = page.run("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 27, 33)")
    for svg in page.run(
        "[...document.querySelectorAll('.plot svg')].map(s => [s.clientWidth, "
        "s.parentNode.clientWidth, s.querySelectorAll('path, circle, text').length])"
    ):
        assert svg[0] == svg[1] > 200 and svg[2] > 10
    assert page.errors == []


@chromium
def test_it_shows_what_the_endpoint_tells(page: Page, busy: Watched) -> None:
    told = busy.control.status()
    group = told["groups"][EVERYTHING]
    numbers = shown(page, "numbers")
    assert f"{100 * group['at_price']['saving']['estimate']:.1f} %" in numbers
    assert f"{group['audits']:,}" in numbers and "● closed" in numbers
    assert "At most 5 points of exact match" in shown(page, "about")
    for one in told["disagreements"]:
        assert one["request"] in shown(page, "differ")
    assert "▲ due until" in shown(page, "differ")
    assert "ceiling raised" in shown(page, "moves")
    assert page.run("document.querySelectorAll('#frontier .mark.ceiling').length") == 2


@chromium
def test_a_group_is_chosen_and_is_in_the_address(page: Page, busy: Watched) -> None:
    name = "task:<b>code</b>"  # a client's words are words
    page.run(f"choose({name!r})")
    page.until(f"known.groups[{name!r}] && document.getElementById('group').value === {name!r}")
    audits = busy.control.status()["groups"][name]["audits"]
    assert f"{audits:,}\n" in shown(page, "numbers")
    page.send("Page.reload")
    page.until(f"typeof known !== 'undefined' && known?.groups[{name!r}]")
    assert page.run("document.getElementById('group').value") == name
    show(page, busy.proxy, "#group=task%3Agone")
    page.open("about:blank")
    show(page, busy.proxy, "#group=task%3Agone")
    assert page.run("document.getElementById('group').value") == EVERYTHING


@chromium
def test_a_group_is_shown_against_its_own_target(window: Page, tmp_path: Path) -> None:
    with watched(tmp_path, group_target=("task:math=0.01",)) as found:
        found.ask(30)
        for name, target in {EVERYTHING: "5", "task:math": "1"}.items():
            window.open("about:blank")
            show(window, found.proxy, f"#group={quote(name)}")
            assert f"target {target}" in shown(window, "numbers")
            assert f"At most {target} %" in shown(window, "about")
            shown_at = "[...document.querySelectorAll('svg text.target')].map(t => t.textContent)"
            assert set(window.run(shown_at)) == {f"target {target}"}


@chromium
def test_the_keyboard_reaches_everything_and_every_point(page: Page) -> None:
    page.run(
        "document.querySelectorAll('.plot').forEach((p, i) => { p.id = "
        "['saving', 'loss', 'price', 'frontier'][i] + '-plot' })"
    )
    reached: list[str] = []
    for _ in CONTROLS:
        page.press("Tab")
        found = page.run(
            "(() => { const a = document.activeElement, r = a.getBoundingClientRect(); "
            "return [a.id || a.parentNode.id, getComputedStyle(a).outlineStyle, r.width > 0] })()"
        )
        assert found[1:] == ["solid", True], found
        reached.append(found[0].removesuffix("-plot"))
        if reached[-1] == "frontier":
            last = page.run("document.activeElement.getAttribute('aria-valuetext')")
            page.press("ArrowLeft")
            before = page.run("document.activeElement.getAttribute('aria-valuetext')")
            tips = page.run(f"[...document.querySelectorAll({TIPS!r})].map(t => t.textContent)")
            assert last != before and [tip.replace("\n", ", ") for tip in tips] == [before]
            page.press("Home")
            assert page.run("document.activeElement.getAttribute('aria-valuenow')") == "0"
            page.press("Escape")
            assert page.run(f"document.querySelectorAll({TIPS!r}).length") == 0
    assert reached == CONTROLS


@chromium
def test_everything_has_a_name_for_those_who_listen(page: Page) -> None:
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    named = {
        role: [n.get("name", {}).get("value", "") for n in nodes if n["role"]["value"] == role]
        for role in ("slider", "combobox", "region", "table", "status", "heading", "main")
    }
    assert [name.split(",")[0] for name in named["slider"]] == [
        *("Tokens saved", "EM lost", "Price and ceiling", "EM lost against saving"),
    ]
    assert named["combobox"] == ["Group", "Time"] and len(named["main"]) == 1
    assert all(all(named[role]) for role in ("region", "table", "heading"))
    assert len(named["region"]) == 5 and len(named["status"]) == 1
    assert page.run("[...document.querySelectorAll('[role=group]')].every(g => g.ariaLabel)")


@pytest.mark.whole
@chromium
def test_ten_minutes_of_updates_leave_the_page_as_large_as_it_was(
    page: Page, busy: Watched
) -> None:
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true })")

    def size() -> tuple[int, float]:
        page.send("HeapProfiler.collectGarbage")
        told = page.send("Performance.getMetrics")["metrics"]
        found = {one["name"]: one["value"] for one in told}
        return page.run("document.querySelectorAll('*').length"), found["JSHeapUsedSize"]

    def updated(num: int) -> None:
        for _ in range(num):
            busy.ask(1)
            page.run("poll()")

    updated(20)
    num, heap = size()
    nodes = page.send("Memory.getDOMCounters")["nodes"]
    updated(120)  # every 5 seconds
    later, heap_later = size()
    assert busy.proxy.url in page.run("location.href") and page.errors == []
    assert later <= 1.05 * num and heap_later <= 1.1 * heap + 200_000
    assert page.send("Memory.getDOMCounters")["nodes"] <= 1.2 * nodes


@chromium
def test_a_hidden_page_asks_nothing_and_one_that_is_seen_again_asks_at_once(
    page: Page, busy: Watched
) -> None:
    def hide(hidden: bool) -> None:
        page.run(
            f"Object.defineProperty(document, 'hidden', {{ value: {str(hidden).lower()}, "
            "configurable: true }); document.dispatchEvent(new Event('visibilitychange'))"
        )

    page.run("window.asked_ = 0; window.own_ = fetch")
    page.run("window.fetch = (...all) => { asked_++; return own_(...all) }")
    hide(True)
    page.run("poll()")
    assert page.run("asked_") == 0
    hide(False)
    page.until("asked_ === 1 && running === null")


@chromium
def test_a_page_that_is_not_answered_never_looks_live(page: Page, busy: Watched) -> None:
    page.run("window.own_ = fetch; window.fetch = () => Promise.reject(new Error('refused'))")
    page.run("poll()")
    assert shown(page, "state") == "▲ no connection" and "refused" in shown(page, "trouble")
    assert "out of date" in shown(page, "trouble") and "ago" in shown(page, "age")
    assert page.run("document.getElementById('content').className") == "stale"
    page.run("window.fetch = own_; poll()")
    page.until("document.getElementById('state').textContent === '● live'")
    assert page.run("document.getElementById('trouble').hidden")
    # Nor does one whose clock has gone on without an answer, for whatever reason.
    page.run("answered -= 60_000; tell()")
    assert shown(page, "state") == "▲ out of date" and "60 s ago" in shown(page, "age")


@chromium
def test_an_open_breaker_is_told_in_words_and_signs(page: Page, tmp_path: Path) -> None:
    with watched(tmp_path) as other:
        other.ask(300)
        assert other.control.groups.ceiling([]) > 0
        other.control.keeper.put(Entry(Opened(EVERYTHING)))
        other.people.settle()
        show(page, other.proxy)
        assert "▲ Breaker open: everything." in shown(page, "breakers")
        assert "▲ open" in shown(page, "numbers") and "breaker opened" in shown(page, "moves")
        assert "everything (breaker open)" in shown(page, "group")


@chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_heads_and_the_share_that_a_challenger_serves(
    page: Page, tmp_path: Path, scheme: str
) -> None:
    sure = sure_head()
    bold = HaltHead(sure.config, sure.weights | {"b0": sure.weights["b0"] + 1})
    with watched(tmp_path, challenger=(saved_head(tmp_path / "bold", bold),)) as found:
        keeper = found.control.keeper
        found.ask(3)
        show(page, found.proxy)
        rows = shown(page, "head-rows")
        assert "champion" in rows and "not known yet" in rows and bold.digest[:12] in rows
        assert page.run("document.getElementById('canary').hidden")
        failed = Arms(bold.digest, 99, 1, failures=Harm(champion=3.0))
        keeper.put(Note(tries=Canary.begin(bold.digest)))
        keeper.put(Note(arms=failed))
        found.people.settle()
        page.until("!document.getElementById('canary').hidden")
        told = shown(page, "canary")
        assert f"{bold.digest[:12]} serves 1 % (audit 0 of 100)" in told
        assert "It: 1 requests, 0 failed" in told and "meanwhile: 99 requests, 3 failed" in told
        page.look(390, scheme=scheme)
        page.until("document.documentElement.scrollWidth <= 390")
        keeper.put(Note(rolls_back=True))
        found.people.settle()
        page.until("document.getElementById('canary').hidden")
        assert "▲ stopped: by hand" in shown(page, "head-rows")
        moves = shown(page, "moves")
        assert re.search(rf"head {bold.digest[:12]} serves 1 %\s*$", moves, re.MULTILINE)
        assert f"head {bold.digest[:12]} stopped: by hand" in moves


@chromium
def test_the_key_is_asked_for_and_kept_in_the_tab_alone(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    with watched(tmp_path, operator_key_env="OPERATOR") as guarded:
        page.open(f"{guarded.proxy.url}/haltwise")
        page.until("!document.getElementById('entry').hidden")
        assert shown(page, "state") == "○ locked" and "operator's key" in shown(page, "trouble")
        assert page.run("document.getElementById('content').hidden")
        for key, state in (("other", "○ locked"), ("secret", "● live")):
            page.run(
                f"byId('key').value = {key!r}; byId('entry').requestSubmit(); "
                "new Promise(done => { const t = () => running ? setTimeout(t, 10) : done(); "
                "setTimeout(t, 10) })"
            )
            assert shown(page, "state") == state
        assert page.run("[localStorage.length, document.cookie]") == [0, ""]
        assert page.run("document.getElementById('entry').hidden")
        page.run("byId('forget').click()")
        page.until("byId('state').textContent === '○ locked'")
        assert page.run("sessionStorage.length") == 0


@chromium
def test_without_a_control_it_says_so_in_a_sentence(page: Page, tmp_path: Path) -> None:
    config = ServeConfig(head=saved_head(tmp_path / "head"), upstream="http://127.0.0.1:9")
    server = uvicorn.Server(uvicorn.Config(app.create_app(config), log_config=None))
    with listening(server) as plain:
        show(page, plain)
        assert "runs with --control off: nothing is audited" in shown(page, "nothing")
        assert page.run("document.getElementById('content').hidden")


# Budgets and load


BUDGETS = {
    "everything": {"dollars": 500, "tokens": 10**9, "hours": 24, "requests": 10_000},
    "tenant": {"dollars": 20, "hours": 24, "requests": 400},
    "session": {"tokens": 200_000},
}
TARIFFS = {"unit": UNIT, "models": {"*": {"input": 0.55, "output": 2.19}}}


def files(folder: Path, budgets: Any = BUDGETS) -> dict[str, Any]:
    """The settings that limit what is spent."""
    told = {"budgets": budgets, "tariffs": TARIFFS}
    for name, content in told.items():
        (folder / name).write_text(json.dumps(content))
    return {name: folder / name for name in told}


def spend(cashier: Cashier | None, num: int, dollars: float = 1.25, holds: bool = False) -> None:
    """Lets so many tenants ask, each once, the first one for most."""
    assert cashier is not None
    for n in range(num):
        who = {"tenant": f"{n:016x}", "session": f"{n:016x} {n:016x}"}
        accounts, cost = cashier._accounts(who), Amount(round(dollars * 10**9) - n, 40_000)
        cashier.budgets.reserve(f"{n} {num}", accounts, cost)
        if not holds:
            cashier.budgets.settle(f"{n} {num}", cost)


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A proxy with budgets, before a server at which 31 requests wait."""

    async def waiting(_: Any) -> int:
        return 31

    monkeypatch.setattr(load, "_waiting_at", waiting)
    monkeypatch.setattr(load, "_PAUSE", 3600.0)
    with watched(tmp_path, load_target=20, **files(tmp_path)) as found:
        found.ask(200)
        yield found


def row_of(page: Page, number: int) -> list[str]:
    """What a row of the accounts says."""
    cells = f"document.querySelectorAll('#accounts tbody tr')[{number}].children"
    return [" ".join(text.split()) for text in page.run(f"[...{cells}].map(c => c.innerText)")]


@chromium
def test_budgets_are_shown_by_account_with_their_units(page: Page, limited: Watched) -> None:
    cashier = limited.app.cashier
    spend(cashier, 24)
    spend(cashier, 2, 0.001, holds=True)
    assert cashier is not None
    cashier.pace.urgency["tenant 0000000000000001"] = 0.374
    show(page, limited.proxy)
    rows = [row_of(page, n) for n in range(20)]
    everything, first = rows[:2]
    assert everything[:5] == [
        *("everything", "26", "$30.00 960,000 tokens", "$0.002 80,000 tokens"),
        "$470.00 998,960,000 tokens",
    ]
    assert re.fullmatch(r"\d+ \w+, [\d:]+ in \d+ (h|min|s)", everything[5])
    urgency = {one[0]: one[6] for one in rows}
    assert urgency["everything"] == "0 %" and urgency[f"tenant {1:016x}"] == "37 %"
    assert urgency[f"session {1:016x} {1:016x}"] == "not paced"
    assert first[0] == f"tenant {0:016x}" and first[4] == "$18.75"
    assert "$30.00\n6.0 % of $500.00" in shown(page, "means-numbers")
    assert page.run("document.querySelectorAll('#accounts tbody tr').length") == len(rows)
    # Everything, 24 tenants and their sessions.
    assert shown(page, "more-accounts") == "29 more accounts have spent less."
    assert page.errors == []


@chromium
def test_where_no_price_is_high_enough_it_says_so(page: Page, limited: Watched) -> None:
    show(page, limited.proxy)
    assert page.run("document.getElementById('strained').hidden")
    assert "▲ 31\ntarget 20" in shown(page, "means-numbers")
    assert shown(page, "no-accounts") == "Nobody has spent anything yet."
    cashier, waits = limited.app.cashier, limited.app.load
    assert cashier is not None and waits is not None
    spend(cashier, 5)
    for n in range(5):
        cashier.pace.urgency[f"tenant {n:016x}"] = 1.0
    cashier.pace.urgency["tenant who is gone"] = 1.0
    waits.urgency = 1.0
    page.run("poll()")
    told = shown(page, "strained")
    assert f"for the budget of tenant {0:016x}, " in told and "and 2 more:" in told
    assert "for the load: 31 requests wait at the server, of 20 that may." in told
    assert row_of(page, 1)[6] == "▲ 100 %"


@chromium
def test_what_is_wrong_with_budgets_and_load_is_said(page: Page, limited: Watched) -> None:
    show(page, limited.proxy)
    away = "{ over: 2, trouble: 'no store', accounts: [], num_accounts: 0, urgency: {} }"
    page.run(f"known.budgets = {away}; known.load.waiting = null; show()")
    told = shown(page, "strained")
    assert "cannot be asked, and requests are refused: no store" in told
    assert "cost more than was held back for them: 2" in told
    assert page.run("['accounts', 'no-accounts'].every(id => document.getElementById(id).hidden)")
    assert "unknown\nthe server does not tell; target 20" in shown(page, "means-numbers")


@pytest.mark.whole
@chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_budgets_fit_a_telephone_and_are_heard(page: Page, limited: Watched, scheme: str) -> None:
    spend(limited.app.cashier, 30)
    page.look(390, scheme=scheme)
    show(page, limited.proxy)
    assert page.run("document.documentElement.scrollWidth") == 390
    scrolls = "document.getElementById('accounts')"
    assert page.run(f"{scrolls}.scrollWidth > {scrolls}.clientWidth && {scrolls}.tabIndex === 0")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    names = {n.get("name", {}).get("value", "") for n in nodes if n["role"]["value"] == "region"}
    assert "Budgets and load" in names
    assert page.run("document.querySelectorAll('#accounts th[scope]').length") == 7 + 20
    for _ in ("group", "span", "accounts"):
        page.press("Tab")
    assert page.run("document.activeElement.id") == "accounts"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.whole
@chromium
def test_without_a_control_budgets_alone_are_shown(page: Page, tmp_path: Path) -> None:
    config = ServeConfig(
        head=saved_head(tmp_path / "head"),
        upstream="http://127.0.0.1:9",
        state=tmp_path / "state",
        **files(tmp_path, {"everything": {"tokens": 50_000}, "tenant": {"tokens": 10**6}}),
    )
    proxy = app.Proxy(config)
    server = uvicorn.Server(uvicorn.Config(app.app_of(proxy), log_config=None, lifespan="on"))
    with listening(server) as plain:
        spend(proxy.cashier, 1, 0.0)
        show(page, plain)
        assert "nothing to show but budgets" in shown(page, "nothing")
        sections = "[...document.querySelectorAll('section')].filter(s => s.offsetParent)"
        assert page.run(f"{sections}.map(s => s.id)") == ["means"]
        # Nothing was paid, and no budget is one of money.
        expected = ["everything", "1", "40,000 tokens", "0 tokens", "10,000 tokens", "never"]
        assert row_of(page, 0) == [*expected, "not paced"]
        assert page.run("document.getElementById('choice').hidden") and page.errors == []
