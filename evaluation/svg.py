"""Makes figures SVG elements whose colours follow a page's choice of light or dark paper."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

#: By name, a colour for light paper and one for dark paper. Figures are drawn in the light ones.
PALETTE = {
    "paper": ("#ffffff", "#161b21"),
    "ink": ("#1c2228", "#e7eaed"),
    "muted": ("#59636d", "#a4aeb8"),
    "grid": ("#d9dee3", "#343d46"),
    "head": ("#0a5cc2", "#62aeff"),
    "strongest": ("#c2480a", "#ff9a57"),
    "right": ("#0e7c6b", "#3fbfa9"),
    "wrong": ("#a8123e", "#ff7a9c"),
    "other-0": ("#7b3fa8", "#c9a0f2"),
    "other-1": ("#7a6a00", "#d9c24a"),
    "other-2": ("#0d7377", "#55c8cc"),
    "other-3": ("#b0307c", "#f490ca"),
    "other-4": ("#4b7a1e", "#98d468"),
    "other-5": ("#7d4f30", "#d6a683"),
    "other-6": ("#4f6480", "#9fb6d1"),
    "other-7": ("#6f7780", "#9aa4af"),
}
COLOR = {name: light for name, (light, _) in PALETTE.items()}

_VARIABLES = {light: f"var(--{name})" for name, light in COLOR.items()}
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_PAINTED = {"style", "fill", "stroke"}
_URL = re.compile(r"url\(#([^)]*)\)")
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def svg(figure: Figure, name: str, title: str, text: str) -> str:
    """Returns a figure as an SVG element for an HTML page.

    Colours of PALETTE become the CSS variables of their names, so that a page sets each for light
    and for dark paper. Text stays text. The same figure gives the same bytes.

    Args:
        figure: The figure. It was drawn, and this function is called, under settings with
            `svg.fonttype` none and a `svg.hashsalt`.
        name: The name that goes before every id, so that no two figures of a page collide.
        title: What the figure is.
        text: What the figure shows, for those who cannot see it.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for definitions in root.findall(f"{_SVG}defs"):
        # A style sheet in a figure would hold for the whole page.
        for sheet in definitions.findall(f"{_SVG}style"):
            definitions.remove(sheet)
    for element in root.iter():
        for key in _PAINTED & element.attrib.keys():
            element.set(key, _HEX.sub(_variable, element.attrib[key]))
    _rename_ids(root, name)
    _describe(root, name, title, text)
    ElementTree.register_namespace("", _SVG.strip("{}"))
    ElementTree.register_namespace("xlink", _HREF[1:].partition("}")[0])
    return ElementTree.tostring(root, encoding="unicode")


def _variable(found: re.Match[str]) -> str:
    """Returns the CSS variable of a colour of the palette; any other colour stays."""
    return _VARIABLES.get(found[0], found[0])


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Puts a name before the ids that are referred to, and drops the others."""
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == _HREF:
                used.add(value[1:])
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                used.update(_URL.findall(value))
                element.set(key, _URL.sub(rf"url(#{name}-\1)", value))
    for element in root.iter():
        found = element.attrib.pop("id", None)
        if found in used:
            element.set("id", f"{name}-{found}")


def _describe(root: ElementTree.Element, name: str, title: str, text: str) -> None:
    """Makes the SVG element one image with a title and a description, as wide as its place."""
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for k, (tag, words) in enumerate((("title", title), ("desc", text))):
        element = ElementTree.Element(f"{_SVG}{tag}", {"id": f"{name}-{tag}"})
        element.text = words
        root.insert(k, element)
