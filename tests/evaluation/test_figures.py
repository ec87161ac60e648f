import itertools
import re
from dataclasses import fields, replace
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.figure import Figure

from evaluation.figures import (
    MOST_GROUPS,
    compared_groups,
    draw,
    frontier,
    groups,
    plain,
    recordings,
    reliability,
    shown_groups,
    style,
    where,
)
from evaluation.rows import PricePoint, RecordingRow
from evaluation.svg import COLOR, PALETTE, svg
from evaluation.wording import gate_title, policy_title
from tests.evaluation.reports import (
    behaviour,
    frozen,
    group,
    known,
    made,
    made_behaviour,
    made_frozen,
    made_group,
    made_row,
    report,
    row,
)


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines(axes: Axes, label: str) -> list[tuple[float, float]]:
    line: Any = next(line for line in axes.lines if line.get_label() == label)
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def sizes(axes: Axes, side: str) -> list[float]:
    """Widths or heights of the bars."""
    return [float(getattr(bar, f"get_{side}")()) for bar in axes.patches]


def test_a_report_has_a_figure_for_every_number_it_holds() -> None:
    names = ["frontier", *(f"groups-{c}-{g}" for g in (0.0, 0.01) for c in ("saving", "em_delta"))]
    names += [f"{name}-{gate}" for gate in (0.0, 0.01) for name in ("where", "reliability")]
    names.append("training")
    assert list(draw(made(report()))) == names
    assert list(draw(made(report() | {"groups": [], "behaviour": [], "curve": []}))) == ["frontier"]


def test_the_frontier_draws_rows_in_points_and_limits_them_to_where_policies_differ() -> None:
    found = made(report())
    figure = frontier(found.rows, found.frozen, ["confidence"])
    axes = figure.axes[0]
    drawn = lines(axes, "haltwise head")
    assert [saving for saving, _ in drawn] == pytest.approx([10, 20, 30, 40, 50, 60])
    assert [change for _, change in drawn] == pytest.approx([0, -1, -2, -3, -4, -5])
    # The lowest end of a frozen interval is -3.25, the highest of a band +2; hindsight has +12.5.
    assert axes.get_ylim() == pytest.approx((-4.225, 2.6))
    assert axes.get_xlim()[1] == pytest.approx(1.03 * 53.0)
    assert axes.get_title(loc="right") == "beyond the axes: hindsight +12.50 at 62.5 %"
    assert labels(figure) == ["haltwise head", "confidence threshold", "never halting"]
    assert len([c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]) == 2
    light = frontier(found.rows, found.frozen).axes[0].collections
    assert len([c for c in light if isinstance(c, FillBetweenPolyCollection)]) == 1
    low_band, high_band = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low_band, high_band) == pytest.approx((-7.0, 2.0))


def test_a_frontier_without_intervals_has_no_band_and_bars_of_no_length() -> None:
    nothing = {"em_delta_interval": None, "saving_interval": None}
    rows = [known("head", k, -0.01 * k, 0.1 * k) | nothing for k in (1, 2)]
    axes = frontier([made_row(each) for each in rows], [made_frozen(frozen(0.0, rows[0]))]).axes[0]
    assert not [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    ends = [segment.tolist() for c in bars for segment in c.get_segments()]
    assert len(ends) == 2 and all(low == high for low, high in ends)


def test_the_frontier_does_not_say_when_its_points_were_frozen() -> None:
    text = draw(made(report()))["frontier"].text
    assert "Large points are the frozen ones" in text and "before" not in text


def test_any_number_of_unknown_policies_can_be_told_apart() -> None:
    names = [f"policy_{n}" for n in range(12)]
    rows = [known(name, k, -0.01 * k, 0.1 * k) for name in names for k in (1, 2)]
    points = [made_frozen(frozen(0.0, r)) for r in rows[::2]]
    axes = frontier([made_row(each) for each in rows], points).axes[0]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert len(set(map(str, looks[: len(names)]))) == len(names)


def test_a_frontier_of_nothing_but_never_halting_is_drawn() -> None:
    rows = [made_row(row("head")), made_row(known("never", None, 0.0, 0.0))]
    figure = frontier(rows, [made_frozen(frozen(0.0, row("head")))])
    assert labels(figure) == ["never halting"]


def test_bars_are_as_long_as_the_numbers_and_intervals_may_be_missing() -> None:
    rows = [group("segment", name, 0.0, policy) for name in "ab" for policy in ("head", "budget")]
    rows[0] |= {"saving": -0.25, "saving_interval": [-0.5, 0.125]}
    figure = groups([made_group(each) for each in rows], "saving", "saving, %")
    assert sizes(figure.axes[0], "width") == pytest.approx([-25.0, 42.5, 42.5, 42.5])
    intervals = next(c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    ends = [segment[:, 0].tolist() for segment in intervals.get_segments()]
    assert ends == [[-50.0, 12.5], [42.5, 42.5]]
    assert labels(figure) == ["haltwise head", "token budget"]


def test_of_many_groups_those_with_the_most_questions_are_drawn() -> None:
    rows = [group("segment", f"s{n}", 0.0, "head", num_questions=n) for n in range(MOST_GROUPS + 3)]
    rows.append(group("task", "math", 0.0, "head", num_questions=0))
    assert shown_groups([made_group(each) for each in rows]) == [
        *(("segment", f"s{n}") for n in range(3, MOST_GROUPS + 3)),
        ("task", "math"),
    ]


@pytest.mark.whole
def test_groups_are_of_the_head_and_the_strongest_baseline_alone() -> None:
    found = report()
    found["groups"] += [group("segment", "easy", gate, "random") for gate in (0.0, 0.01)]
    assert len(compared_groups(made(found), 0.01)) == 6
    assert labels(draw(made(found))["groups-saving-0.01"].figure) == [
        "haltwise head",
        "confidence threshold",
    ]


def test_where_it_halts_is_drawn_in_percent_of_the_traces() -> None:
    bars = sizes(where(made_behaviour(behaviour(0.0, 1.0)).where).axes[0], "height")
    assert bars == pytest.approx([2.25] * 20 + [0.25] * 20 + [50.0])
    assert sum(bars) == pytest.approx(100)


def test_reliability_leaves_out_bins_without_a_decision() -> None:
    found = made_behaviour(behaviour(0.0, 1.0)).reliability
    upper, lower = reliability(found).axes
    assert lines(upper, "halting was better") == [(12.5, 25.0), (86.25, 91.25)]
    assert lines(upper, "answer was right") == [(12.5, 37.5), (86.25, 75.0)]
    assert sizes(lower, "height") == pytest.approx([20.0, 80.0])
    reliability(replace(found, bins=found.bins[:1]))  # no decision at all


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    found = report()
    found["groups"][0]["group"] = "a $\\frac$ <b>\x00 group\nname"
    with style():
        return {
            name: svg(drawing.figure, name, drawing.title, drawing.text)
            for name, drawing in draw(made(found)).items()
        }


@pytest.mark.whole
def test_an_svg_has_text_as_text_and_only_variables_as_colours(drawn: dict[str, str]) -> None:
    for element in drawn.values():
        root = ElementTree.fromstring(element)
        assert not re.search(r": #[0-9a-f]{6}", element) and "var(--ink)" in element
        assert (
            not list(root.iter("{http://www.w3.org/2000/svg}style")) and "width" not in root.attrib
        )
        assert "metadata" not in element and "<!DOCTYPE" not in element
    names = ElementTree.fromstring(drawn["groups-saving-0.0"]).itertext()
    assert "a $\\frac$ <b> group name" in list(names)


@pytest.mark.whole
def test_ids_of_two_figures_never_collide_and_none_dangles(drawn: dict[str, str]) -> None:
    ids = {name: set(re.findall(r' id="([^"]*)"', element)) for name, element in drawn.items()}
    for one, other in itertools.combinations(ids.values(), 2):
        assert not one & other
    for name, element in drawn.items():
        used = re.findall(r'(?:url\(|href=")#([^")]*)', element)
        assert set(used) | {f"{name}-title", f"{name}-desc"} == ids[name]


@pytest.mark.whole
def test_the_same_figure_gives_the_same_bytes(drawn: dict[str, str]) -> None:
    drawing = draw(made(report()))["frontier"]
    with style():
        again = svg(drawing.figure, drawing.name, drawing.title, drawing.text)
    assert again == drawn["frontier"]


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", [0, 1])
def test_colours_can_be_seen_on_light_and_dark_paper(paper: int) -> None:
    ground = luminance(PALETTE["paper"][paper])
    for name, colors in PALETTE.items():
        low, high = sorted((ground, luminance(colors[paper])))
        needed = {"paper": 1.0, "grid": 1.0, "ink": 7.0}.get(name, 4.5)
        assert (high + 0.05) / (low + 0.05) >= needed, name
    assert len(set(COLOR.values())) == len(COLOR)


def test_names_and_gates_are_readable() -> None:
    assert policy_title("answer_entropy") == "answer entropy"
    assert policy_title("no_such_one") == "no such one"
    assert [gate_title(gate) for gate in (0.0, 0.01, 0.025)] == [
        "nothing",
        "at most 1 point",
        "at most 2.5 points",
    ]
    assert plain(" a\tb\n\x1b c ") == "a b c" and plain("\x00") == "(no name)"
    assert plain("x" * 40, most=5) == "xxxx\N{HORIZONTAL ELLIPSIS}"


def recording(lm: str, em: float, **changes: Any) -> RecordingRow:
    """A recording of 600 tokens that is halted at 100, 400 and 300 tokens, of 3 EM."""
    found = dict.fromkeys(field.name for field in fields(RecordingRow))
    sweep = [PricePoint(p, e, [e - 0.1, e + 0.1], t, [t - 9, t + 9]) for p, e, t in changes["of"]]
    known = {"lm": lm, "em": em, "em_interval": [em - 0.02, em + 0.02], "tokens": 600.0}
    known |= {"tokens_interval": [590.0, 620.0], "head": "runs/a-head", "sweep": tuple(sweep)}
    return RecordingRow(**found | known)  # type: ignore[arg-type]  # the rest is not drawn


def test_recordings_are_drawn_alone_and_over_the_prices_of_their_heads() -> None:
    grid = [(1.0, 0.7, 300.0), (4.0, 0.2, 100.0), (0.1, 0.8, 400.0), (1.0, 0.7, 300.0)]
    figure = recordings([recording("small", 0.8, of=grid), recording("new", 0.9, of=grid[:2])])
    axes = figure.axes[0]
    drawn = lines(axes, "small halted by a-head")
    assert [tokens for tokens, _ in drawn] == [100, 300, 400]
    assert [em for _, em in drawn] == pytest.approx([20, 70, 80])
    assert len(lines(axes, "new halted by a-head")) == 1
    assert labels(figure)[:2] == ["small halted by a-head", "new halted by a-head"]
    assert set(labels(figure)[2:]) == {"small alone", "new alone"}
    # 6 points below the lowest end of an interval that counts, which is of the own price.
    assert axes.get_ylim() == pytest.approx((54, 100))
    assert len([c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]) == 2
