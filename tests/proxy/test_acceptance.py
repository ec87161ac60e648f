"""A thought that was halted goes on where its answer cannot be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.acceptance import Acceptance
from haltwise.session.thought import PointRules
from tests.heads import sure_head
from tests.proxy.fake_upstream import Kind, Plan
from tests.proxy.proxies import Pair, Pairs, ask, saved_head

ME = "tests.proxy.test_acceptance"
BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def refuse(body: Any, text: str) -> bool:
    """A validator that never accepts."""
    assert "prompt" in body or "messages" in body
    return False


def accept(body: Any, text: str) -> bool:
    """Accepts what the fake LM says after a halted thought, and that is whole."""
    return text.endswith("seen20é")


def fail(body: Any, text: str) -> bool:
    """A validator that is broken."""
    raise KeyError("answer")


def checked(pairs: Pairs, check: str, kind: Kind = "vllm", **more: Any) -> Pair:
    name = check if check in ("off", "readable") else f"{ME}:{check}"
    return pairs(kind, check_answers=name, **more)


def shown(reply: Any, chat: bool) -> tuple[str, str]:
    if chat:
        return reply.thought, reply.text
    thought, _, text = reply.text.partition("</think>")
    return thought, text


@BOTH
@STREAMED
@pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang", "ollama"])
@pytest.mark.parametrize(("slots", "check"), [(1, "refuse"), (4, "refuse"), (4, "readable")])
def test_where_no_answer_is_accepted_clients_get_what_they_would_have_got(
    pairs: Pairs, plan: Plan, kind: Kind, slots: int, check: str, chat: bool, stream: bool
) -> None:
    """None of the fake's answers has a number to read."""
    pair = checked(pairs, check, kind, fake={"num_slots": slots})
    counted = pair.proxy.metric("haltwise_fallbacks_total", reason="answer refused")
    reply = ask(pair.client, plan, chat, stream)
    assert shown(reply, chat) == (plan.thought(), plan.answer_text()) and reply.finish == "stop"
    told = reply.haltwise
    assert not told["halted"] and told["fallback"] == "answer refused"
    assert told["probes"]["num"] == 1 and told["probes"]["completion_tokens"] >= plan.answer
    assert reply.usage["completion_tokens"] >= 28 + 2 * plan.answer
    now = pair.proxy.metric("haltwise_fallbacks_total", reason="answer refused")
    assert now == counted + 1


@BOTH
@STREAMED
@pytest.mark.parametrize("check", ["accept", "fail", "off"])
def test_an_answer_that_is_accepted_is_given(
    pairs: Pairs, plan: Plan, check: str, chat: bool, stream: bool
) -> None:
    """Also where the operator's own function is broken."""
    plain = ask(checked(pairs, "off").client, plan, chat, stream)
    reply = ask(checked(pairs, check).client, plan, chat, stream)
    assert shown(reply, chat) == shown(plain, chat)
    assert shown(reply, chat)[1].strip() == plan.answer_text(20).strip()
    assert reply.haltwise["halted"] and "fallback" not in reply.haltwise
    assert reply.usage["completion_tokens"] == plain.usage["completion_tokens"]


@STREAMED
@pytest.mark.parametrize("answers", ["seen", "free"])
def test_an_answer_that_was_seen_is_checked_too(
    pairs: Pairs, plan: Plan, answers: str, stream: bool
) -> None:
    pair = checked(pairs, "refuse", probing=True, answers=answers)
    reply = ask(pair.client, plan, True, stream)
    assert shown(reply, True) == (plan.thought(), plan.answer_text())
    assert reply.haltwise["fallback"] == "answer refused"


@BOTH
def test_a_cap_closes_a_thought_whatever_its_answer_is(
    pairs: Pairs, plan: Plan, chat: bool
) -> None:
    pair = checked(pairs, "refuse")
    reply = ask(pair.client, plan, chat, True, {"X-Haltwise-Max-Tokens": "8"})
    thought, text = shown(reply, chat)
    assert (thought.strip(), text.strip()) == (plan.thought(8).strip(), plan.answer_text(8).strip())
    assert reply.haltwise["reason"] == "capped"


def test_an_answer_is_read_by_the_heads_rule_behind_its_box() -> None:
    acceptance = Acceptance("readable")
    rules = PointRules(sure_head(close="</think> so \\boxed{").config.halting)
    assert not acceptance.refuses({}, "7}.", rules)
    assert acceptance.refuses({}, "", rules) and acceptance.refuses({}, "</think>\n", rules)
    assert not Acceptance("off").refuses({}, "", rules)


@pytest.mark.parametrize("name", ["maybe", "no.such:thing", f"{ME}:ME", f"{ME}:nothing", ""])
def test_no_validator_is_refused(name: str, tmp_path: Path) -> None:
    config = ServeConfig(head=saved_head(tmp_path / "head"), check_answers=name)
    with pytest.raises(InputError, match=r"--check-answers is .*, expected off, readable"):
        create_app(config)
