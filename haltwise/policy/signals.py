"""Signals: the raw numbers that are seen at a decision point.

`SIGNAL_KINDS` is the one table of them. The columns of a trace, what is measured beside a running
LM and what a server can show to a head all follow from it. A new signal is an entry there and a
field of `Signals`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Float = NDArray[np.float32]
Index = NDArray[np.int64]

#: What a signal is made from:
#: - point: how far the thought has come, and how many points the decision rule still allows;
#: - forced_answer: the answer that is forced at the point, so there has to be a probe;
#: - token_logprobs: the log probabilities of the tokens since the previous point, and of the 20
#:   likeliest tokens in the place of each;
#: - text: the words since the previous point;
#: - logits: the whole distribution of the token that would follow, on the LM's device;
#: - hidden_state: the state of the LM's last layer, on its device.
Origin = Literal["point", "forced_answer", "token_logprobs", "text", "logits", "hidden_state"]

#: The origins whose signals are measured only if somebody asks for them. These signals are the
#: optional columns of a trace.
MEASURED_FROM: tuple[Origin, ...] = ("token_logprobs", "text", "logits", "hidden_state")

#: The origins that a head can see beside a server: behind the proxy, inside vLLM, or in batch jobs
#: on vLLM's engine. Beside transformers it can see all of them.
SHOWN_BY: dict[str, tuple[Origin, ...]] = {
    "proxy": ("point", "forced_answer", "token_logprobs", "text"),
    "vllm": ("point", "token_logprobs", "text", "logits"),
    "vllm_jobs": ("point", "forced_answer", "token_logprobs", "text", "logits"),
}


@dataclass(frozen=True)
class SignalKind:
    """What is known of a signal before it is measured."""

    origin: Origin
    """What it is made from."""
    dtype: type[np.generic] = np.float32
    """The type that holds its values without loss; a column of a trace has this type."""
    is_vector: bool = False
    """Whether it is a vector (D,) at each point, of one size in a recording, and not a number."""
    since: Literal["", "mean", "max", "min", "sum"] = ""
    """What it is of the tokens since the previous point; empty if it is of the point alone."""


#: Every signal by its name, in order: the fields of `Signals`, which say what each one means.
SIGNAL_KINDS: dict[str, SignalKind] = {
    "position": SignalKind("point", np.int64),
    "confidence": SignalKind("forced_answer"),
    "answer": SignalKind("forced_answer", np.int64),
    "worst_logprob": SignalKind("forced_answer"),
    "probe_tokens": SignalKind("forced_answer", np.int64),
    "entropy": SignalKind("token_logprobs", since="mean"),
    "max_entropy": SignalKind("token_logprobs", since="max"),
    "logprob": SignalKind("token_logprobs", since="mean"),
    "min_logprob": SignalKind("token_logprobs", since="min"),
    "margin": SignalKind("token_logprobs", since="mean"),
    "end_think_logprob": SignalKind("logits"),
    "num_reflections": SignalKind("text", since="sum"),
    "hidden": SignalKind("hidden_state", np.float16, is_vector=True),
    "points_left": SignalKind("point", np.int64),
}


def signals_from(*origins: Origin) -> tuple[str, ...]:
    """Returns the names of the signals that are made from some origins, in order."""
    return tuple(name for name, kind in SIGNAL_KINDS.items() if kind.origin in origins)


@dataclass(frozen=True)
class Signals:
    """What is seen of B rows, each at one decision point; None is what nobody looked at.

    All are (B,) numbers, NaN where unknown, but `hidden`, which is (B, D). "Since" means since
    the row's previous decision point, or since the start of its thought.
    """

    position: Index
    """Thinking tokens so far."""
    confidence: Float | None = None
    """The LM's confidence in the forced answer, in [0, 1]."""
    answer: Index | None = None
    """Keys of the forced answers, see `answer_keys`; 0 if no answer could be read."""
    worst_logprob: Float | None = None
    """Smallest log probability of a token of the forced answer, nats; NaN if it has no token."""
    probe_tokens: Index | None = None
    """Tokens that were generated to force the answer."""
    entropy: Float | None = None
    """Mean entropy of the next token's distribution since, nats."""
    max_entropy: Float | None = None
    """Largest entropy of the next token's distribution since, nats."""
    logprob: Float | None = None
    """Mean log probability of the tokens generated since, nats."""
    min_logprob: Float | None = None
    """Smallest log probability of a token generated since, nats."""
    margin: Float | None = None
    """Mean difference of the two largest probabilities of the next token since."""
    end_think_logprob: Float | None = None
    """Log probability that the end-of-thinking token comes next, nats."""
    num_reflections: Float | None = None
    """Number of reflection words since, such as "wait"."""
    hidden: Float | None = None
    """(B, D) last-layer states of the newest tokens."""
    points_left: Index | None = None
    """Decision points that the decision rule allows after this one."""

    def rows(self, rows: Index) -> "Signals":
        """Returns those of some rows (M,), which may be named several times."""
        chosen = {name: None if seen is None else seen[rows] for name, seen in vars(self).items()}
        return Signals(**chosen)  # type: ignore[arg-type]


def answer_keys(answers: Sequence[str]) -> Index:
    """Returns keys (B,) that are equal exactly when the answers are; 0 for an empty answer.

    Two different answers share a key with probability 2**-63.
    """
    keys = {text: _answer_key(text) for text in set(answers)}
    return np.array([keys[text] for text in answers], dtype=np.int64)


def _answer_key(text: str) -> int:
    if not text:
        return 0
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
