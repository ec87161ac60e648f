"""The benchmark of heads before servers: its head halts where it is to, and its lines add up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import servers
from benchmarks.servers import ServersConfig
from haltwise import HaltMonitor, InputError, Signals


@pytest.mark.parametrize("price", [1.0, 0.1])
def test_the_head_halts_from_one_place_on_and_at_a_small_price_never(price: float) -> None:
    head = servers._head(ServersConfig(halts_at=64), "always")
    monitor, row = HaltMonitor(head, 1, price), np.zeros(1, dtype=np.int64)
    halted = []
    for position in (16, 48, 64, 4000):
        signals = Signals(np.array([position]), confidence=np.ones(1, dtype=np.float32))
        halted += monitor.observe(signals, row).tolist()
    assert halted == ([False, False, True, True] if price == 1.0 else [False] * 4)


@pytest.mark.whole
def test_looks_are_counted_and_only_those_that_halt_save_tokens() -> None:
    config = ServersConfig(num_streams=(1,), num_questions=2, halts_at=32)
    found = {result.name: result.median for result in servers.measure(config, 1)}
    halted = {name: found[f"halted: {name}"] for name in ("server alone", "looks in turn")}
    assert halted == {"server alone": 0, "looks in turn": 2}
    assert found["halted: in turn, never halts"] == found["halted: beside, never halts"] == 0
    assert found["probes: looks in turn"] == 4
    # A forced answer of the embedded LM has two tokens, its end is one. The server does not tell an
    # end that comes with the last token of a turn, so that this is written again.
    plain, never = found["tokens: server alone"], found["tokens: in turn, never halts"]
    assert 0 <= never - plain - 2 * found["probes: in turn, never halts"] <= 2
    assert found["tokens: looks in turn"] == 2 * 32 + 4 * 2
    # One thought has not ended within the budget.
    assert (found["right: server alone"], plain > 512) == (1, True)
    saved = 100 * (1 - found["tokens: looks in turn"] / plain)
    assert found["tokens saved: looks in turn"] == pytest.approx(saved)


@pytest.mark.whole
def test_every_round_asks_other_questions_and_all_of_them_are_summed_up() -> None:
    config = ServersConfig(num_streams=(1,), num_questions=1, halts_at=32, ways=("looks in turn",))
    found = {result.name: result.values for result in servers.measure(config, 2)}
    one = replace(config, num_questions=2)
    together = {result.name: result.values for result in servers.measure(one, 1)}
    tokens = found["tokens: server alone"]
    assert tokens[0] != tokens[1] and sum(tokens) == together["tokens: server alone"][0]
    title = "tokens saved{}: looks in turn"
    assert found[title.format(", all rounds")] == pytest.approx(together[title.format("")])


def test_a_trained_head_halts_at_its_own_price_and_never_else() -> None:
    config = ServersConfig(head=Path("run"), ways=("looks in turn",))
    for refused in (config, replace(config, lm=Path("lm.gguf"), ways=("in turn, never halts",))):
        with pytest.raises(InputError, match=r"--servers\.head needs --servers.lm"):
            servers.measure(refused, 1)
