"""haltwise: a small policy that decides when a language model has thought enough."""

from importlib.metadata import PackageNotFoundError, version

from haltwise.errors import InputError
from haltwise.policy.certificate import Certificate
from haltwise.policy.explain import Explanation, explain
from haltwise.policy.features import FEATURE_GROUPS, FeatureState, feature_names
from haltwise.policy.halting import MEAN_LOGPROB, DecisionRule, Halting
from haltwise.policy.head import HaltHead, HeadConfig, Observing
from haltwise.policy.projection import Projection
from haltwise.policy.signals import Signals, answer_keys
from haltwise.session.control import Control
from haltwise.session.request import RunningRequest, Terms, ThoughtReport, ThoughtRequest
from haltwise.session.session import HaltMonitor, Session

__all__ = [
    "FEATURE_GROUPS",
    "MEAN_LOGPROB",
    "Certificate",
    "Control",
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
    "RunningRequest",
    "Session",
    "Signals",
    "Terms",
    "ThoughtReport",
    "ThoughtRequest",
    "__version__",
    "answer_keys",
    "explain",
    "feature_names",
]

try:
    __version__ = version("haltwise")
except PackageNotFoundError:
    __version__ = "(not installed)"
