"""haltwise: a small policy that decides when a language model has thought enough."""

from haltwise.errors import InputError
from haltwise.features import FEATURE_GROUPS, FeatureState, feature_names
from haltwise.halting import MEAN_LOGPROB, DecisionRule, Halting
from haltwise.head import HaltHead, HeadConfig, Observing
from haltwise.monitor import HaltMonitor
from haltwise.projection import Projection
from haltwise.signals import Signals, answer_keys

__all__ = [
    "FEATURE_GROUPS",
    "MEAN_LOGPROB",
    "DecisionRule",
    "FeatureState",
    "HaltHead",
    "HaltMonitor",
    "Halting",
    "HeadConfig",
    "InputError",
    "Observing",
    "Projection",
    "Signals",
    "answer_keys",
    "feature_names",
]
