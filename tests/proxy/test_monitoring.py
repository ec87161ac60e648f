"""What Prometheus is told of the control, and what is made of it: a dashboard, and alerts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from haltwise.control.groups import EVERYTHING
from tests.proxy.proxies import ROOT, Proxy
from tests.proxy.test_page import Watched, files, watched

#: What a family's samples are called behind its name, by its type.
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
#: Labels that Prometheus itself gives.
OWN = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("busy")
    with watched(folder, **files(folder)) as found:
        found.ask(200)
        yield found


def scraped(proxy: Proxy, key: str = "") -> list[Metric]:
    """What the proxy exports."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    text = proxy.client.get("/metrics", headers=headers).raise_for_status().text
    return list(text_string_to_metric_families(text))


def values(families: list[Metric]) -> dict[tuple[str, str], float]:
    """By name and group, all that is told of groups."""
    samples = [one for family in families for one in family.samples if "group" in one.labels]
    return {(one.name, one.labels["group"]): one.value for one in samples}


def test_groups_are_told_of_as_the_status_tells(busy: Watched) -> None:
    busy.clock[0] += 10
    busy.people.settle()
    status, found = busy.control.status(), values(scraped(busy.proxy))
    assert {group for _, group in found} == set(status["groups"])
    for name, group in status["groups"].items():
        at = group["at_price"]
        expected = {
            "requests_total": group["requests"],
            "audits_total": group["audits"],
            "epoch": group["epoch"],
            "target_ratio": group["target"],
            "breaker_open": float(group["breaker"] == "open"),
            "price": group["price"],
            "ceiling": group["ceiling"],
        }
        for part in ("loss", "saving"):
            expected[f"{part}_ratio"] = at[part]["estimate"]
            expected |= {f"{part}_{end}_ratio": at[part][end] for end in ("low", "high")}
        for key, value in expected.items():
            assert found[f"haltwise_group_{key}", name] == pytest.approx(value, abs=1e-6)


def test_names_of_groups_are_the_operators_if_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    with watched(tmp_path, operator_key_env="OPERATOR") as guarded:
        guarded.ask(90)
        shown = {
            key: {group for _, group in values(scraped(guarded.proxy, key))}
            for key in ("", "other", "secret")
        }
    assert shown[""] == shown["other"] == {EVERYTHING}
    assert shown["secret"] == {EVERYTHING, "task:math", "task:<b>code</b>"}


@pytest.mark.parametrize(("mode", "audit"), [("observe", 0.0), ("observe", 0.2), ("apply", 0.3)])
def test_the_wanted_share_of_audits_is_told(mode: str, audit: float, tmp_path: Path) -> None:
    with watched(tmp_path, control=mode, audit=audit) as found:
        assert found.proxy.metric("haltwise_audit_ratio") == audit


def of_dashboard() -> list[str]:
    """The expressions of the dashboard, and those that its variables are found by."""
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    variables = [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    notes = [one["expr"] for one in board["annotations"]["list"]]
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(places)
    return [*(target["expr"] for target in targets), *variables, *notes]


def of_alerts() -> list[str]:
    """The expressions of the alerts."""
    (group,) = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules)
    return [rule["expr"] for rule in rules]


@pytest.mark.parametrize("expressions", [of_dashboard, of_alerts])
def test_every_number_of_dashboard_and_alerts_is_one_that_the_proxy_exports(
    expressions: Any, busy: Watched
) -> None:
    families = scraped(busy.proxy)
    exported = {family.name + end for family in families for end in ENDINGS.get(family.type, ())}
    labels: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in expressions():
        used = re.findall(r"(haltwise_\w+)(?:{([^}]*)})?", expression)
        assert used
        for name, selector in used:
            assert name in exported, expression
            if name in labels:  # what was never counted has none yet
                asked = set(re.findall(r"(\w+)\s*=", selector))
                assert asked <= labels[name] | OWN, expression
        assert expression.count("(") == expression.count(")")
