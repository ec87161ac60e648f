"""When a training run has learned enough: a rule, and callbacks of the frameworks that train.

`trainer` is for transformers' Trainer, `sb3` for stable-baselines3, `averaging` for torch.
"""

from haltwise.training.config import StoppingConfig
from haltwise.training.curve import MeanReturn, Returns
from haltwise.training.rule import Decision, StoppingRule

__all__ = ["Decision", "MeanReturn", "Returns", "StoppingConfig", "StoppingRule"]
