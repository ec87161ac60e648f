"""The best weights of a training run, and their average.

As stochastic weight averaging (Izmailov et al., 2018), but over the best checkpoints, not the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from haltwise.errors import InputError, from_clone, needing
from haltwise.training.curve import Returns, checked, mean_of

with needing("haltwise.training.averaging", from_clone("hf")):
    import torch
    from torch import nn

Weights = Mapping[str, Any]


class BestWeights:
    """Keeps the weights of the best evaluations, as copies in the memory of the CPU."""

    def __init__(self, num_kept: int = 3) -> None:
        """Begins with none.

        Args:
            num_kept: How many to keep at most.

        Raises:
            InputError: If that is less than 1.
        """
        if num_kept < 1:
            raise InputError(f"num_kept is {num_kept}, expected at least 1")
        self._num_kept = num_kept
        self._best: list[tuple[float, Weights]] = []

    @property
    def means(self) -> list[float]:
        """The mean returns of what is kept, the best first."""
        return [mean for mean, _ in self._best]

    def offer(self, mean: float, model: nn.Module) -> None:
        """Keeps a model's weights if they are among the best; of equal ones the earlier come first.

        Args:
            mean: The model's mean return on the held-out questions.
            model: The model.
        """
        if len(self._best) == self._num_kept and mean <= self._best[-1][0]:
            return
        copies = {
            name: value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
            for name, value in model.state_dict().items()
        }
        self._best.append((mean, copies))
        self._best.sort(key=lambda one: -one[0])
        del self._best[self._num_kept :]

    def settle(self, model: nn.Module, returns_of: Callable[[nn.Module], Returns]) -> bool:
        """Loads the best weights into a model, or the average of all that are kept if it is better.

        Both are evaluated anew: the best one owes its place to luck in part.

        Args:
            model: The model, whose weights are replaced.
            returns_of: Evaluates a model on the held-out questions.

        Returns:
            Whether it was the average.

        Raises:
            InputError: If no weights were offered, or an evaluation finds no returns.
        """
        if not self._best:
            raise InputError("no weights to choose from, expected an evaluation before")
        best, each = self._best[0][1], [weights for _, weights in self._best]
        model.load_state_dict(best)
        if len(each) == 1:
            return False
        was_training = model.training
        model.eval()
        mean = mean_of(checked(returns_of(model)))
        model.load_state_dict(average(each))
        is_better = mean_of(checked(returns_of(model))) > mean
        if not is_better:
            model.load_state_dict(best)
        model.train(was_training)
        return is_better


def average(each: Sequence[Weights]) -> dict[str, Any]:
    """Returns the mean of weights; what is no real or complex number is that of the first ones.

    Args:
        each: State dicts of one model, at least one.
    """
    return {
        name: _mean([weights[name] for weights in each])
        if torch.is_tensor(value) and (value.is_floating_point() or value.is_complex())
        else value
        for name, value in each[0].items()
    }


def _mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Returns the mean of tensors, which is taken in at least 32 bits."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    mean = torch.stack([tensor.to(wide) for tensor in tensors]).mean(dim=0)
    return mean.to(tensors[0].dtype)
