from evaluation.table import format_cases
from tests.reports import behaviour


def test_the_worst_cases_have_a_line_each_with_what_drove_them() -> None:
    case = {
        "trace_id": "t9",
        "position": 120,
        "num_tokens": 600,
        "answer": "a long answer that nobody wants to read",
        "prob_halt": 0.9375,
        "right_again": None,
        "drivers": [{"feature": "log_run", "value": 1.0, "contribution": 1.5}] * 4,
    }
    found = behaviour(0.01, 0.5) | {"cases": [case] * 7}
    empty, title, header, first, *rest = format_cases(found).split("\n")
    assert empty == "" and title.endswith("at the points of 1.0%")
    assert header.split()[:2] == ["trace", "tokens"]
    assert len(rest) == 4
    cells = ["t9", "120", "600", "a long answer...", "93.8", "its end"]
    assert first.split("  ")[0] == "t9"
    assert [cell for cell in cells if cell in first] == cells
    assert first.endswith("log_run +1.5, log_run +1.5, log_run +1.5")
    again = format_cases(found | {"cases": [case | {"right_again": 250}]})
    assert "  250  " in again.split("\n")[3]


def test_without_a_case_there_is_no_text() -> None:
    assert format_cases(behaviour(0.0, 0.5) | {"cases": []}) == ""
