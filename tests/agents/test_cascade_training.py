from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.cascade import Batch, CascadeFitConfig, Table, expected_return, fit_cascade
from agents.pathwise import PathwiseConfig
from envs.replay import observed_features
from haltwise import HaltHead, Halting, HeadConfig, InputError
from haltwise.policy.cascade import Act, CascadeConfig
from haltwise.policy.question import QuestionReader
from policies.cascade import CascadePolicy
from policies.course import AT_END, AT_START, LargeAnswers
from policies.observing import observing_at_prices
from tests.heads import random_head
from tests.pairs import made_up, worked_pair
from traces import Pairs, Traces

MakeTraces = Callable[..., Traces]

TOLD = CascadeConfig(QuestionReader(), price_ratio=2.0, default_price=1.0)
# What the worked example comes to at a price of 0.5, beside a large LM that is right after 300
# tokens that cost two each: halted at a point or at the end, and escalated from the start on.
HALT = [-0.055, 0.864, 0.7835, 0.6835]
ESCALATE = [0.7, 0.645, 0.564, 0.4835, 0.3835]


def batch_of(pairs: Pairs, head: HaltHead, price: float = 0.5) -> Batch:
    table = Table.of(pairs, LargeAnswers.unhalted(pairs.large), head, TOLD)
    rows = torch.arange(len(pairs))
    return Batch.of(table, rows, np.full(len(pairs), price), head.config.observing)


def test_returns_of_the_worked_example(make_traces: MakeTraces) -> None:
    batch = batch_of(worked_pair(make_traces), random_head(0))
    assert batch.halt[0, 1:].tolist() == pytest.approx(HALT)
    assert batch.escalate[0].tolist() == pytest.approx(ESCALATE)
    blind = batch_of(worked_pair(make_traces), random_head(0, ("pace",), probing="at_halt"))
    assert blind.halt[0, 1:].tolist() == pytest.approx([-0.055, 0.869, 0.7945, 0.7])
    # Without probes, escalating costs the position alone: 100, 250, 400, and 600 at the end.
    assert blind.escalate[0].tolist() == pytest.approx([0.7, 0.65, 0.575, 0.5, 0.4])


def test_the_expected_return_is_that_of_the_recursion(make_traces: MakeTraces) -> None:
    batch = batch_of(worked_pair(make_traces), random_head(0))
    # All log-odds are 0: a half each before the first token and at the end, else a third.
    value = (HALT[3] + ESCALATE[4]) / 2
    for t in (2, 1, 0):
        value = (HALT[t] + ESCALATE[t + 1] + value) / 3
    value = (ESCALATE[0] + value) / 2
    zero = torch.zeros(5)
    assert expected_return(zero, zero, batch).item() == pytest.approx(value, abs=1e-6)
    # One that never escalates and halts at the second point, and one that escalates at once.
    never, sure = torch.full((5,), -40.0), torch.tensor([0.0, -40, 40, 0, 0])
    assert expected_return(never, sure, batch).item() == pytest.approx(0.864, abs=1e-6)
    assert expected_return(-never, sure, batch).item() == pytest.approx(0.7, abs=1e-6)


def test_the_gradient_is_that_of_finite_differences(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 10, lambda easy: True)
    batch = batch_of(pairs, random_head(0))
    generator = torch.Generator().manual_seed(0)
    num = len(batch.obs)
    odds = torch.randn(2, num, generator=generator, dtype=torch.float64, requires_grad=True)

    def total(escalate: torch.Tensor, halt: torch.Tensor) -> torch.Tensor:
        return expected_return(escalate, halt, batch)

    assert torch.autograd.gradcheck(total, (odds[0], odds[1]))


def fitted(pairs: Pairs, head: HaltHead | HeadConfig, steps: int = 150) -> CascadePolicy:
    both = PathwiseConfig(steps=steps, prior_questions=10)
    config = CascadeFitConfig(PathwiseConfig(steps=100, prior_questions=10), both, net_width=8)
    large = LargeAnswers.unhalted(pairs.large)
    return CascadePolicy(fit_cascade(pairs, large, head, TOLD, config, 0).cascade)


def conditions(pairs: Pairs) -> HeadConfig:
    halting = Halting("always", "every 50 tokens", "</think>", "source")
    groups = ("confidence", "agreement")
    observing = observing_at_prices(pairs.small, groups, halting, (0.05, 5.0))
    return HeadConfig(observing, halting, default_price=0.0)


def test_where_escalating_never_pays_a_given_head_decides_alone(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 40, lambda easy: False)
    head = random_head(1)
    policy = fitted(pairs, head)
    cascade = policy.cascade
    assert cascade.head is head
    features = observed_features(pairs.small, head.config.observing, head.config.halting)
    asked = cascade.reader.read(pairs.questions)
    for price in (0.1, 1.0):
        acts = cascade.at_point(features, asked[pairs.small.trace_of_point], price)
        assert ((acts == Act.HALT) == head.halts(features, price)).all()
        assert not policy.course(pairs, policy.signal(pairs), (price,)).escalated.any()


def test_where_escalating_always_pays_everything_is_escalated_at_once(
    make_traces: MakeTraces,
) -> None:
    pairs = made_up(make_traces, 40, lambda easy: True, large_tokens=1)
    policy = fitted(pairs, random_head(1))
    course = policy.course(pairs, policy.signal(pairs), (1.0,))
    assert course.escalated.all() and (course.point == AT_START).all()


@pytest.mark.whole
def test_it_learns_to_answer_what_is_easy_and_to_escalate_what_is_hard(
    make_traces: MakeTraces,
) -> None:
    pairs = made_up(make_traces, 120, lambda easy: True)
    policy = fitted(pairs, conditions(pairs))
    fresh = made_up(make_traces, 100, lambda easy: True, seed=1)
    course = policy.course(fresh, policy.signal(fresh), (0.5,))
    easy = fresh.small.final_correct
    # The large LM's bill is 400: 0.2 at this price. A sure answer is right, an unsure one wrong.
    assert not course.escalated[easy].any() and course.escalated[~easy].mean() > 0.9
    assert (course.point[easy] != AT_END).all()


def test_the_same_seed_gives_the_same_cascade(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 20, lambda easy: True)
    both = [fitted(pairs, conditions(pairs), steps=5).cascade.digest for _ in range(2)]
    assert both[0] == both[1]


def test_settings_that_train_nothing_are_refused() -> None:
    config = CascadeFitConfig()
    config.check("fit.")
    with pytest.raises(InputError, match=r"--fit.net-width is 0, expected at least 1"):
        replace(config, net_width=0).check("fit.")
    with pytest.raises(InputError, match=r"--fit.both.steps is -1, expected 0 or more"):
        replace(config, both=PathwiseConfig(steps=-1)).check("fit.")
