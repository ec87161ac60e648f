"""The agent's network: hidden layers, and a straight path beside them from what is observed.

The straight path is a linear score of the observation. It starts near the baseline "evidence": as
the evidence for the forced answer, against a bar that falls as the price rises. The hidden layers
learn in what the best policy deviates from that rule: the less, the fewer the questions are.
"""

from __future__ import annotations

from typing import cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from haltwise import Observing, feature_names

# The log-odds of halting at the start, for each unit of a feature as it is before it is
# standardised: those of the baseline "evidence", halved, but that it counts log(times) and a
# feature log(1 + times), which needs a little more to tell one time from two. That rule halts
# nothing without an answer: so much for there being one.
_EVIDENCE = {"confidence_logit": 0.5, "log_run": 1.0, "answered": 10.0}
# The same for the log price, whose range is 2 wide: from one end to the other the bar moves over
# all of the evidence that there is.
_DIAL = 4.2


class LogOdds(nn.Module):
    """Log-odds of halting (.., 1) of observations (.., O).

        h = tanh(second(tanh(first(x))));  log_odds = out(h) + straight(x)

    Args:
        first: The first hidden layer.
        second: The second one.
        out: From the second one to the log-odds, with their bias.
        straight: From the observation to the log-odds, without a bias.
    """

    def __init__(
        self, first: nn.Linear, second: nn.Linear, out: nn.Linear, straight: nn.Linear
    ) -> None:
        """Takes in the layers as they are."""
        super().__init__()
        self.first, self.second, self.out, self.straight = first, second, out, straight

    def hidden(self, obs: Tensor) -> Tensor:
        """Returns the second hidden layer (.., H)."""
        return torch.tanh(self.second(torch.tanh(self.first(obs))))

    def of(self, hidden: Tensor, obs: Tensor) -> Tensor:
        """Returns the log-odds (.., 1) of what `hidden` has made of observations."""
        return cast(Tensor, self.out(hidden) + self.straight(obs))

    def forward(self, obs: Tensor) -> Tensor:
        """Returns the log-odds (.., 1) of observations."""
        return self.of(self.hidden(obs), obs)


class HaltingPolicy(ActorCriticPolicy):
    """stable-baselines3's policy, whose actions also see the observation past the hidden layers."""

    def _build_mlp_extractor(self) -> None:
        """Builds the hidden layers of the policy and of the value."""
        self.mlp_extractor = _Straight(
            self.features_dim, self.net_arch, self.activation_fn, self.device
        )


class _Straight(MlpExtractor):
    """Hidden layers as ever, and behind those of the policy the observation itself."""

    def __init__(self, feature_dim: int, *rest: object) -> None:
        """Builds the layers, and makes room for the observation (.., feature_dim)."""
        super().__init__(feature_dim, *rest)  # type: ignore[arg-type]
        self.latent_dim_pi += feature_dim

    def forward_actor(self, features: Tensor) -> Tensor:
        """Returns what the action layer sees (.., H + feature_dim)."""
        return torch.cat([self.policy_net(features), features], dim=-1)


def evidence_of(observing: Observing) -> Tensor:
    """Returns the weights (O,) of an observation in the log-odds of halting before any training.

    They are 0 for features that tell nothing of an answer, and for all but the price where the
    head sees no answers.
    """
    names = feature_names(observing.groups)
    each = [
        _EVIDENCE.get(name, 0.0) * scale for name, scale in zip(names, observing.scale, strict=True)
    ]
    return torch.tensor([*each, _DIAL])
