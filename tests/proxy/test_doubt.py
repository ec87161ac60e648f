"""A session that asks again doubts the answer it got."""

from typing import Any

import pytest

from haltwise import InputError
from haltwise.proxy import doubt
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.doubt import Doubts, says_doubt

KEY = b"k" * 16


def chat(*said: Any) -> CompletionRequest:
    """Of what a user and an assistant have said in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return CompletionRequest(True, {"model": "lm", "messages": messages})


@pytest.mark.parametrize(
    ("said", "doubts"),
    [
        ("Are you sure?", True),
        ("hm, are you really certain", True),
        ("That's wrong.", True),
        ("thats not right, try again", True),
        ("Please double-check.", True),
        ("that is incorrect", True),
        ("Thanks! And 7 + 5?", False),
        ("What is wrong with my code?", False),
        ("How can I be sure that it is prime?", False),
        ("Are you sure? " + "I mean, " * 40, False),
        ("", False),
        (None, False),
        ([{"type": "text", "text": "Are you sure?"}], False),
    ],
)
def test_what_a_user_says_who_doubts(said: Any, doubts: bool) -> None:
    assert says_doubt(chat("1 + 1?", "3", said)) == doubts


def test_only_what_follows_an_answer_is_a_doubt() -> None:
    assert not says_doubt(chat("Are you sure?"))
    assert not says_doubt(CompletionRequest(False, {"prompt": "Are you sure?"}))
    twice = {"messages": [{"role": "user", "content": "Are you sure?"}] * 2}
    assert not says_doubt(CompletionRequest(True, twice))


def test_a_session_that_asks_the_same_again_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubt, "_MOST_SESSIONS", 2)
    doubts = Doubts(KEY)
    first, second = chat("1 + 1?"), chat("1 + 2?")
    asked = [("a", first), ("b", first), ("a", second), ("a", second), ("a", first), ("", first)]
    found = [doubts.sees(session, request) for session, request in [*asked, ("", first)]]
    assert found == [False, False, False, True, False, False, False]
    doubts.sees("c", first)  # "b" has asked longest ago, and is forgotten
    assert not doubts.sees("b", first)
    assert "1 + 1" not in repr(vars(doubts))
    with pytest.raises(InputError, match="the key has"):
        Doubts(b"short")
