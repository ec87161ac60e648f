"""haltwise: a small policy that decides when a language model has thought enough."""

from haltwise.certificate import Certificate
from haltwise.errors import InputError
from haltwise.explain import Explanation, explain
from haltwise.features import FEATURE_GROUPS, FeatureState, feature_names
from haltwise.halting import MEAN_LOGPROB, DecisionRule, Halting
from haltwise.head import HaltHead, HeadConfig, Observing
from haltwise.monitor import HaltMonitor
from haltwise.projection import Projection
from haltwise.signals import Signals, answer_keys
from haltwise.terms import Terms

__all__ = [
    "FEATURE_GROUPS",
    "MEAN_LOGPROB",
    "Certificate",
    "DecisionRule",
    "Explanation",
    "FeatureState",
    "HaltHead",
    "HaltMonitor",
    "Halting",
    "HeadConfig",
    "InputError",
    "Observing",
    "Projection",
    "Signals",
    "Terms",
    "answer_keys",
    "explain",
    "feature_names",
]
