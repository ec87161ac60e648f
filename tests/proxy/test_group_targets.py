"""Groups that are promised less loss than everything, behind the proxy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from haltwise import InputError
from haltwise.control.status import read_library, table_of
from haltwise.proxy import ServeConfig, app, create_app
from haltwise.proxy.config import tenant_of
from tests.proxy.fake_upstream import FakeUpstream, Plan
from tests.proxy.proxies import Proxy, ask, proxied, saved_head, wait_until
from tests.proxy.test_monitoring import scraped, values

Serving = Callable[..., Proxy]
STRICT = f"tenant:{tenant_of('Bearer strict')}"
KEYS = {"strict": {"target": 0.5}, "usual": {}}


def settings(folder: Path, keys: Any = None, **more: Any) -> ServeConfig:
    """With a target that three audits without a loss certify a price for."""
    if keys is not None:
        (folder / "keys").write_text(json.dumps(keys))
        more = {"keys": folder / "keys"} | more
    usual: dict[str, Any] = {"control": "apply", "target": 0.9, "state": folder / "state"}
    return ServeConfig(saved_head(folder / "head"), **usual | more)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """Proxies before a fake."""
    with ExitStack() as stack:

        def started(keys: Any = None, **more: Any) -> Proxy:
            upstream = stack.enter_context(FakeUpstream("vllm"))
            config = settings(tmp_path, keys, upstream=upstream.url, **more)
            return stack.enter_context(proxied(config))

        yield started


def group(proxy: Proxy, name: str) -> Any:
    told = proxy.client.get("/v1/haltwise/control", params={"group": name})
    return told.raise_for_status().json()["groups"][name]


def certify(proxy: Proxy, name: str, plan: Plan, headers: dict[str, str]) -> None:
    """Asks, in a group that halts nothing yet, what no price would halt, until one is certified."""
    sure = replace(plan, logprobs=((0, -9.0),))
    while group(proxy, name)["audits_due"]:
        audits = group(proxy, name)["audits"]
        assert not ask(proxy.client, sure, headers=headers).haltwise["halted"]
        wait_until(lambda before=audits: group(proxy, name)["audits"] > before)  # type: ignore[misc]


def halts(proxy: Proxy, plan: Plan, headers: dict[str, str]) -> bool:
    """Whether a thought that every price halts is halted in some group."""
    certain = replace(plan, logprobs=((0, -0.1),))
    return bool(ask(proxy.client, certain, headers=headers).haltwise["halted"])


@pytest.mark.whole
@pytest.mark.parametrize("by", ["flag", "key"])
def test_nothing_of_a_group_is_halted_before_its_own_audits_vouch(
    by: str, serving: Serving, plan: Plan, tmp_path: Path
) -> None:
    usual, strict = {"Authorization": "Bearer usual"}, {"Authorization": "Bearer strict"}
    if by == "key":
        name, proxy = STRICT, serving(KEYS)
    else:
        name, proxy = "task:math", serving(group_target=("task:math=0.5",))
        usual, strict = {}, {"X-Haltwise-Task": "math"}
    assert (group(proxy, name)["target"], group(proxy, "everything")["target"]) == (0.5, 0.9)
    certify(proxy, "everything", plan, usual)
    wait_until(lambda: halts(proxy, plan, usual))  # it may be one of the few audits
    of_tasks = [strict | {"X-Haltwise-Task": "math"}, strict]
    for headers in of_tasks:
        assert group(proxy, name)["price"] == 0 and not halts(proxy, plan, headers)
    certify(proxy, name, plan, strict)
    for headers in of_tasks:
        wait_until(lambda asked=headers: halts(proxy, plan, asked))  # type: ignore[misc]
    assert 0 < group(proxy, name)["price"] <= group(proxy, name)["ceiling"]
    found = values(scraped(proxy))
    targets = {n: v for (metric, n), v in found.items() if metric == "haltwise_group_target_ratio"}
    assert targets[name] == 0.5 and targets["everything"] == 0.9
    lines = table_of(read_library(tmp_path / "state")).splitlines()
    in_percent = {
        before.rsplit(maxsplit=4)[0]: after.split()[0]
        for before, closed, after in (line.partition("  closed ") for line in lines)
        if closed
    }
    assert (in_percent[name], in_percent["everything"]) == ("50", "90")


def test_the_command_takes_any_number_of_targets() -> None:
    named = ["--group-target", "task:a=0.01", "--group-target", "segment:b c=0.005"]
    found = tyro.cli(ServeConfig, args=["--head", "x", *named])
    assert found.group_targets == {"task:a": 0.01, "segment:b c": 0.005}


def test_a_state_is_about_the_targets_that_it_was_made_with(tmp_path: Path) -> None:
    proxy = app.Proxy(settings(tmp_path, KEYS, group_target=("task:math=0.5",)))
    assert proxy.control is not None
    proxy.control.close()
    for named, told in [
        ((), "task:math with a target of 0.5, not everything's"),
        (("task:math=0.4",), "task:math with a target of 0.5, not 0.4"),
        (("task:math=0.5", "task:new=0.1"), "task:new with a target of everything's, not 0.1"),
    ]:
        with pytest.raises(InputError, match=f"the state is about {told}: expected the same head"):
            app.Proxy(settings(tmp_path, KEYS, group_target=named))
    again = app.Proxy(settings(tmp_path, KEYS, group_target=("task:math=0.5",)))
    assert again.control is not None
    assert again.control.groups.targets == {"task:math": 0.5, STRICT: 0.5}
    again.control.close()


def test_a_reload_changes_no_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    proxy = app.Proxy(settings(tmp_path, KEYS))
    for keys, expected in [
        (KEYS | {"new": {}}, '"reloaded"'),
        (KEYS | {"usual": {"target": 0.4}}, "about the targets before, expected a process of"),
        ({"strict": {}}, "about the targets before"),
    ]:
        caplog.clear()
        (tmp_path / "keys").write_text(json.dumps(keys))
        proxy.reload()
        assert expected in caplog.text
        known = proxy._keys
        assert known is not None and known.targets == {STRICT: 0.5}
    assert proxy.control is not None
    proxy.control.close()


@pytest.mark.parametrize(
    ("keys", "more", "expected"),
    [
        (None, {"group_target": ("task:math",)}, "--group-target: 'task:math' is no target of a"),
        (None, {"group_target": ("task:a=0.1", "task:a=0.2")}, "-target: task:a has two targets"),
        (None, {"group_target": ("tenant:sk-1=0.1",)}, "--group-target: expected a tenant's 16"),
        (None, {"group_target": ("math=0.1",)}, "'math' can have no target"),
        (
            None,
            {"group_target": ("task:a=0.95",)},
            "target of task:a is 0.95, expected above 0 and",
        ),
        (None, {"group_target": ("task:a=nan",)}, "target of task:a is nan"),
        (None, {"group_target": ("task:a=0",)}, "target of task:a is 0, expected above 0"),
        (None, {"group_target": ("task:a=1",)}, "target of task:a is 1, expected above 0"),
        (
            None,
            {"group_target": ("task:a=0.1",), "control": "off", "target": 0.02, "state": None},
            "--group-target is given, expected it with --control observe or apply",
        ),
        ({"k": {"target": 0.95}}, {}, "target of tenant:[0-9a-f]{16} is 0.95, expected above"),
        ({"k": {"target": 0}}, {}, "entry 1: target is 0, expected a number between 0 and 1"),
        ({"k": {"target": True}}, {}, "entry 1: target is True"),
        ({"k": {"target": "0.1"}}, {}, "entry 1: target is '0.1'"),
        ({"k": {"target": float("nan")}}, {}, "entry 1: target is nan"),
        (
            KEYS,
            {"group_target": (f"{STRICT}=0.1",)},
            f"{STRICT} has a --group-target too, expected one",
        ),
        (
            KEYS,
            {"control": "off", "target": 0.02, "state": None},
            "an entry has a target, expected --control observe or apply",
        ),
        ({str(n): {"target": 0.1} for n in range(100)}, {}, "100 groups have a target of their"),
    ],
)
def test_targets_that_make_no_sense_are_refused_before_anything_is_written(
    keys: Any, more: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        create_app(settings(tmp_path, keys, **more))
    assert {path.name for path in tmp_path.iterdir()} <= {"head", "keys"}
