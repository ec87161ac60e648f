"""A small and a large LM: answer, continue, or escalate to the large one.

A cascade is a halting head of the small LM, as it is, and a second small network that says when to
escalate. Its folder is that of the head with two more files: cascade.safetensors holds the weights,
cascade.json says under which conditions they are valid. Loading needs numpy and safetensors.

At every decision point there are three log-odds, each against going on:

    continue 0;  halt: the head's own;  escalate: the network's

and the largest one is done. Where the network's is below 0, the head alone decides, as it would
without a large LM. Before the first token nothing can be answered, and at the thought's end nothing
continued: there the network's is compared with 0, at which the small LM begins, or its answer
holds.

A proxy asks so, with what it has of each of B requests:

    cascade = Cascade.load(folder)
    asked = cascade.reader.read([Question(text, task, segment), ...])  # (B, Q), once a request
    cascade.at_start(asked, price)             # before the first token: CONTINUE or ESCALATE
    cascade.at_point(features, asked, price)   # at a decision point: any of the three
    cascade.at_halt(features, asked, price)    # something else halts there: HALT or ESCALATE
    cascade.at_end(features, asked, price, cut)         # the thought's end: HALT or ESCALATE

`features` (B, F) are those that the head is fed at that point, at the end those of the last point
(NaN if there was none). A large LM that is to be halted, too, has a head of its own, which is asked
at the price times `config.price_ratio`.

The ratio of the two LMs' tariffs is fixed in training, and kept: it is known before anything is
served and changes seldom, the returns of escalating scale with it, and one number less to learn
from the same questions makes a better network. Training for another one takes minutes.

Shapes: B rows, F features, Q numbers of a question, H hidden units.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from haltwise.errors import InputError
from haltwise.policy.head import HaltHead, Observing, prob_of, write_whole
from haltwise.policy.projection import check_tensor
from haltwise.policy.question import COUNTS, QuestionReader
from haltwise.policy.signals import Float

#: The form of the two files.
FORMAT = 1

#: Where a question is: before the first token, at the thought's end, and whether the token budget
#: has ended the thought. At a decision point all three are 0.
PLACES = ("at_start", "at_end", "cut")

_WEIGHTS = ("w0", "b0", "w1", "b1", "w2", "b2")
# The keys of cascade.json that name its weights and its head, both by a digest.
_BOUND, _HEAD = "weights", "head"
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Act(IntEnum):
    """What a cascade says about a question."""

    CONTINUE = 0
    HALT = 1
    ESCALATE = 2


Acts = NDArray[np.int64]


@dataclass(frozen=True)
class CascadeConfig:
    """The conditions that the weights of a cascade are valid for: what is kept in cascade.json."""

    reader: QuestionReader
    """How questions become numbers."""
    price_ratio: float
    """What a token of the large LM costs, in tokens of the small one."""
    default_price: float
    """The price if a caller names none, in exact match per 1,000 tokens of the small LM."""
    small_lm: str = ""
    """The LM that answers first."""
    large_lm: str = ""
    """The LM that is escalated to."""
    large_head: str = ""
    """The digest of the head that halts the large LM; empty if nothing does."""
    traces: str = ""
    """Digest of the training traces of both LMs."""
    command: str = ""
    """The command that trained this cascade."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If the price ratio or the price is not positive and finite.
        """
        for name in ("price_ratio", "default_price"):
            check_positive(name.replace("_", " "), getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        """Returns what cascade.json holds, but for what binds it to its weights and its head."""
        return asdict(self) | {"format": FORMAT, "counts": COUNTS, "places": PLACES}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CascadeConfig:
        """Rebuilds a config from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form, or if this haltwise reads
                other numbers of a question than those that the cascade was trained on.
        """
        own = {f.name for f in fields(cls)}
        known = own | {"format", "counts", "places"}
        if set(data) != known:
            raise InputError(
                f"cascade.json: missing keys {sorted(known - set(data))}, "
                f"unknown keys {sorted(set(data) - known)}"
            )
        for key, value in (("format", FORMAT), ("counts", COUNTS), ("places", PLACES)):
            found = tuple(data[key]) if isinstance(value, tuple) else data[key]
            if found != value:
                raise InputError(f"cascade has {key} {found}, this haltwise expects {value}")
        reader = QuestionReader(**{key: tuple(value) for key, value in data["reader"].items()})
        return cls(**{name: data[name] for name in own} | {"reader": reader})


class Cascade:
    """When a small LM answers, goes on, or leaves a question to a large one.

        h0 = tanh(w0 x + b0);  h1 = tanh(w1 h0 + b1);  log_odds = w2 [h1, x] + b2

    are the log-odds of escalating, where x is what the head observes of the features, the numbers
    of the question, `PLACES`, and the log price last.

    Args:
        head: The small LM's halting head.
        config: The conditions that the weights are valid for.
        weights: w0 (H, X), b0 (H,), w1 (H, H), b1 (H,), w2 (1, H + X), b2 (1,), float32, where X is
            `size`.

    Raises:
        InputError: If the weights do not fit the config and the head, or are not finite.
    """

    def __init__(self, head: HaltHead, config: CascadeConfig, weights: dict[str, Float]) -> None:
        """Checks the weights."""
        if sorted(weights) != sorted(_WEIGHTS):
            raise InputError(f"cascade has tensors {sorted(weights)}, expected {sorted(_WEIGHTS)}")
        hidden, size = weights["b0"].size, observed_size(head.config.observing, config.reader)
        shapes = [(hidden, size), (hidden,), (hidden, hidden), (hidden,), (1, hidden + size), (1,)]
        for name, shape in zip(_WEIGHTS, shapes, strict=True):
            check_tensor(f"cascade tensor {name}", weights[name], shape)
        self.head = head
        self.config = config
        self.weights = weights

    @property
    def reader(self) -> QuestionReader:
        """How questions become numbers."""
        return self.config.reader

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the cascade's decisions at a price depend on."""
        settings = [self.head.digest, asdict(self.reader), self.config.price_ratio]
        content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in _WEIGHTS:
            content.update(name.encode() + self.weights[name].tobytes())
        return content.hexdigest()

    def at_start(self, asked: Float, price: ArrayLike | None = None) -> Acts:
        """Decides before the first token: CONTINUE, which starts the small LM, or ESCALATE (B,).

        Args:
            asked: (B, Q) the questions, as `reader` reads them.
            price: (B,) or one for all, in exact match per 1,000 tokens of the small LM; by default
                the cascade's own.
        """
        unseen = np.full((len(asked), len(self.head.config.features)), np.nan, dtype=np.float32)
        escalate = self.log_odds(unseen, asked, price, at_start=True) > 0
        return np.where(escalate, Act.ESCALATE, Act.CONTINUE)

    def at_point(self, features: Float, asked: Float, price: ArrayLike | None = None) -> Acts:
        """Decides at a decision point: CONTINUE, HALT or ESCALATE (B,).

        Where a feature is unknown it continues, as the head does; where the answer cannot be read
        it does not halt.

        Args:
            features: (B, F), the columns of `head.config.features`.
            asked: (B, Q) the questions, as `reader` reads them.
            price: (B,) or one for all; by default the cascade's own.
        """
        halt, escalate = self._both(features, asked, price)
        halt = np.where(self.head.may_halt(features), halt, np.float32(-np.inf))
        halts = prob_of(halt) >= self.head.config.threshold
        acts = np.where(halts, Act.HALT, Act.CONTINUE)
        escalates = escalate > np.maximum(halt - self._bar, 0)
        return np.where(escalates & np.isfinite(features).all(axis=1), Act.ESCALATE, acts)

    def at_halt(self, features: Float, asked: Float, price: ArrayLike | None = None) -> Acts:
        """Decides at a decision point where something else halts: HALT or ESCALATE (B,).

        The arguments are those of `at_point`. Where a feature is unknown, the answer holds.
        """
        halt, escalate = self._both(features, asked, price)
        return np.where(escalate > halt - self._bar, Act.ESCALATE, Act.HALT)

    def at_end(
        self, features: Float, asked: Float, price: ArrayLike | None = None, cut: ArrayLike = False
    ) -> Acts:
        """Decides where the thought has ended by itself or by its budget: HALT or ESCALATE (B,).

        Args:
            features: (B, F) those of the last decision point; NaN where there was none.
            asked: (B, Q) the questions, as `reader` reads them.
            price: (B,) or one for all; by default the cascade's own.
            cut: (B,) or one for all, whether the token budget has ended the thought.
        """
        escalate = self.log_odds(features, asked, price, at_end=True, cut=cut) > 0
        return np.where(escalate, Act.ESCALATE, Act.HALT)

    def log_odds(
        self,
        features: Float,
        asked: Float,
        price: ArrayLike | None = None,
        *,
        at_start: ArrayLike = False,
        at_end: ArrayLike = False,
        cut: ArrayLike = False,
    ) -> Float:
        """Returns the log-odds of escalating (B,); unknown features count as the mean.

        The arguments are those of `at_point` and `at_end`, and where the questions are.
        """
        obs = self._observe(features, asked, self._price(price), (at_start, at_end, cut))
        w = self.weights
        hidden = np.tanh(np.tanh(obs @ w["w0"].T + w["b0"]) @ w["w1"].T + w["b1"])
        log_odds: Float = np.concatenate([hidden, obs], axis=1) @ w["w2"][0] + w["b2"]
        return log_odds

    def _both(self, features: Float, asked: Float, price: ArrayLike | None) -> tuple[Float, Float]:
        """Returns the log-odds of halting and of escalating (B,) at a decision point."""
        halt = self.head.log_odds(features, self._price(price))
        return halt, self.log_odds(features, asked, price)

    @property
    def _bar(self) -> np.float32:
        """The log-odds from which on the head halts."""
        threshold = self.head.config.threshold
        return np.float32(np.log(threshold) - np.log1p(-threshold))

    def _price(self, price: ArrayLike | None) -> NDArray[Any]:
        """Returns the prices that are asked for, as an array."""
        return np.asarray(self.config.default_price if price is None else price)

    def _observe(
        self,
        features: Float,
        asked: Float,
        price: NDArray[Any],
        places: tuple[ArrayLike, ArrayLike, ArrayLike],
    ) -> Float:
        """Returns what the network is fed (B, X)."""
        observing = self.head.config.observing
        # At a price of 0 tokens cost nothing: that is the lowest price there is.
        obs = observing.observe(features, np.where(price > 0, price, observing.price_range[0]))
        return joined(np.nan_to_num(obs[:, :-1]), asked, places, obs[:, -1])

    def save(self, folder: Path | str) -> None:
        """Writes the head, then cascade.safetensors and cascade.json, each whole or not at all.

        The folder is made if it is not there.
        """
        folder = Path(folder)
        self.head.save(folder)
        content = save_tensors(self.weights)
        bound = {_BOUND: hashlib.sha256(content).hexdigest(), _HEAD: self.head.digest}
        told = json.dumps(self.config.to_json() | bound, indent=2) + "\n"
        write_whole(folder / "cascade.safetensors", content)
        write_whole(folder / "cascade.json", told.encode())

    @classmethod
    def load(cls, folder: Path | str) -> Cascade:
        """Reads a cascade from a folder that `save` has written.

        Raises:
            InputError: If a file is missing or damaged, the files are not of one cascade, or this
                haltwise cannot serve it.
        """
        folder = Path(folder)
        for name in ("cascade.json", "cascade.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"no {name} in {folder}: expected a folder written by cascade.py")
        head = HaltHead.load(folder)
        try:
            content = (folder / "cascade.safetensors").read_bytes()
            data = json.loads((folder / "cascade.json").read_text())
            if data.pop(_BOUND) != hashlib.sha256(content).hexdigest():
                raise InputError("cascade.json and cascade.safetensors are not of one cascade")
            if data.pop(_HEAD) != head.digest:
                raise InputError("cascade.json is for another head than the one beside it")
            return cls(head, CascadeConfig.from_json(data), load_tensors(content))
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        except (*_UNREADABLE, SafetensorError) as error:
            raise InputError(f"{folder}: not a readable cascade ({error!r})") from None


def joined(
    features: Float, asked: Float, places: tuple[ArrayLike, ArrayLike, ArrayLike], dial: Float
) -> Float:
    """Returns what the network is fed (B, X), of its parts.

    Args:
        features: (B, F) standardised features.
        asked: (B, Q) the numbers of the questions.
        places: (B,) or one for all, of each of `PLACES`.
        dial: (B,) the log prices, as the head's `Observing.dial` has them.
    """
    flags = [np.broadcast_to(np.asarray(place, dtype=np.float32), len(dial)) for place in places]
    parts = [features, asked, np.stack(flags, axis=1), dial[:, None]]
    return np.concatenate(parts, axis=1).astype(np.float32)


def observed_size(observing: Observing, reader: QuestionReader) -> int:
    """Returns X, how many numbers the network is fed."""
    return observing.size + len(reader.names) + len(PLACES)


def check_positive(name: str, value: Any) -> None:
    """Refuses what is not a positive, finite number.

    Raises:
        InputError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise InputError(f"{name} is {value!r}, expected a number above 0")
