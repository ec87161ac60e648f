"""Money is counted in whole nano-dollars, and a file in another unit is seen to be one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price
from genai_prices.types import TieredPrices

from haltwise import InputError
from haltwise.control.tariffs import NANO, UNIT, Tariff, Tariffs

ENTRY = {"input": 0.55, "cached": 0.14, "output": 2.19}


def test_a_request_costs_what_its_parts_cost() -> None:
    tariff = Tariff.read(ENTRY)
    assert tariff.cost(1_000_000, 0, 0) == 550_000_000
    assert tariff.cost(1_000_000, 1_000_000, 0) == 140_000_000
    assert tariff.cost(1_000, 400, 2_000) == 600 * 550 + 400 * 140 + 2_000 * 2_190
    assert tariff.cost(5, 9, 0) == 5 * 140  # a cache has no more than was asked for
    assert Tariff.read({"input": 0.0015, "output": 0.0015}).cost(1, 0, 0) == 2  # rounded up
    assert Tariff.read({"input": 1, "output": 1}).cost(3, 3, 0) == 3_000


def test_what_a_right_answer_is_worth_names_a_price() -> None:
    """At 2.19 dollars a million, 1,000 tokens cost 0.00219 dollars: 0.0219 answers of 10 cents."""
    assert Tariff.read(ENTRY).price_of(0.10) == pytest.approx(0.0219)


def test_nobody_guesses_what_an_unknown_lm_costs(tmp_path: Path) -> None:
    path = tmp_path / "tariffs.json"
    path.write_text(json.dumps({"unit": UNIT, "models": {"r1": ENTRY}}))
    tariffs = Tariffs(path)
    assert tariffs.of("r1") == Tariff(550_000_000, 140_000_000, 2_190_000_000)
    assert tariffs.of("r2") is None and tariffs.of("") is None


def test_a_list_is_asked_about_lms_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "tariffs.json"
    told = {"unit": UNIT, "models": {"gpt-4o": ENTRY}, "beside": "genai-prices"}
    path.write_text(json.dumps(told))
    tariffs = Tariffs(path)
    assert tariffs.of("gpt-4o") == Tariff.read(ENTRY)
    listed = tariffs.of("gpt-4o-mini")
    assert listed is not None and 0 < listed.cached < listed.input < listed.output
    priced = calc_price(Usage(input_tokens=9_000, output_tokens=700), model_ref="gpt-4o-mini")
    assert listed.cost(9_000, 0, 700) == math.ceil(priced.total_price * NANO)
    assert tariffs.of("nobody's own LM") is None and tariffs.of("") is None
    tiered = calc_price(Usage(input_tokens=1), model_ref="gemini-2.5-pro").model_price.input_mtok
    highest = tariffs.of("gemini-2.5-pro")
    assert isinstance(tiered, TieredPrices) and highest is not None
    assert highest.input == max(tier.price for tier in tiered.tiers) * NANO > tiered.base * NANO


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, r"json: No such file or directory, expected a JSON file"),
        ("{", "expected a JSON file"),
        ("[]", "expected a JSON object"),
        ({"models": {"r1": ENTRY}}, '"unit": "dollars per 1,000,000 tokens"'),
        ({"unit": "dollars per token", "models": {"r1": ENTRY}}, '"unit"'),
        ({"unit": UNIT, "models": {}}, "expected names of LMs"),
        ({"unit": UNIT, "models": {"r1": ENTRY}, "beside": "x"}, "expected 'genai-prices'"),
        ({"unit": UNIT, "models": {"r1": ENTRY}, "more": 1}, '"unit"'),
        ({"unit": UNIT, "models": [1]}, "expected names of LMs"),
        ({"unit": UNIT, "models": {"r1": 2}}, "'r1': expected input, output"),
        ({"unit": UNIT, "models": {"r1": {"output": 2}}}, "expected input, output"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"more": 1}}}, "expected input, output"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"output": 0}}}, "output is 0, expected 0.001"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"output": 2.19e-6}}}, "is it in dollars per"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"output": 2.19e6}}}, "is it in dollars per"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"input": -1}}}, "input is -1"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"input": True}}}, "input is True"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"input": float("nan")}}}, "input is nan"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"cached": "free"}}}, "cached is 'free'"),
        ({"unit": UNIT, "models": {"r1": ENTRY | {"cached": 9}}}, "cached is 9, expected at most"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(told: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "tariffs.json"
    if told is not None:
        path.write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(InputError, match=expected):
        Tariffs(path)
