"""Tells what a search for settings of a training has found: as a page, and what it is worth.

What wins among many has been lucky too. So the candidate with the largest area under its frontier
is set beside the defaults on questions that the search did not see, paired by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from command import whole_file
from evaluation.figures import Drawing, style, tick
from evaluation.frontier import AREA_FLOOR, frontier_area, saving_at_em, swept_area
from evaluation.intervals import Resampled, Resamples, interval
from evaluation.outcome import Outcome, em_delta, saving
from evaluation.report import page
from evaluation.rows import Interval
from evaluation.svg import COLOR
from evaluation.trials import balanced_returns, compare_returns
from evaluation.wording import between, counted, exact_match, points
from traces import Traces

# The EM losses at which frontiers are read, and the resamples that areas are computed in.
_LOSSES = (0.0, 0.005, 0.01, 0.02)
_NUM_RESAMPLES = 2_000
_VERDICTS = {
    "ahead": "The best candidate is ahead of the defaults",
    "behind": "The best candidate is behind the defaults",
    "tie": "The best candidate is not told apart from the defaults",
}


@dataclass(frozen=True)
class Point:
    """What a candidate comes to at one price."""

    price: float
    em: float
    tokens: float
    """In the mean of all traces, probes included."""
    em_delta: float
    """EM less that of never halting."""
    saving: float
    on_front: bool
    """Whether no candidate beats it at any price in both EM and tokens."""


@dataclass(frozen=True)
class Tried:
    """A candidate that has been tried."""

    number: int
    """0 are the defaults."""
    settings: Mapping[str, Any]
    points: Sequence[Point]
    """By price, the lowest first."""

    @property
    def area(self) -> float:
        """The area under its frontier, see `frontier_area`."""
        return frontier_area([(at.em_delta, at.saving) for at in self.points], AREA_FLOOR)


@dataclass(frozen=True)
class Judged:
    """The best candidate beside the defaults, on questions that the search did not see."""

    num_questions: int
    area_more: tuple[float, Interval]
    """How much larger the area under its frontier is."""
    return_more: tuple[float, Interval]
    """How much larger its return is, in the mean over prices that count alike."""
    savings: dict[str, dict[float, float | None]]
    """Of the defaults and the best one, the saving by loss of EM; None where it is not reached."""

    @classmethod
    def of(
        cls,
        traces: Traces,
        defaults: Mapping[float, Outcome],
        best: Mapping[float, Outcome],
        weights: NDArray[np.float64],
    ) -> Judged:
        """Compares the outcomes by price of the two on the same traces.

        Args:
            traces: The traces.
            defaults: Those of the defaults.
            best: Those of the best candidate.
            weights: The weights of the prices in the return.
        """
        resamples = Resamples.draw(traces.question_id, _NUM_RESAMPLES)
        areas = [_areas(resamples.of(traces, list(swept.values()))) for swept in (best, defaults)]
        own = [swept_area(traces, swept) for swept in (best, defaults)]
        returns = [balanced_returns(swept, weights) for swept in (best, defaults)]
        return cls(
            resamples.num_questions,
            (own[0] - own[1], interval(areas[0] - areas[1])),
            compare_returns(traces.question_id, *returns),
            {"defaults": _savings(traces, defaults), "best": _savings(traces, best)},
        )

    @property
    def verdict(self) -> str:
        """Whether the best candidate is ahead, behind, or in a tie, by area."""
        low, high = self.area_more[1]
        return "ahead" if low > 0 else "behind" if high < 0 else "tie"

    @property
    def in_words(self) -> str:
        """What was found, in two sentences."""
        more, ends = self.area_more
        gained, bounds = self.return_more
        return (
            f"On {counted(self.num_questions, 'question')} that the search did not see: "
            f"{_VERDICTS[self.verdict].lower()}. Its mean EM on allowances of tokens is "
            f"{points(more)} points {between(ends, points)} beside theirs, and its mean return "
            f"over all prices {gained:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}]."
        )


@dataclass(frozen=True)
class Searched:
    """All that a search has found."""

    command: str
    traces: str
    num_questions: int
    """The questions that candidates were tried on, out of fold."""
    em: float
    """EM of never halting on them."""
    tokens: float
    """Mean tokens of never halting."""
    tried: Sequence[Tried]
    best: int
    """The number of the candidate with the largest area under its frontier."""
    options: str
    """What train.py is told to train so."""
    importances: Mapping[str, float]
    """By setting, its share of how far the areas of candidates differ; empty of few candidates."""
    judged: Judged | None
    """None if the defaults are the best."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        content = asdict(self)
        for told, tried in zip(content["tried"], self.tried, strict=True):
            told["area"] = tried.area
        if self.judged is not None:
            content["judged"]["verdict"] = self.judged.verdict
        return content

    @property
    def front(self) -> list[tuple[Point, list[int]]]:
        """What nothing beats in both, cheapest first, each with the numbers of the candidates."""
        at: dict[tuple[float, float], tuple[Point, list[int]]] = {}
        for tried in self.tried:
            for point in tried.points:
                if point.on_front:
                    _, numbers = at.setdefault((point.tokens, point.em), (point, []))
                    numbers += [tried.number] if tried.number not in numbers else []
        return [at[place] for place in sorted(at)]

    @property
    def in_words(self) -> str:
        """What was found, for the page and the terminal."""
        own = sum(0 in numbers for _, numbers in self.front)
        said = (
            f"{counted(len(self.tried), 'candidate')}, the defaults among them, "
            f"on {counted(self.num_questions, 'question')}: the defaults come to {own} of the "
            f"{len(self.front)} points of the front."
        )
        if self.judged is None:
            return f"{said} Their frontier has the largest area of all: nothing else to judge."
        return f"{said} {self.judged.in_words}"


def _areas(found: Resampled) -> NDArray[np.float64]:
    """Returns the area under a frontier in each resample (R,)."""
    each = zip(found.em_delta.T.tolist(), found.saving.T.tolist(), strict=True)
    return np.array([frontier_area(list(zip(*one, strict=True)), AREA_FLOOR) for one in each])


def _savings(traces: Traces, swept: Mapping[float, Outcome]) -> dict[float, float | None]:
    """Returns the saving at each of the EM losses."""
    found = [(em_delta(traces, at), saving(traces, at)) for at in swept.values()]
    return {loss: saving_at_em(found, -loss) for loss in _LOSSES}


def write_search(searched: Searched, path: Path) -> None:
    """Writes the page of a search, whole or not at all."""
    drawing = _drawing(searched)
    by_area = sorted(searched.tried, key=lambda tried: -tried.area)
    told = page(
        "search.html.jinja",
        {"front": drawing},
        searched=searched,
        by_area=by_area,
        title=_VERDICTS[searched.judged.verdict] if searched.judged else "The defaults are best",
        exact_match=exact_match,
        floor=-100 * AREA_FLOOR,
    )
    with whole_file(path) as temporary:
        temporary.write_text(told, encoding="utf-8")


def _drawing(searched: Searched) -> Drawing:
    """Draws all candidates at all prices, and their front, with the words."""
    return Drawing(
        "front",
        "Exact match against tokens, all candidates at all prices",
        "A dot is a candidate at a price, out of fold on the questions that were searched. Circles "
        "and the stepped line: the front, which nothing beats in both. Heavy lines: the defaults, "
        "and the candidate with the largest area, over their prices. What is far below is cut off.",
        _front_figure(searched),
    )


def _front_figure(searched: Searched) -> Figure:
    """Draws EM against tokens."""
    every = [at for tried in searched.tried for at in tried.points]
    front = [at for at, _ in searched.front]
    with style():
        figure = Figure(figsize=(6.4, 4.9))
        axes = figure.subplots()
        axes.scatter(
            [at.tokens for at in every], [100 * at.em_delta for at in every],
            s=7, color=COLOR["muted"], linewidth=0, alpha=0.6, label="a candidate at a price",
        )  # fmt: skip
        axes.step(
            [at.tokens for at in front], [100 * at.em_delta for at in front], where="post",
            color=COLOR["ink"], linewidth=1, marker="o", markersize=4.5,
            markerfacecolor=COLOR["paper"], label="the front", zorder=3,
        )  # fmt: skip
        looks: dict[int, tuple[str, Any, str, str]] = {
            0: ("strongest", (0, (5, 1.5)), "s", "the defaults")
        }
        if searched.best:
            looks[searched.best] = ("head", "-", "D", f"candidate {searched.best}")
        for number, (color, dash, marker, label) in looks.items():
            own = searched.tried[number].points
            axes.plot(
                [at.tokens for at in own], [100 * at.em_delta for at in own], label=label,
                color=COLOR[color], linestyle=dash, marker=marker, markersize=4, linewidth=2,
                zorder=4,
            )  # fmt: skip
        axes.scatter(
            searched.tokens, 0, marker="s", s=60, color=COLOR["ink"], label="never halting"
        )
        axes.axhline(0, color=COLOR["ink"], linewidth=0.8)
        seen = [at.tokens for at in every if at.em_delta >= 2 * AREA_FLOOR]
        axes.set_xlim(left=0.9 * min(seen, default=0.0))
        axes.set_ylim(200 * AREA_FLOOR, max(1.0, *(130 * at.em_delta for at in front)))
        axes.set_xlabel("tokens of a trace, probes included")
        axes.set_ylabel("EM change, points of a hundred")
        axes.yaxis.set_major_formatter(tick)
        figure.legend(loc="outside lower center", ncols=3)
    return figure
