"""Audits are drawn as often as they say, by nobody's choice."""

import math

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.draws import AuditDraw, draw, draw_audit

KEY = b"0123456789abcdef"
NUMBERS = np.array([draw(KEY, f"request-{n}") for n in range(20_000)])


def test_draws_are_even_and_have_nothing_to_do_with_each_other() -> None:
    shares = np.histogram(NUMBERS, bins=20, range=(0, 1))[0] / len(NUMBERS)
    assert np.abs(shares - 0.05).max() < 4 * math.sqrt(0.05 * 0.95 / len(NUMBERS))
    dense = np.array([draw(KEY, f"request-{n}", "dense") for n in range(20_000)])
    other = np.array([draw(KEY[::-1], f"request-{n}") for n in range(20_000)])
    split = np.array([draw(KEY, f"request-{n}", "split") for n in range(20_000)])
    for numbers in (dense, split, other, np.roll(NUMBERS, 1)):
        assert abs(np.corrcoef(NUMBERS, numbers)[0, 1]) < 4 / math.sqrt(len(NUMBERS))


def test_a_draw_is_the_same_every_time() -> None:
    assert draw(KEY, "é") == draw(KEY, "é") != draw(KEY, "e")


def test_each_group_counts_its_own_share() -> None:
    rates = {"everything": 0.05, "tenant": 0.5}
    for n, number in enumerate(NUMBERS[:500]):
        told = draw_audit(KEY, f"request-{n}", rates)
        counting = {group: rate for group, rate in rates.items() if number < rate}
        assert told == AuditDraw(0.5, number < 0.5, counting)
    assert draw_audit(KEY, "x", {}) == AuditDraw(0.0, False, {})
    assert draw_audit(KEY, "x", {"open": 1.0}).audited


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 65])
def test_a_key_that_is_none(key: bytes) -> None:
    with pytest.raises(InputError, match="expected 16 to 64"):
        draw(key, "request")
