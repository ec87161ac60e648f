"""A thought that a server streams: what the head sees of it, and where it is halted."""

import math
from typing import Any

import numpy as np
import pytest

from haltwise import HaltMonitor, InputError, Terms
from haltwise.policy.signals import Signals
from haltwise.session.request import ThoughtRequest
from haltwise.session.stream import StreamedThought, check_served
from haltwise.session.thought import ForcedAnswer, PointRules
from tests.heads import random_head, sure_head

HEAD = sure_head(rule="every 8 tokens")
RULES = PointRules(HEAD.config.halting)
TERMS = Terms(1.0)
ANSWER = RULES.read(ForcedAnswer([" 4", "2"], [-0.1, -0.3], 2))


def top(logprob: float) -> list[float]:
    """20 log probabilities with that of the token first: the others share what is left."""
    return [logprob, *[math.log((1 - math.exp(logprob)) / 30)] * 19]


def entropy(logprob: float) -> float:
    """Of such a token, with 11 of the 30 others as one."""
    p = math.exp(logprob)
    rest = (1 - p) / 30
    return -p * logprob - 19 * rest * math.log(rest) - 11 * rest * math.log(11 * rest)


def streamed(terms: Terms, prompt: str = "") -> StreamedThought:
    return StreamedThought(HEAD, RULES, ThoughtRequest(terms), prompt)


def test_the_head_sees_the_numbers_since_the_previous_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points: list[Signals] = []
    observe = HaltMonitor.observe

    def observed(self: HaltMonitor, signals: Signals, rows: Any) -> Any:
        points.append(signals)
        return observe(self, signals, rows)

    monkeypatch.setattr(HaltMonitor, "observe", observed)
    watcher = streamed(Terms(0.1), "q <think>")
    logprobs = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8] * 2
    texts = [" wa", "it", " but", "ton", " Hmm", " so", " so", " ver", "ify"]
    texts += [" so"] * 6 + [" check"]
    for text, logprob in zip(texts, logprobs, strict=True):
        assert not watcher.add(text, logprob, top(logprob)[::-1])
    first, second = points
    assert [first.position.item(), second.position.item()] == [8, 16]
    assert first.num_reflections is not None and second.num_reflections is not None
    # wait and Hmm, not button; verify, which the border cuts, and check.
    assert [first.num_reflections.item(), second.num_reflections.item()] == [2, 2]
    for signals in points:
        expected = {
            "entropy": np.mean([entropy(value) for value in logprobs]),
            "max_entropy": entropy(-0.8),
            "logprob": -0.45,
            "min_logprob": -0.8,
            "margin": np.mean([math.exp(v) - (1 - math.exp(v)) / 30 for v in logprobs]),
        }
        for name, value in expected.items():
            assert getattr(signals, name).item() == pytest.approx(value, abs=1e-6), name


def test_a_thought_is_halted_once_and_only_inside_of_itself() -> None:
    sure = [(" x", -0.1, top(-0.1))] * 20
    unopened = streamed(TERMS)
    assert not any(unopened.add(*token) for token in sure)
    assert not unopened.add("<think>", -0.1, top(-0.1))  # the 21st
    assert [unopened.add(*token) for token in sure] == [i == 2 for i in range(20)]
    assert (unopened.report().reason, unopened.report().position) == ("halted", 24)
    closed = streamed(TERMS, "<think>")
    assert not any(closed.add(*token) for token in [*sure[:7], ("</think>", -0.1, top(-0.1))])
    assert not any(closed.add(*token) for token in sure)
    assert closed.thought.is_over and closed.report().reason == "closed by the LM"


@pytest.mark.parametrize(
    "numbers",
    [
        (math.nan, top(-0.1)),
        (-0.1, ()),
        (-0.1, top(-0.1)[:15]),
        (-0.1, [math.nan, *top(-0.1)[1:]]),
        (-0.1, [*top(-0.1), *top(-0.1)[1:], math.nan]),
    ],
    ids=["no number", "none beside", "too few", "one not a number", "one of many"],
)
def test_numbers_that_are_missing_never_halt_a_thought_but_its_cap_does(numbers: Any) -> None:
    watcher = streamed(TERMS, "<think>")
    assert not any(watcher.add(" x", *numbers) for _ in range(40))
    assert watcher.report().num_bad_signals == 5
    terms = Terms(1.0, max_tokens=13)
    unopened = streamed(terms)
    assert not any(unopened.add(" x", *numbers) for _ in range(40))
    capped = streamed(terms, "<think>")
    assert [capped.add(" x", *numbers) for _ in range(20)] == [i == 12 for i in range(20)]
    assert (capped.report().reason, capped.report().position) == ("capped", 13)


def test_more_log_probabilities_than_needed_are_no_harm() -> None:
    many = top(-0.1) + [top(-0.1)[-1]] * 11
    watchers = [streamed(TERMS, "<think>") for _ in range(2)]
    for watcher, numbers in zip(watchers, (top(-0.1), many[::-1]), strict=True):
        assert [watcher.add(" x", -0.1, numbers) for _ in range(8)] == [False] * 7 + [True]


def test_an_answer_without_a_thought_may_speak_of_thoughts() -> None:
    watcher = streamed(Terms(1.0, max_tokens=70))
    sure = (-0.1, top(-0.1))
    assert not any(watcher.add(" x", *sure) for _ in range(64))
    assert watcher.report().reason == "no thought"
    assert not any(watcher.add(text, *sure) for text in ["<think>", *[" x"] * 100])


def test_a_head_that_needs_more_than_a_server_shows_is_refused() -> None:
    check_served(HEAD)
    check_served(random_head(0))
    with pytest.raises(InputError, match=r"groups ending, .* not show; .* --groups confidence$"):
        check_served(random_head(0, ("confidence", "ending")))
    with pytest.raises(InputError, match=r"--groups pace limit .* reflection$"):
        check_served(random_head(0, ("ending",), probing="at_halt"))


# A head that looks at answers


def probing(terms: Terms = TERMS) -> StreamedThought:
    """Halts where the mean log probability is above -1.25, once it has seen an answer there."""
    return StreamedThought(sure_head(rule="every 8 tokens", probing="always"), RULES,
                           ThoughtRequest(terms), "<think>")  # fmt: skip


def goes_on(thought: StreamedThought, num: int, logprob: float = -0.1) -> list[bool]:
    return [thought.add(" x", logprob, top(logprob)) for _ in range(num)]


def test_an_answer_that_comes_late_halts_a_thought_where_it_is() -> None:
    thought = probing()
    assert not any(goes_on(thought, 8)) and thought.asks
    thought.await_answer()
    assert not any(goes_on(thought, 3, -9.0)) and not thought.asks
    assert thought.answered(ANSWER)
    report = thought.report()
    assert (report.reason, report.position, thought.thought.position) == ("halted", 8, 11)
    assert (report.num_probe_tokens, report.num_bad_signals) == (2, 0)
    assert not any(goes_on(thought, 20)) and not thought.asks


def test_signals_are_those_of_the_point_however_late_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Signals] = []
    observe = HaltMonitor.observe

    def noting(self: HaltMonitor, signals: Signals, rows: Any) -> Any:
        seen.append(signals)
        return observe(self, signals, rows)

    monkeypatch.setattr(HaltMonitor, "observe", noting)
    thought = probing(Terms(1e-9))
    for num_late in (0, 11):  # past the next point, which is skipped
        goes_on(thought, 8 - thought.thought.num_tokens % 8, -0.5)
        thought.await_answer()
        for _ in range(num_late):
            goes_on(thought, 1, -0.7)
            if thought.asks:
                thought.skip()
        assert not thought.answered(ANSWER)
    goes_on(thought, 32 - thought.thought.num_tokens, -0.7)
    thought.await_answer()
    thought.answered(ANSWER)
    assert [s.position.item() for s in seen] == [8, 16, 32]
    logprobs = [s.logprob.item() for s in seen if s.logprob is not None]
    assert logprobs == pytest.approx([-0.5, -0.5, -0.7])
    confidences = [s.confidence.item() for s in seen if s.confidence is not None]
    assert confidences == pytest.approx([math.exp(-0.2)] * 3)
    assert thought.report().num_bad_signals == 1


def test_an_answer_that_nobody_has_halts_nothing() -> None:
    thought = probing()
    for _ in range(3):
        goes_on(thought, 8)
        thought.await_answer()
        assert not thought.answered(None)
    assert thought.report().num_bad_signals == 3


@pytest.mark.parametrize("ends", ["its cap", "the LM", "release", "least thinking"])
def test_an_answer_that_is_too_late_halts_nothing(ends: str) -> None:
    least = 9 if ends == "least thinking" else 0
    thought = probing(Terms(1.0, least, max_tokens=10 if ends == "its cap" else None))
    goes_on(thought, 8)
    thought.await_answer()
    assert goes_on(thought, 2) == [False, ends == "its cap"]
    if ends == "the LM":
        thought.add("</think>", -0.1, top(-0.1))
    if ends == "release":
        thought.release()
    assert not thought.answered(ANSWER)
    assert thought.report().halted == (ends == "its cap")


def test_a_cap_at_a_decision_point_asks_for_no_answer() -> None:
    thought = probing(Terms(1.0, max_tokens=8))
    assert goes_on(thought, 8) == [False] * 7 + [True] and not thought.asks


def test_a_price_of_0_asks_for_no_answer() -> None:
    thought = probing(Terms(0.0))
    goes_on(thought, 8)
    assert not thought.asks
