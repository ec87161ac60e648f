"""A randomised comparison of two heads as a page: one file, which asks nobody for anything."""

from __future__ import annotations

import math
import re
from html import escape
from importlib.resources import files
from string import Template

from haltwise.control.experiment import Comparison, Effect, Kind

_UNITS: dict[Kind, tuple[str, str, float]] = {
    "tokens": ("Tokens of an answer", "tokens", 1.0),
    "seconds": ("Time of an answer", "s", 1.0),
    "failures": ("Requests that fail", "%", 100.0),
    "complaints": ("Complaints", "%", 100.0),
}


def experiment_page(found: Comparison) -> str:
    """Returns the page of a comparison, in the live page's style."""
    style = re.findall("<style>(.*?)</style>", _file("page.html"), re.DOTALL)[0]
    old, new = found.units
    return Template(_file("experiment.html")).substitute(
        style=style,
        champion=escape(found.champion[:12]),
        challenger=escape(found.challenger[:12]),
        verdict=escape(found.verdict),
        old=f"{old:,}",
        new=f"{new:,}",
        mismatch=f"{found.mismatch:.3g}",
        charts="".join(map(_chart, found.effects)),
        rows="".join(map(_row, found.effects)),
    )


def _file(name: str) -> str:
    return (files("haltwise.proxy") / name).read_text(encoding="utf-8")


def _row(one: Effect) -> str:
    name, unit, scale = _UNITS[one.kind]
    cells = [f"{one.units:,}", *(_told(scale * value) for value in (one.champion, one.challenger))]
    cells += [_told(scale * one.estimate), f"{_told(scale * one.low)} to {_told(scale * one.high)}"]
    told = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}, {unit}</th>{told}</tr>'


def _chart(one: Effect) -> str:
    """Returns the interval of one effect beside 0, as a drawing."""
    name, unit, scale = _UNITS[one.kind]
    reach = max(abs(one.low), abs(one.high)) or 1.0
    low, estimate, high = (150 + 130 * end / reach for end in (one.low, one.estimate, one.high))
    told = [_told(scale * end) for end in (one.low, one.estimate, one.high)]
    words = f"it adds {told[1]} {unit}, {told[0]} to {told[2]}"
    return (
        f"<figure><h3>{name}</h3>"
        f'<svg viewBox="0 0 300 32" role="img" aria-label="{name}: {words}">'
        f'<line class="axis" x1="150" x2="150" y1="4" y2="28"/>'
        f'<line class="end served" x1="{low:.1f}" x2="{high:.1f}" y1="16" y2="16"/>'
        f'<circle class="mark served" cx="{estimate:.1f}" cy="16" r="5"/>'
        "</svg>"
        f"<figcaption>{words}</figcaption></figure>"
    )


def _told(number: float) -> str:
    if math.isnan(number):
        return "unknown"
    return (f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}").replace("-", "\u2212")
