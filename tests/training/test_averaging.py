"""The best weights are kept, and averaged where the average is better."""

import numpy as np
import pytest
import torch
from torch import nn

from haltwise import InputError
from haltwise.training.averaging import BestWeights, average


def at(value: float) -> nn.BatchNorm1d:
    """A layer with a weight, and the buffers of a normalisation that has counted its batches."""
    model = nn.BatchNorm1d(1)
    state = {"weight": value, "bias": 0.0, "running_mean": 10 * value, "running_var": 1.0}
    each = {name: torch.tensor([number]) for name, number in state.items()}
    model.load_state_dict(each | {"num_batches_tracked": torch.tensor(int(value))})
    return model


def near(optimum: float, model: nn.Module) -> list[float]:
    return [-abs(float(model.state_dict()["weight"]) - optimum)]


@pytest.mark.parametrize(
    ("optimum", "expected"),
    [
        (5.0, 5.0),  # of 4 and 6 the average is the optimum
        (4.0, 4.0),  # of 4 and the next best the average is worse
    ],
)
def test_the_average_is_taken_where_it_is_better(optimum: float, expected: float) -> None:
    best = BestWeights(2)
    for value in (1.0, 4.0, 9.0, 6.0):
        model = at(value)
        best.offer(near(optimum, model)[0], model)
    model = at(100.0)

    def judged(one: nn.Module) -> list[float]:
        assert not one.training
        return near(optimum, one)

    assert best.settle(model, judged) is (expected == 5)
    assert near(expected, model) == [0.0] and model.training


def test_what_is_kept_does_not_move_with_the_model() -> None:
    best, model = BestWeights(1), at(2.0)
    best.offer(0.5, model)
    with torch.no_grad():
        model.weight.fill_(7.0)
    best.offer(0.5, model)
    assert best.settle(model, lambda one: near(2.0, one)) is False and near(2.0, model) == [0.0]


def test_counts_are_those_of_the_best_and_real_numbers_are_averaged() -> None:
    mean = average([at(value).state_dict() for value in (4.0, 1.0, 1.0)])
    assert (mean["weight"].item(), mean["running_mean"].item()) == (2.0, 20.0)
    assert mean["num_batches_tracked"].item() == 4
    assert mean["num_batches_tracked"].dtype == torch.int64


def test_short_numbers_are_averaged_in_long_ones() -> None:
    each = [{"w": torch.tensor([256.0 + 2 * k], dtype=torch.bfloat16)} for k in range(3)]
    assert average(each)["w"].dtype == torch.bfloat16 and average(each)["w"].item() == 258.0
    values = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    found = average([{"w": torch.from_numpy(row)} for row in values])["w"]
    assert found.numpy() == pytest.approx(values.mean(axis=0), abs=1e-6)


def test_none_are_kept_of_none() -> None:
    with pytest.raises(InputError, match="num_kept is 0, expected at least 1"):
        BestWeights(0)
    with pytest.raises(InputError, match="no weights to choose from"):
        BestWeights().settle(at(1.0), lambda one: near(1.0, one))
