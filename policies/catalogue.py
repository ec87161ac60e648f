"""Every policy and rule there is, in words."""

from __future__ import annotations

from policies import baselines
from policies.head import HeadPolicy
from policies.rules import RULES
from policies.supervised import SUPERVISED


def in_words() -> dict[str, tuple[str, str]]:
    """Returns, by name, the readable name and the sentence of every policy and rule.

    They come in the order in which the page lists them: the control that halts by chance comes
    after the policies that it is a control of.
    """
    simple = {policy.name: (policy.title, policy.sentence) for policy in baselines.BASELINES}
    control = {name: simple.pop(name) for name in (baselines.Random.name,)}
    rules = {rule.name: (rule.title, rule.sentence) for rule in RULES}
    head = {HeadPolicy.name: (HeadPolicy.title, HeadPolicy.sentence)}
    return head | simple | SUPERVISED | control | rules
