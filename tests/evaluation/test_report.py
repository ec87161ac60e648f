import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from evaluation import report as pages
from evaluation.report import log_to_tensorboard, write_report
from tests.evaluation.reports import (
    GATES,
    behaviour,
    certificate,
    curve,
    group,
    made,
    report,
    short,
)

VOID = {"meta", "br", "hr", "img", "link", "input"}
INLINE = {"a", "code", "small", "span", "strong"}
Row = dict[str, Any]


class Page(HTMLParser):
    """The page's tags, checked to be balanced, its ids, text and tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())
        self.tables = [
            [[" ".join(cell.split()) for cell in line] for line in table] for table in self.tables
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag not in INLINE:
            self.text += " "
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, key: str) -> list[str]:
        return [value for found, value in self.attributes if found == key]


def render(found: Row) -> str:
    return pages.render(made(found))


@pytest.fixture(scope="module")
def page() -> str:
    return render(report())


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


@pytest.mark.whole
def test_the_page_is_balanced_and_every_figure_is_an_image_with_words(page: str) -> None:
    found = Page(page)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 1 + 4 + 4 + 1
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        words = [root.find(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc")]
        assert all(word is not None and word.text for word in words)
        assert root.get("role") == "img"
    ids = found.all("id")
    assert len(set(ids)) == len(ids)
    named = [name for value in found.all("aria-labelledby") for name in value.split()]
    named += [href[1:] for href in found.all("href")]
    named += [href[1:] for href in found.all("xlink:href")]
    named += re.findall(r"url\(#([^)]*)\)", page)
    assert set(named) <= set(ids)
    for table in found.tables:
        assert table


@pytest.mark.whole
def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    without = page.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert not re.search(r"https?://|//[a-z]", without)
    assert "@import" not in page and "default-src 'none'" in page
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not [key for key, _ in found.attributes if key.startswith("on") or key == "src"]
    assert all(href.startswith("#") for href in found.all("href") + found.all("xlink:href"))
    assert len(page) < 1_500_000


def test_light_dark_and_print_are_told_apart(page: str) -> None:
    assert "@media screen and (prefers-color-scheme: dark)" in page and "@media print" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--head)" in drawn and not re.search(r": #[0-9a-f]{6}", drawn)


def test_the_json_holds_all_that_the_page_is_made_from() -> None:
    written = made(report()).to_json()
    assert list(written) == list(report()) and made(written) == made(report())
    assert list(made(report() | {"ran_live": True}).to_json()) == [*report(), "live"]


@pytest.mark.whole
def test_the_same_report_gives_the_same_page(page: str) -> None:
    assert render(json.loads(json.dumps(report()))) == page


FORMS: dict[str, Callable[[float], str]] = {
    "saving": lambda value: f"{100 * value:.1f}",
    "em": lambda value: f"{100 * value:.2f}",
    "em_delta": lambda value: f"{100 * value:+.2f}",
    "head_em_lead": lambda value: f"{100 * value:+.2f}",
    "tokens": lambda value: f"{value:,.0f}",
    "parameter": lambda value: f"{value:.4g}",
    "area": lambda value: f"{100 * value:.2f}",
    "head_saving_lead": lambda value: f"{100 * value:+.1f}",
    "head_lead_at_equal_em": lambda value: f"{100 * value:+.1f}",
}


@pytest.mark.parametrize("policy", ["head", "confidence", "never", "hindsight"])
@pytest.mark.parametrize("gate", GATES)
def test_every_frozen_figure_stands_in_the_policys_rows(
    page: str, gate: float, policy: str
) -> None:
    title = {"head": "haltwise head", "confidence": "confidence threshold strongest baseline"}
    title |= {"never": "never halting", "hindsight": "hindsight"}
    tables = [table for table in Page(page).tables if table[0][0] == "Policy"]
    assert len(tables) == 4
    at = tables[2 * GATES.index(gate) :][:2]
    cells = [c for table in at for line in table if line[0] == title[policy] for c in line[1:]]
    row = next(r for r in report()["frozen"] if (r["gate"], r["policy"]) == (gate, policy))
    expected = []
    for key, value in row.items():
        own = policy == "head" and key.startswith("head_")
        if not isinstance(value, float) or key == "gate" or own:
            continue
        form = FORMS.get(key, FORMS["saving"])
        interval = row.get(f"{key}_interval")
        between = f" [{form(interval[0])}, {form(interval[1])}]" if interval else ""
        expected.append(minus(form(value) + between))
    assert sorted(filter(None, cells)) == sorted(expected)
    assert len(expected) >= 11


def test_the_head_has_a_row_for_every_price(page: str) -> None:
    (table,) = (table for table in Page(page).tables if table[0][0] == "Price")
    heads = [row for row in report()["rows"] if row["policy"] == "head"]
    assert [(line[0], line[4]) for line in table[1:]] == [
        (FORMS["parameter"](row["parameter"]), FORMS["tokens"](row["tokens"])) for row in heads
    ]
    assert len(heads) > 1


def sentences(page: str) -> str:
    text = Page(page).text
    return text[text.index("Verdict Every question") : text.index("Frontier Every policy has")]


def test_the_verdict_tells_saving_change_and_the_strongest_baseline(page: str) -> None:
    told = sentences(page)
    assert told.count("The head saves 50.0 % of the tokens (95 % interval 47.0 to 53.0)") == 2
    assert minus("Exact match changes by -1.25 points (95 % interval -3.25 to +0.75)") in told
    assert "200 questions cannot tell from no change, nor from a loss of 3.25 points" in told
    assert "confidence threshold, chosen by the same questions, saves 42.5 %" in told
    assert "on its frontier (there confidence threshold saves 45.0 %) the head saves 5.0" in told


@pytest.mark.parametrize(
    ("lead", "words"),
    [
        (0.05, "the head saves 5.0 points more (95 % interval +3.0 to +7.0): it is ahead."),
        (
            0.01,
            "1.0 points more (95 % interval -1.0 to +3.0). The interval contains 0: a tie",
        ),
        (-0.05, "the head saves 5.0 points less (95 % interval -7.0 to -3.0): it loses."),
    ],
)
@pytest.mark.whole
def test_the_verdict_is_what_the_interval_says(lead: float, words: str) -> None:
    assert sentences(render(short(lead))).count(minus(words)) == 2


@pytest.mark.parametrize(
    ("interval", "gate", "words"),
    [
        ([-0.03, -0.02], 0.01, ": a loss, though it was chosen to lose at most 1 point"),
        ([-0.03, -0.005], 0.01, ": a loss, not shown to be larger than what it was chosen to lose"),
        ([-0.03, -0.005], 0.0, ": a loss, though it was chosen to lose nothing"),
        ([0.001, 0.02], 0.0, ": a gain"),
        ([0.0, 0.02], 0.0, ", which 200 questions cannot tell from no change."),
        (None, 0.0, "Exact match changes by -1.25 points, of unknown precision."),
        ([-0.0125, -0.0125], 0.0, "changes by -1.25 points, of unknown precision."),
    ],
)
def test_a_change_is_called_what_it_is(
    interval: list[float] | None, gate: float, words: str
) -> None:
    found = short()
    for row in found["frozen"]:
        if row["policy"] == "head":
            row["em_delta_interval"] = interval
    found["frozen"] = [row | {"gate": gate} for row in found["frozen"][:5]]
    found["strongest"] = {str(gate): None}
    assert minus(words) in Page(render(found)).text


@pytest.mark.parametrize(
    ("num", "words"),
    [
        # The square root of 0.05 is 0.2236; of many questions it is close to 3 over their number.
        (2, "2 questions exclude, at 95 %, only losses above 77.64 points"),
        (200, "200 questions exclude, at 95 %, only losses above 1.49 points"),
    ],
)
def test_no_change_at_all_is_no_proof_of_no_loss(num: int, words: str) -> None:
    found = short()
    found["traces"]["num_questions"] = num
    for row in found["frozen"]:
        if row["policy"] == "head":
            row |= {"em_delta": 0.0, "em_delta_interval": [-1e-17, 1e-17]}
    told = sentences(render(found))
    assert (
        told.count(f"Exact match changes by +0.00 points: no question's EM changed; {words}") == 2
    )
    assert "no loss" not in told


@pytest.mark.whole
@pytest.mark.parametrize("lead", [0.05, -0.05])
def test_a_lead_without_a_width_is_neither_ahead_nor_behind(lead: float) -> None:
    found = short(lead)
    for row in found["frozen"]:
        row["head_lead_at_equal_em_interval"] = [lead, lead]
    page = render(found)
    assert sentences(page).count("no evidence: it cannot be told.") == 2
    assert Page(page).text.count("? cannot be told") == 2
    assert "ahead." not in sentences(page) and "loses" not in sentences(page)


def test_a_report_without_intervals_is_still_a_page() -> None:
    found = short()
    for key in ("rows", "frozen"):
        found[key] = [
            row | {name: None for name in row if name.endswith("_interval")} for row in found[key]
        ]
    told = Page(render(found))
    assert told.text.count("? no interval") == 2
    assert told.text.count("the head saves 5.0 points more, of unknown precision.") == 2
    assert not [cell for table in told.tables for line in table for cell in line if "[" in cell]


def test_numbers_that_are_no_evidence_say_so_first() -> None:
    found = short() | {"evidence": False, "judged": "The head learned from these questions."}
    text = Page(render(found)).text
    assert text.index("These numbers are not evidence. The head learned from these") < text.index(
        "The head saves"
    )
    assert text.count("! not evidence") == 2


@pytest.mark.whole
def test_words_in_the_report_are_text_and_not_markup(tmp_path: Path) -> None:
    bad = "</title><script>alert(1)</script>&$x^$"
    found = report() | {"head": bad, "command": bad, "judged": bad, "split": bad}
    found["groups"] = [row | {"group": bad} for row in found["groups"][:2]]
    found["rows"] += [row | {"policy": bad} for row in found["rows"] if row["policy"] == "head"]
    case = found["behaviour"][0]["cases"][0]
    case |= dict.fromkeys(("trace_id", "question_id", "task", "segment", "model", "answer"), bad)
    case["drivers"][0]["feature"] = found["certificate"]["segments"][0]["segment"] = bad
    page = render(found)
    parsed = Page(page)
    assert "<script" not in page and parsed.tags.count("title") == 1 + 8
    assert parsed.text.count(bad) >= 12
    assert ">&lt;/title&gt;&lt;script&gt;alert(1)&lt;/s\N{HORIZONTAL ELLIPSIS}</text>" in page


def test_a_report_with_parts_missing_is_still_a_page() -> None:
    found = short()
    found["strongest"] = {"0.0": None}
    found["rows"] = [row for row in found["rows"] if row["policy"] in ("head", "never")]
    for row in found["rows"]:
        row.pop("em_delta_interval")
    for row in found["frozen"]:
        if row["policy"] == "head":
            row |= {"parameter": None, "saving_interval": None, "em_delta_interval": None}
    text = Page(render(found)).text
    assert text.count("so the head never halts here: it saves nothing and loses nothing.") == 2
    assert text.count("\N{WHITE CIRCLE} never halts") == 2
    assert "None yet: run calibrate.py" in text
    assert "Inside the thought" not in text and "Where it saves" not in text
    assert text.count("Not available: entropy threshold. The traces lack") == 2
    assert text.count("or the run's own traces are not there any more.") == 2


def test_a_policy_without_a_name_here_keeps_its_own() -> None:
    found = short()
    for row in found["rows"] + found["frozen"]:
        row["policy"] = row["policy"].replace("confidence", "coin_toss")
    found["strongest"] = dict.fromkeys(found["strongest"], "coin_toss")
    assert "coin toss, chosen by the same questions, saves 42.5" in Page(render(found)).text


def test_a_baseline_without_the_heads_em_is_marked_and_told() -> None:
    found = short()
    for row in found["frozen"]:
        row["saving_at_head_em"] = None
    page = render(found)
    told = (
        "Confidence threshold never reaches the head's EM. Against what it saves at its highest EM"
    )
    assert sentences(page).count(f"{told} the head saves 5.0 points more") == 2
    assert "> +5.0 [+3.0, +7.0]" in Page(page).text


def test_the_reliability_is_read_aloud(page: str) -> None:
    said = "Among the 1,200 decisions where the head put the probability of halting at 80 to 90 %"
    assert (
        f"{said} (86.2 % in the mean), halting was the better choice in 91.2 %." in Page(page).text
    )
    low = "Where it put it below one half, halting lost 10.00 points a decision"
    high = "Where it put it at one half or more, halting gained 10.00 points a decision"
    assert low in Page(page).text and high in Page(page).text


@pytest.mark.whole
def test_decisions_of_several_trainings_are_said_to_be_together(page: str) -> None:
    together = "decisions (all trainings together)"
    assert together not in Page(page).text.lower()
    told = Page(render(report() | {"num_trainings": 3}))
    assert told.text.count(f"Among the 1,200 {together} where") == 2
    assert sum(together.capitalize() in table[0] for table in told.tables) == 2


@pytest.mark.whole
def test_gates_at_one_price_share_their_behaviour() -> None:
    found = report() | {"behaviour": [behaviour(0.0, 0.5), behaviour(0.01, 0.5)]}
    text = Page(render(found)).text
    assert text.count("Chosen to lose nothing and at most 1 point: price 0.5") == 2
    assert text.count("Among the 1,200 decisions") == 1


def test_groups_that_lose_are_named(page: str) -> None:
    lost = "Groups where the interval of the head's EM change lies below 0: segment hard -8.25"
    chance = "Of twenty groups, one interval misses by chance."
    assert Page(page).text.count(minus(f"{lost} [-10.25, -6.25]. {chance}")) == 2


@pytest.mark.whole
def test_groups_that_lose_have_their_kind_and_the_worst_ten_are_named() -> None:
    found = report()
    same = [group(by, "hard", 0.0, "head") for by in ("segment", "task")]
    others = [
        group("model", f"lm{k}", 0.0, "head")
        | {"em_delta": -0.01 * k, "em_delta_interval": [-0.5, -0.001]}
        for k in range(1, 12)
    ]
    alike = group("task", "alike", 0.0, "head") | {"em_delta_interval": [-0.5, -0.5]}
    found["groups"] = [*same, *others, alike]
    text = Page(render(found)).text
    named = re.findall(r"(\w+ \w+) \N{MINUS SIGN}\d+\.\d\d \[", text[text.index("below 0: ") :])
    worst = [*(f"LM lm{k}" for k in (11, 10, 9)), "segment hard", "task hard"]
    assert named == [*worst, *(f"LM lm{k}" for k in (8, 7, 6, 5, 4))]
    assert "] and 3 more. Of twenty groups" in text and "task alike" not in text


def test_errors_are_told_with_their_drivers(page: str) -> None:
    found = Page(page)
    assert (
        "Halted after 1,234 thinking tokens with 42 at a halting probability of 93.8 %."
        in found.text
    )
    assert "right from 2,345 tokens on" in found.text and "below a price of 0.0625" in found.text
    drivers = next(table for table in found.tables if table[0][0] == "Feature")
    assert [line[:3] for line in drivers[1:]] == [
        ["log_run", minus("-1.5"), "+1.25"],
        ["doubt", "2", minus("-0.75")],
    ]


def test_a_certificate_is_told_in_words(page: str) -> None:
    text = Page(page).text
    assert "Certified for lm, with 90 % confidence, over the draw of 1,500 questions" in text
    assert "halting at a price of 0.25 costs at most 2 points of exact match" in text
    assert "saved 31.2 % of the tokens and lost 0.25 points." in text
    none = Page(render(short() | {"certificate": certificate(price=None)})).text
    assert "Nothing could be certified for lm: never halt. The head's own price is 0" in none
    assert "Asked was a price at which halting costs at most 2 points of exact match" in none
    assert "a bound of 1.75 points would have allowed some saving" in none


@pytest.mark.whole
def test_what_counts_as_right_is_told_where_nobody_knows(page: str) -> None:
    assert "reference answer:" not in Page(page).text
    found = report() | {"certificate": certificate() | {"num_unlabelled": 1000}}
    found["traces"]["target"] = "No trace has a reference answer: so it is."
    text = Page(render(found)).text
    assert "No trace has a reference answer: so it is." in text
    assert "1,000 of 3,000 traces have no reference answer: there an answer counts" in text


@pytest.mark.whole
def test_one_is_singular() -> None:
    found = report() | {"certificate": certificate() | {"num_questions": 1, "num_traces": 1}}
    found["traces"] |= {"num": 1, "num_questions": 1}
    found["behaviour"][0]["cases"][0]["position"] = 1
    text = Page(render(found)).text
    assert "on 1 trace of 1 question (test)" in text and "the draw of 1 question that" in text
    assert "after 1 thinking token with" in text and "1 trace, digest" in text
    assert not re.search(r"\b1 (questions|traces|tokens|thinking tokens)\b", text)


def test_the_method_does_not_say_that_the_questions_are_fresh(page: str) -> None:
    assert "tune nothing" not in page and "How judged, below, tells whether" in page
    assert "EM above a floor, 5 points below never halting's" in Page(page).text


def test_the_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(made(short()), tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == render(short())
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    before = (tmp_path / "out.html").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_report(made(short(lead=-0.05)), tmp_path / "out.html")
    assert (tmp_path / "out.html").read_bytes() == before


@pytest.mark.whole
def test_tensorboard_gets_the_same_figures_and_numbers(tmp_path: Path) -> None:
    log_to_tensorboard(made(report()), tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    drawn = re.findall(r'id="([\w.-]+)-desc"', render(report()))
    assert sorted(events.Tags()["images"]) == sorted(f"report/{name}" for name in drawn)
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert scalars["frozen_0.01/saving/confidence"] == pytest.approx(0.425)
    assert scalars["frozen_0.0/em_delta/head"] == pytest.approx(-0.0125)
    assert scalars["frozen_0.0/head_lead_at_equal_em/confidence"] == pytest.approx(0.05)
    assert not [tag for tag in scalars if "entropy" in tag]


def test_the_trade_off_over_the_training_is_a_figure_and_a_table() -> None:
    page = Page(render(short() | {"curve": curve()}))
    assert "training-title" in page.all("id") and "#training" in page.all("href")
    (table,) = (table for table in page.tables if table[0][0] == "After")
    assert [line[0] for line in table[1:]] == ["0 gradient steps", "1,000 decisions of PPO taken"]
    assert table[2][1:] == ["80.00"] * 3 + ["1,234"] * 3 + ["5.5000", "1.250"]
    assert "training" not in Page(render(short())).all("id")
