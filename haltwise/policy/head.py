"""The exported head: a small network that reads features and a price, and says when to halt.

A head is a folder with two files. head.safetensors holds the weights, and the projection of hidden
states if the head sees them. head.json says under which conditions the weights are valid. Loading
needs numpy and safetensors, and never unpickles anything.

Shapes: B rows, F features, P points, H hidden units.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from haltwise.errors import InputError
from haltwise.policy.certificate import Certificate
from haltwise.policy.features import (
    ANSWERED,
    FEATURE_GROUPS,
    check_projection,
    feature_names,
    signals_of,
)
from haltwise.policy.halting import Halting
from haltwise.policy.projection import Projection, check_tensor
from haltwise.policy.signals import Bools, Float

#: The form of the two files.
FORMAT = 1

#: What is told wherever a head is used at its own price, and that is 0.
NEVER_HALTS = "The head's own price is 0: it halts no thought, unless a request names a price."

#: Standardised features are clipped here, so that an outlier cannot saturate the network.
CLIP = 5.0

# Keys of head.json that older heads lack, each with what that stands for.
_NEWER: dict[str, Any] = {"server": {}, "segment_prices": {}, "recording": {}, "installation": ""}
_WEIGHTS = ("w0", "b0", "w1", "b1", "w2", "b2")
# The key of head.json that names its weights: the SHA-256 of head.safetensors.
_BOUND = "weights"
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
# What the names of the projection's tensors begin with.
_PROJECTION = "projection."
# What recorders tell of how an LM was run and asked, and first what is of that LM alone.
_ASKED = ("engine", "temperature", "max_tokens", "instruction", "messages")
_RECORDING = ("revision", "dtype", *_ASKED)


@dataclass(frozen=True)
class Observing:
    """How features and a price become what the network is fed."""

    groups: tuple[str, ...]
    """Names of the feature groups, in order."""
    mean: tuple[float, ...]
    """Mean of each feature over the training points."""
    scale: tuple[float, ...]
    """Standard deviation of each feature over the training points."""
    price_range: tuple[float, float]
    """Smallest and largest price that the head was trained for, in exact match per 1,000 tokens."""
    projection: Projection | None = None
    """What the head sees of hidden states; None exactly if the group "hidden" is absent. It is
    kept in head.safetensors."""

    def __post_init__(self) -> None:
        """Checks that the parts fit each other.

        Raises:
            InputError: If there is not one mean and one scale a feature, a scale is not positive,
                the price range is empty, or the projection does not fit the groups.
        """
        num_features = len(feature_names(self.groups))
        check_projection(self.groups, self.projection)
        if not len(self.mean) == len(self.scale) == num_features:
            raise InputError(
                f"found {len(self.mean)} means and {len(self.scale)} scales, expected "
                f"{num_features} of each for the features of {list(self.groups)}"
            )
        if not np.isfinite([*self.mean, *self.scale]).all() or min(self.scale) <= 0:
            raise InputError("a mean or scale is not finite, or a scale is not positive")
        low, high = self.price_range
        if not 0 < low < high < np.inf:
            raise InputError(f"price range is {self.price_range}, expected 0 < lowest < highest")

    @classmethod
    def fit(
        cls,
        groups: tuple[str, ...],
        features: Float,
        price_range: tuple[float, float],
        projection: Projection | None = None,
    ) -> Observing:
        """Returns an observing that standardises by the mean and spread of features (P, F).

        Points with a feature that is unknown do not count.
        """
        sound = np.isfinite(features).all(axis=1)
        features = features if sound.all() else features[sound]
        mean, scale = features.mean(axis=0), features.std(axis=0)
        scale = np.where(scale > 1e-6, scale, 1.0)  # a constant column stays zero
        return cls(groups, tuple(mean.tolist()), tuple(scale.tolist()), price_range, projection)

    @property
    def size(self) -> int:
        """Length of an observation, which is the features and the log price."""
        return len(self.mean) + 1

    @cached_property
    def signals(self) -> tuple[str, ...]:
        """The names of the signals that the features are made from."""
        return signals_of(self.groups)

    @cached_property
    def _constants(self) -> Float:
        """(2, F) mean and scale, made once: a decision must be quick."""
        return np.array([self.mean, self.scale], dtype=np.float32)

    def observe(self, features: Float, price: ArrayLike) -> Float:
        """Returns observations (B, F + 1) of features (B, F) at prices (B,) or one price.

        Features are standardised and clipped at 5. The log price comes last, see `dial`.
        """
        mean, scale = self._constants
        standard = (features - mean) / scale
        dial = np.broadcast_to(self.dial(price), len(features))[:, None]
        return np.concatenate([np.clip(standard, -CLIP, CLIP), dial], axis=1)

    def dial(self, price: ArrayLike) -> Float:
        """Returns the log price as the network sees it, of one price or of many.

        The price range becomes [-1, 1]; prices beyond it go on in the same way, up to -5 and 5.
        """
        low, high = np.log(self.price_range)
        place = (2 * np.log(np.asarray(price, dtype=np.float64)) - low - high) / (high - low)
        dial: Float = np.clip(place, -CLIP, CLIP).astype(np.float32)
        return dial

    def draw_price(self, rng: np.random.Generator, num: int) -> NDArray[np.float64]:
        """Draws prices (num,), log-uniform over the price range."""
        low, high = np.log(self.price_range)
        return np.exp(rng.uniform(low, high, num))


@dataclass(frozen=True)
class HeadConfig:
    """The conditions that the weights of a head are valid for: what is kept in head.json."""

    observing: Observing
    """How features and a price become what the network is fed."""
    halting: Halting
    """How the LM is halted."""
    default_price: float
    """The price if a caller names none; 0 never halts."""
    threshold: float = 0.5
    """The head halts when the probability of halting is at least this."""
    lm: str = ""
    """The LM or LMs that the training traces came from."""
    tokenizer: str = ""
    """Fingerprint of the LM's tokenizer; empty if the traces do not tell."""
    traces: str = ""
    """Digest of the training traces."""
    command: str = ""
    """The command that trained this head."""
    certificate: Certificate | None = None
    """What was certified about the head, if anything."""
    segment_prices: dict[str, float] = field(default_factory=dict)
    """By segment, the price of questions that are known to be of it; the others have the default
    one. At a price of 0 they are never halted."""
    server: dict[str, Any] = field(default_factory=dict)
    """What the server told of itself that the training traces were recorded from; empty if they
    were recorded otherwise."""
    recording: dict[str, Any] = field(default_factory=dict)
    """How the LM of the training traces was run and asked: its engine, temperature and so on, as
    far as the traces tell; empty in heads that are older than this."""
    installation: str = ""
    """The installation whose audits the head learned from, see `haltwise.control.installation`;
    empty if it learned from none. Of that one's questions it has seen half."""

    def __post_init__(self) -> None:
        """Checks that the parts fit each other.

        Raises:
            InputError: If the features cannot be seen under the halting conditions, or the
                threshold or a price is out of its range.
        """
        self.halting.check_groups(self.observing.groups)
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold is {self.threshold}, expected between 0 and 1")
        if not 0 <= self.default_price < np.inf:
            raise InputError(f"default price is {self.default_price}, expected 0 or more")
        for segment, price in self.segment_prices.items():
            if not (isinstance(price, int | float) and 0 <= price < np.inf):
                raise InputError(f"price of segment {segment!r} is {price!r}, expected 0 or more")

    def price_of(self, segment: str | None) -> float:
        """Returns the price of questions of a segment: its own, or else the default one.

        Args:
            segment: The segment's name, or the task's where training traces named no segment; None
                if it is unknown.
        """
        return self.segment_prices.get(segment or "", self.default_price)

    def recorded_otherwise(self, recorder: Mapping[str, Any], is_same_lm: bool = True) -> str:
        """Says what thoughts hang on that was another for some traces than for the training ones.

        It is nothing to refuse traces for, but numbers change with it.

        Args:
            recorder: The traces' `haltwise.recorder` metadata.
            is_same_lm: Whether the traces should be of the LM that the head was trained on.

        Returns:
            Words with both values of each; no text if nothing is known to differ.
        """
        told = told_by(recorder)
        was = _facts(self.lm, self.recording, self.server)
        lm = str(recorder.get("lm", ""))
        now = _facts(self.lm if lm in self.lm.split(", ") else lm, **told)
        names = [name for name in was if name in now and was[name] != now[name]]
        if not is_same_lm or "lm" in names:  # what is of one LM alone follows from that
            names = [name for name in names if name in _ASKED or (name == "lm" and is_same_lm)]
        differ = [f"{name} {was[name]!r:.60}, here {now[name]!r:.60}" for name in names]
        return f"the head learned from other traces: {'; '.join(differ)}" if differ else ""

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features, in order."""
        return feature_names(self.observing.groups)

    def to_json(self) -> dict[str, Any]:
        """Returns what head.json holds: this config, and the features that the weights are for."""
        data = asdict(self)
        del data["observing"]["projection"]
        for name in _NEWER:
            if not data[name]:  # as in heads that are older than this
                del data[name]
        versions = {group: FEATURE_GROUPS[group].version for group in self.observing.groups}
        return data | {"format": FORMAT, "features_version": versions, "features": self.features}

    @classmethod
    def from_json(cls, data: dict[str, Any], projection: Projection | None) -> HeadConfig:
        """Rebuilds a config from parsed JSON, and from the projection that is kept beside it.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form, or if this haltwise
                computes other features than those that the head was trained on.
        """
        own = {f.name for f in fields(cls)}
        known = own | {"format", "features_version", "features"}
        data = _NEWER | data
        if set(data) != known:
            raise InputError(
                f"head.json: missing keys {sorted(known - set(data))}, "
                f"unknown keys {sorted(set(data) - known)}"
            )
        _check_features(data)
        observing = {key: tuple(value) for key, value in data["observing"].items()}
        certificate = data["certificate"]
        parts = {
            "observing": Observing(**observing, projection=projection),
            "halting": Halting(**data["halting"]),
            "certificate": None if certificate is None else Certificate.from_json(certificate),
        }
        return cls(**{name: data[name] for name in own} | parts)


def told_by(recorder: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what traces tell of their LM, by the names of a head's conditions.

    Args:
        recorder: The traces' `haltwise.recorder` metadata.
    """
    # In audits the engine is the proxy, and each client asks in its own way.
    names = () if "installation" in recorder else _RECORDING
    server = recorder.get("server")
    return {
        "tokenizer": recorder.get("tokenizer", ""),
        "server": server if isinstance(server, dict) else {},
        "recording": {name: recorder[name] for name in names if name in recorder},
    }


def _facts(
    lm: str, recording: dict[str, Any], server: dict[str, Any], tokenizer: str = ""
) -> dict[str, Any]:
    """Returns, by name, all that is known of how an LM was run and asked."""
    named = {"lm": lm} if lm else {}
    return named | recording | {f"server {name}": value for name, value in server.items()}


def _check_features(data: dict[str, Any]) -> None:
    """Refuses a head.json whose features are not those that this haltwise computes."""
    groups = data["observing"]["groups"]
    names = feature_names(groups)
    versions = data["features_version"]
    for group in groups:
        # A head that is older than the versions of the groups states one version for all of them.
        found = versions.get(group) if isinstance(versions, dict) else versions
        expected = FEATURE_GROUPS[group].version
        if found != expected:
            raise InputError(
                f"head reads version {found} of feature group {group!r}, this haltwise expects "
                f"{expected}: train the head anew"
            )
    for key, value in (("format", FORMAT), ("features", list(names))):
        if data[key] != value:
            raise InputError(f"head has {key} {data[key]}, this haltwise expects {value}")


class HaltHead:
    """A halting policy: the log-odds of halting, from two hidden layers of H tanh units.

        h0 = tanh(w0 x + b0);  h1 = tanh(w1 h0 + b1);  log_odds = w2 [h1, x] + b2

    Args:
        config: The conditions that the weights are valid for.
        weights: w0 (H, F + 1), b0 (H,), w1 (H, H), b1 (H,), w2 (1, H + F + 1), b2 (1,), float32.
            In a head that does not look at x past its hidden layers, w2 is (1, H).

    Raises:
        InputError: If the weights do not fit the config or are not finite, or if the config's
            certificate is for another head.
    """

    def __init__(self, config: HeadConfig, weights: dict[str, Float]) -> None:
        """Checks the weights, and that the certificate is for them."""
        if sorted(weights) != sorted(_WEIGHTS):
            raise InputError(f"head has tensors {sorted(weights)}, expected {sorted(_WEIGHTS)}")
        hidden = weights["b0"].size
        size = config.observing.size
        last = hidden if weights["w2"].shape == (1, hidden) else hidden + size
        shapes = [(hidden, size), (hidden,), (hidden, hidden), (hidden,), (1, last), (1,)]
        for name, shape in zip(_WEIGHTS, shapes, strict=True):
            check_tensor(f"head tensor {name}", weights[name], shape)
        self.config = config
        self.weights = weights
        if config.certificate is not None and config.certificate.head != self.digest:
            raise InputError("the certificate is for another head, or for this one before a change")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the head's decisions at a price depend on.

        Certificates name it, so it must never change for the same head.
        """
        observing, projection = asdict(self.config.observing), self.config.observing.projection
        del observing["projection"]
        halting = asdict(self.config.halting)
        for name in ("answer_rule", "answer_end", "think_start", "think_end"):
            if halting[name] == getattr(Halting, name):  # certificates are older than these
                del halting[name]
        settings = [observing, halting, self.config.threshold]
        tensors = self.weights | ({} if projection is None else vars(projection))
        content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(tensors):
            content.update(name.encode() + tensors[name].tobytes())
        return content.hexdigest()

    def price_or_own(self, price: Any) -> Any:
        """Returns what somebody names as price or prices; the head's own price if that is None.

        Whoever names none is warned if the own price is 0, since then nothing will be halted.
        """
        if price is None and self.config.default_price == 0:
            warnings.warn(NEVER_HALTS, stacklevel=3)
        return self.config.default_price if price is None else price

    def log_odds(self, features: Float, price: ArrayLike | None = None) -> Float:
        """Returns the log-odds of halting (B,); NaN features give NaN.

        Args:
            features: (B, F), the columns of `config.features`.
            price: (B,) or one for all, in exact match per 1,000 tokens; by default the head's own.
                At a price of 0 tokens cost nothing, and the head never halts.
        """
        price = np.asarray(self.config.default_price if price is None else price)
        low, _ = self.config.observing.price_range
        obs = self.config.observing.observe(features, np.where(price > 0, price, low))
        return np.where(price > 0, self.log_odds_of(obs), np.float32(-np.inf))

    def log_odds_of(self, obs: NDArray[Any]) -> NDArray[Any]:
        """Returns the log-odds of halting (B,) at observations (B, F + 1), in their precision."""
        w = self.weights
        hidden = np.tanh(obs @ w["w0"].T + w["b0"])
        hidden = np.tanh(hidden @ w["w1"].T + w["b1"])
        last = w["w2"][0]
        log_odds: NDArray[Any] = hidden @ last[: hidden.shape[1]] + w["b2"]
        straight = last[hidden.shape[1] :]
        return log_odds + obs @ straight if straight.size else log_odds

    def prob_halt(self, features: Float, price: ArrayLike | None = None) -> Float:
        """Returns the probability of halting (B,); the arguments are those of `log_odds`."""
        return prob_of(self.log_odds(features, price))

    def halts(self, features: Float, price: ArrayLike | None = None) -> Bools:
        """Tells which rows to halt (B,); a row with a NaN feature continues.

        One whose forced answer was looked at and cannot be read continues too: whoever halts it has
        no answer. The arguments are those of `log_odds`.
        """
        likely: Bools = self.prob_halt(features, price) >= self.config.threshold
        return likely & self.may_halt(features)

    def may_halt(self, features: Float) -> Bools:
        """Tells which rows (B,) have an answer as far as is known, see `halts`."""
        if ANSWERED not in self.config.features:
            return np.ones(len(features), dtype=np.bool_)
        answered: Bools = features[:, self.config.features.index(ANSWERED)] > 0
        return answered

    def save(self, folder: Path | str) -> None:
        """Writes head.safetensors and head.json into a folder, each whole or not at all.

        The folder is made if it is not there. Whoever loads the head meanwhile waits, and whoever
        saves another one there too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        projection = self.config.observing.projection
        tensors = {} if projection is None else vars(projection)
        beside = {_PROJECTION + name: tensor for name, tensor in tensors.items()}
        content = save_tensors(self.weights | beside)
        told = self.config.to_json() | {_BOUND: hashlib.sha256(content).hexdigest()}
        with _locked(folder, alone=True):
            write_whole(folder / "head.safetensors", content)
            write_whole(folder / "head.json", (json.dumps(told, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path | str) -> HaltHead:
        """Reads a head from a folder that `save` has written.

        Raises:
            InputError: If a file is missing or damaged, the two files are not of one head, or this
                haltwise cannot serve the head.
        """
        folder = Path(folder)
        for name in ("head.json", "head.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"no {name} in {folder}: expected a folder written by train.py")
        try:
            with _locked(folder, alone=False):
                content = (folder / "head.safetensors").read_bytes()
                data = json.loads((folder / "head.json").read_text())
            _check_bound(data, content, folder)
            weights = load_tensors(content)
            names = [name for name in weights if name.startswith(_PROJECTION)]
            beside = {name.removeprefix(_PROJECTION): weights.pop(name) for name in names}
            projection = Projection(**beside) if beside else None
            return cls(HeadConfig.from_json(data, projection), weights)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        except (*_UNREADABLE, SafetensorError) as error:
            raise InputError(f"{folder}: not a readable head ({error})") from None


def prob_of(log_odds: NDArray[Any]) -> NDArray[Any]:
    """Returns the probabilities that some log-odds stand for."""
    return 0.5 * (1 + np.tanh(0.5 * log_odds))


def _check_bound(data: dict[str, Any], content: bytes, folder: Path) -> None:
    """Refuses a head.json that is not that of the weights beside it, and takes out what binds them.

    Raises:
        InputError: If another head's file lies there, or half of one that was being written.
    """
    bound = data.pop(_BOUND, None)
    if bound is None:
        warnings.warn(f"{folder}: head.json does not name its weights, it is trusted", stacklevel=3)
    elif bound != hashlib.sha256(content).hexdigest():
        raise InputError("head.json and head.safetensors are not of one head")


@contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[None]:
    """Keeps the files of a head together: none is read while another process writes both.

    Args:
        folder: The folder of the head.
        alone: Whether to keep out readers too, in order to write.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folder
            fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(held)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, through one whose name no other process takes."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
