"""Compares formulas with math-verify in a process of its own, which a formula cannot outlive.

It runs as a script: the first argument is the time limit, seconds; then every line of the input is
a JSON list of two formulas, and every line of the output says whether they are equal. A comparison
that takes longer ends the process. That works in any thread and even within sympy's C code, where
a signal does not reach Python.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import sys
from dataclasses import replace

_DECIMAL = re.compile(r"(?<![\d.])(\d{0,99})\.(\d{1,99})(?![\d.])")
# Digits that two numbers must share to be equal: small numbers are not all zero.
_DIGITS = 400
_START_S = 600


def _exact(formula: str) -> str:
    """Returns a formula with fractions in place of decimals: math-verify rounds those."""
    return _DECIMAL.sub(
        lambda found: rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}", formula
    )


def _are_equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    latex = LatexExtractionConfig()
    # A letter behind a number is a factor, and no unit that could be dropped.
    with_letters = replace(latex.normalization_config, units=False)
    configs = [replace(latex, normalization_config=with_letters)]
    sides = [parse(f"${_exact(side)}$", configs, parsing_timeout=None) for side in (gold, answer)]
    return all(sides) and bool(
        verify(
            *sides,
            float_rounding=_DIGITS,
            numeric_precision=_DIGITS + 50,
            allow_set_relation_comp=True,
            timeout_seconds=None,
        )
    )


def _serve(seconds: float) -> None:
    results = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        faulthandler.dump_traceback_later(_START_S, exit=True, file=nowhere)
        import math_verify  # noqa: F401

        logging.disable()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(True), file=results, flush=True)
        for line in sys.stdin:
            gold, answer = json.loads(line)
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            is_equal = _are_equal(gold, answer)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(is_equal), file=results, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
