"""Whether an answer behind a halted thought can be given, or the thought is to go on instead."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from haltwise.errors import InputError
from haltwise.proxy.metrics import log
from haltwise.proxy.wire import Json, without_markers
from haltwise.session.thought import ForcedAnswer, PointRules

#: Given the body of a client's request and the text of an answer, says whether that can be given.
Validator = Callable[[Json, str], bool]

#: Any answer can be given, or those that the head's answer rule can read.
UNCHECKED, READABLE = "off", "readable"


class Acceptance:
    """Says of answers whether they can be given.

    Args:
        check: "off", "readable", or "MODULE:NAME" of an operator's own `Validator`.

    Raises:
        InputError: If there is none of that name.
    """

    def __init__(self, check: str) -> None:
        """Finds the operator's function."""
        self.is_on = check != UNCHECKED
        self._validator: Validator | None = None
        if check in (UNCHECKED, READABLE):
            return
        expected = f"{UNCHECKED}, {READABLE} or MODULE:NAME of a function"
        try:
            found = resolve_name(check)
        except (ValueError, ImportError, AttributeError) as error:
            told = f"--check-answers is {check!r}, expected {expected} ({error})"
            raise InputError(told) from None
        if ":" not in check or not callable(found):
            raise InputError(f"--check-answers is {check!r}, expected {expected}")
        self._validator = found

    def refuses(self, body: Json, text: str, rules: PointRules) -> bool:
        """Returns whether an answer cannot be given; a validator that fails refuses nothing.

        Args:
            body: The client's request.
            text: All that follows the close text.
            rules: They know how answers are read.
        """
        if not self.is_on:
            return False
        if self._validator is None:
            text = without_markers(text, rules.think_end)
            return not rules.read(ForcedAnswer([text], [], 0)).answer
        try:
            return not self._validator(body, text)
        except Exception:
            log.exception("--check-answers failed: the answer is given as it is")
            return False
