from evaluation.table import format_cases, format_table
from tests.evaluation.reports import behaviour, made_behaviour, made_frozen, report


def test_the_worst_cases_have_a_line_each_with_what_drove_them() -> None:
    case = {
        "trace_id": "t9",
        "position": 120,
        "num_tokens": 600,
        "answer": "\\frac{\n1234567890}{1234567890}",
        "prob_halt": 0.9375,
        "right_again": None,
        "drivers": [{"feature": "log_run", "value": 1.0, "contribution": 1.5}] * 4,
    }
    found = behaviour(0.01, 0.5) | {"cases": [case] * 7}
    empty, title, header, first, *rest = format_cases(made_behaviour(found)).split("\n")
    assert empty == "" and title.endswith("at the points of 1.0%")
    assert header.split()[:2] == ["trace", "tokens"]
    assert len(rest) == 4
    cells = ["t9", "120", "600", "\\frac{ 1234567890}{\N{HORIZONTAL ELLIPSIS}", "93.8", "its end"]
    assert first.split("  ")[0] == "t9"
    assert [cell for cell in cells if cell in first] == cells
    assert first.endswith("log_run +1.5, log_run +1.5, log_run +1.5")
    again = format_cases(made_behaviour(found | {"cases": [case | {"right_again": 250}]}))
    assert "  250  " in again.split("\n")[3]


def test_without_a_case_there_is_no_text() -> None:
    assert format_cases(made_behaviour(behaviour(0.0, 0.5) | {"cases": []})) == ""


def test_rows_without_an_interval_have_the_value_alone() -> None:
    rows = report()["frozen"][:2]
    whole = format_table([made_frozen(row) for row in rows])
    assert "-1.25 [-3.25, +0.75]" in whole and "42.5 [39.5, 45.5]" in whole
    nothing = [row | {key: None for key in row if key.endswith("_interval")} for row in rows]
    alone = format_table([made_frozen(row) for row in nothing])
    assert "-1.25  " in alone and "42.5  " in alone and alone.endswith("+5.0")
    assert "[" not in alone.split("\n", 2)[2]
