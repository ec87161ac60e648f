from typing import Any

import numpy as np
import pytest

from haltwise import InputError, Terms

DEFAULT = Terms(0.5, min_tokens=10, max_tokens=100)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, DEFAULT),
        ({"price": 2}, Terms(2.0, 10, 100)),
        ({"price": " 0.25 ", "max_tokens": "40"}, Terms(0.25, 10, 40)),
        ({"min_tokens": 0.0}, Terms(0.5, 0, 100)),
        ({"off": 1}, Terms(0.0, 10, 100)),
        ({"off": "True", "price": 3}, Terms(0.0, 10, 100)),
        ({"off": False, "price": 3}, Terms(3.0, 10, 100)),
        ({"off": "0"}, DEFAULT),
    ],
)
def test_what_a_request_leaves_out_is_as_in_the_default(
    asked: dict[str, Any], expected: Terms
) -> None:
    assert Terms.read(asked, DEFAULT) == expected


@pytest.mark.parametrize(
    ("asked", "price"),
    [
        ({"segment": "hard"}, 0.1),
        ({"segment": "never"}, 0.0),
        ({"segment": "unknown"}, 0.5),
        ({"segment": None}, 0.5),
        ({"segment": "hard", "price": 3}, 3.0),
        ({"segment": "hard", "off": True}, 0.0),
    ],
)
def test_who_names_a_segment_and_no_price_has_that_of_the_segment(
    asked: dict[str, Any], price: float
) -> None:
    default = Terms(0.5, segment_prices={"hard": 0.1, "never": 0.0})
    terms = Terms.read(asked, default)
    assert (terms.price, terms.segment) == (price, asked["segment"])
    named = Terms.read({"price": 2}, default)  # an operator's entry, behind which a client asks
    assert Terms.within({"segment": "hard"}, named).price == 2
    assert Terms.within({"segment": "hard"}, default).price == 0.1
    off = Terms.read({"off": True}, default)
    assert Terms.within({"segment": "hard"}, off).price == 0


def test_a_segment_without_a_price_is_told_once_with_those_that_have_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    default = Terms(0.5, segment_prices={"hard": 0.1, "easy": 0.3})
    for segment in ("hart", "hart", "hard", None):
        Terms.read({"segment": segment}, default)
    Terms.read({"segment": "hart"}, Terms(0.5))
    (told,) = caplog.messages
    told_of = "segment 'hart' has no price of its own, as easy, hard have"
    assert told == f"{told_of}: the default price holds"


@pytest.mark.parametrize(
    ("asked", "cap"),
    [({}, 100), ({"max_tokens": 50}, 50), ({"max_tokens": 500}, 100), ({"max_tokens": None}, 100)],
)
@pytest.mark.parametrize("off", [False, True])
def test_no_client_lifts_the_operators_cap(asked: dict[str, Any], cap: int, off: bool) -> None:
    terms = Terms.within({**asked, "off": off}, DEFAULT)
    assert terms == Terms(0.0 if off else DEFAULT.price, 10, cap)
    assert Terms.within(asked, Terms(1.0)).max_tokens == asked.get("max_tokens")
    told = "min_tokens is 101, expected at most 100, the operator's cap"
    with pytest.raises(InputError, match=told):
        Terms.within({"off": off, "min_tokens": 101}, DEFAULT)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prize": 1}, "'prize': expected price, off"),
        ({"price": "much"}, "price is 'much', expected a number"),
        ({"price": True}, "price is True"),
        ({"price": None}, "price is None"),
        ({"price": [1]}, r"price is \[1\]"),
        ({"price": -0.1}, "price is -0.1, expected 0 or more"),
        ({"price": "nan"}, "price is nan"),
        ({"price": "inf"}, "price is inf"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5, expected a whole number"),
        ({"min_tokens": "inf"}, "min_tokens is 'inf', expected a whole number"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": "1e30"}, "min_tokens is '1e30', expected a whole number"),
        ({"max_tokens": None, "min_tokens": None}, "min_tokens is None"),
        ({"price": 10**400}, "price is 1000.*, expected a number"),
        ({"max_tokens": 9}, "max_tokens is 9, expected at least 10"),
        ({"max_tokens": 0, "min_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"segment": 3}, "segment is 3, expected text"),
        ({"off": "perhaps"}, "off is 'perhaps', expected true or false"),
        ({"off": True, "price": "x"}, "price is 'x'"),
    ],
)
def test_terms_that_make_no_sense_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Terms.read(asked, DEFAULT)


def test_terms_hold_numbers_of_the_right_kind() -> None:
    terms = Terms("0.5", "3", np.int64(9))  # type: ignore[arg-type]
    assert (terms.price, terms.min_tokens, terms.max_tokens) == (0.5, 3, 9)
    for wrong in (100.5, "many", [1]):
        with pytest.raises(InputError, match="max_tokens is"):
            Terms(0.1, max_tokens=wrong)  # type: ignore[arg-type]


def test_a_price_is_finite() -> None:
    for price in (np.nan, np.inf, -1.0):
        with pytest.raises(InputError, match="price"):
            Terms(price)
