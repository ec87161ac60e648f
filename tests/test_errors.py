from types import SimpleNamespace

import pytest

from haltwise import InputError
from haltwise.errors import check_ranges, reason_of


def test_a_reason_is_one_line_and_whole() -> None:
    assert reason_of(ValueError("cannot load:\n  (1) sentencepiece\n\n  (2) tiktoken ")) == (
        "cannot load: (1) sentencepiece (2) tiktoken"
    )
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
    assert reason_of(ValueError("ab " * 200)) == "ab " * 99 + "ab ..."


def test_a_setting_out_of_its_range_is_named_as_on_the_command_line() -> None:
    settings = SimpleNamespace(num=3, net_width=0)
    check_ranges(settings, {"num": (True, "at least 1")})
    with pytest.raises(InputError, match=r"^--ppo\.net-width is 0, expected at least 1$"):
        ranges = {"num": (True, "at least 1"), "net_width": (False, "at least 1")}
        check_ranges(settings, ranges, "ppo.")
