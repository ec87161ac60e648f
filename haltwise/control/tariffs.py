"""What tokens cost in money: integers of a billionth of a dollar, so that sums are exact.

A price is what the policy pays for a token, in exact match; a tariff is what somebody pays for it,
in dollars. Who says what a right answer is worth has named the price that follows from both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haltwise.errors import InputError, from_clone, reason_of, what_failed

#: Nano-dollars in a dollar.
NANO = 10**9
#: Who may be asked about LMs that a file of tariffs does not know: a library's list.
LISTED = "genai-prices"
#: The only unit of a file of tariffs.
UNIT = "dollars per 1,000,000 tokens"
_PER = 10**6
# What an LM's output may cost in that unit; what is beyond is in another one.
_LEAST, _MOST = 0.001, 10_000.0
_PARTS = ("input", "cached", "output")


@dataclass(frozen=True)
class Tariff:
    """What the tokens of one LM cost, each in nano-dollars per 1,000,000 tokens."""

    input: int
    """Of a prompt."""
    cached: int
    """Of the part of a prompt that the server's cache had."""
    output: int
    """Generated."""

    @classmethod
    def read(cls, told: Any) -> Tariff:
        """Reads an entry of a file of tariffs.

        Args:
            told: Its "input", "output" and, if that is cheaper, "cached", in `UNIT`.

        Raises:
            InputError: If one is missing, no amount of money or can only be in another unit.
        """
        if not isinstance(told, dict) or not {"input", "output"} <= set(told) <= set(_PARTS):
            raise InputError(f"expected input, output and perhaps cached, in {UNIT}")
        for part, value in told.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise InputError(f"{part} is {value!r:.40}, expected a number, 0 or more")
            least = _LEAST if part == "output" else 0
            if not least <= value <= _MOST:
                raise InputError(
                    f"{part} is {value}, expected {least} to {_MOST:g}: is it in {UNIT}?"
                )
        if told.get("cached", 0) > told["input"]:
            raise InputError(f"cached is {told['cached']}, expected at most input, {told['input']}")
        parts = {"cached": told["input"]} | told
        return cls(**{part: round(parts[part] * NANO) for part in _PARTS})

    def cost(self, num_input: int, num_cached: int, num_output: int) -> int:
        """Returns what a request costs, in nano-dollars, rounded up.

        Args:
            num_input: Tokens of all its prompts.
            num_cached: Those of them that a cache had.
            num_output: Tokens that were generated for it.
        """
        cached = min(num_cached, num_input)
        spent = (num_input - cached) * self.input + cached * self.cached + num_output * self.output
        return -(-spent // _PER)

    def price_of(self, value: float) -> float:
        """Returns the price, in exact match per 1,000 tokens, at which tokens pay for themselves.

        Args:
            value: What a right answer is worth, in dollars, above 0: 1,000 tokens that cost c buy
                c / value right answers.
        """
        return 1000 * self.output / (_PER * NANO) / value


class Tariffs:
    """The tariffs of all LMs that somebody has told; nobody else's is guessed.

    Args:
        path: A JSON file, such as {"unit": "dollars per 1,000,000 tokens", "models": {"r1":
            {"input": 0.55, "cached": 0.14, "output": 2.19}}}. With "beside": "genai-prices", that
            library's list is asked about LMs that are not in the file.

    Raises:
        InputError: If it cannot be read, or has another form or unit, or the library is missing.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        told = read_object(path, "tariffs")
        if told.get("unit") != UNIT or not {"models"} <= set(told) <= {"unit", "models", "beside"}:
            raise InputError(f'tariffs {path}: expected {{"unit": "{UNIT}", "models": {{...}}}}')
        models, beside = told["models"], told.get("beside")
        if beside not in (None, LISTED):
            raise InputError(f"tariffs {path}: beside is {beside!r:.40}, expected {LISTED!r}")
        if not isinstance(models, dict) or not (models or beside):
            raise InputError(f"tariffs {path}: models is {models!r:.40}, expected names of LMs")
        self._by_model: Mapping[str, Tariff] = {
            name: _entry(entry, f"tariffs {path}, {name!r:.60}") for name, entry in models.items()
        }
        self._asks_list = beside is not None
        if self._asks_list:
            check_list()

    def of(self, model: str) -> Tariff | None:
        """Returns the tariff of an LM by the name that requests call it; None if it is unknown.

        An entry "*" is of every LM that has none, and that no list has.
        """
        listed = self._asks_list and model and model not in self._by_model
        found = self._by_model.get(model) or (_listed(model) if listed else None)
        return found or self._by_model.get("*")


def check_list() -> None:
    """Refuses a list that is not installed.

    Raises:
        InputError: If it is not.
    """
    try:
        import genai_prices  # noqa: F401
    except ImportError:
        told = f"needs genai-prices: {from_clone('tariffs')}"
        raise InputError(f"beside is {LISTED!r}, which {told}") from None


def _listed(model: str) -> Tariff | None:
    """Returns the tariff of an LM that the library's list has now, the highest one of its tiers."""
    from genai_prices import Usage, calc_price

    try:
        price = calc_price(Usage(input_tokens=1, output_tokens=1), model_ref=model).model_price
    except LookupError:
        return None
    parts = [_highest(part) for part in (price.input_mtok, price.output_mtok)]
    cached = _highest(price.cache_read_mtok)
    if None in parts:
        return None
    told = {"input": float(parts[0]), "output": float(parts[1])}
    try:
        return Tariff.read(told | ({} if cached is None else {"cached": float(cached)}))
    except InputError:
        return None


def _highest(part: Any) -> Any:
    """Returns the largest amount of a part of a listed price, which may hang on the usage."""
    tiers = getattr(part, "tiers", None)
    return part if tiers is None else max([part.base, *(tier.price for tier in tiers)])


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.
        what: What a person knows it by.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what} {what_failed(error)}, expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path}: {reason_of(error)}, expected a JSON file") from None
    if not isinstance(told, dict):
        raise InputError(f"{what} {path}: expected a JSON object")
    return told


def _entry(entry: Any, source: str) -> Tariff:
    try:
        return Tariff.read(entry)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
