"""What was certified about a head: a price, and the exact match it may cost at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from haltwise.errors import InputError

#: What is bounded: exact match lost, net of what halting wins; or the questions that the LM would
#: have ended right and is halted wrong on.
Risk = Literal["net-em-loss", "right-to-wrong"]


@dataclass(frozen=True)
class SegmentCertificate:
    """What was certified for the questions of one segment."""

    segment: str
    """Its name; the task where traces name no segment."""
    num_questions: int
    """Of this segment."""
    price: float | None
    """Certified for this segment; None: never halt its questions."""
    saving: float
    """Share of the tokens not spent on the segment's traces at that price."""
    observed_loss: float
    """Mean loss of the segment's questions at that price."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is out of its range.
        """
        _check_found(self.num_questions, self.price, self.saving, self.observed_loss)


@dataclass(frozen=True)
class Certificate:
    """With this confidence, the mean loss of a question at the price is at most `max_em_drop`.

    It holds for the average over all questions like those it was calibrated on. With the same
    confidence all statements on segments hold together; they bound each segment by itself.
    """

    risk: Risk
    """The loss that is bounded; a question's is the mean over its traces."""
    max_em_drop: float
    """What was asked: how much of it there may be, in (0, 1)."""
    confidence: float
    """What was asked: the chance, over the draw of the questions, that the statement holds."""
    price: float | None
    """The certified price with the largest saving; None: never halt."""
    saving: float
    """Share of the calibration traces' tokens not spent at that price."""
    observed_loss: float
    """Mean loss of the calibration questions at that price."""
    num_questions: int
    """That it was calibrated on; the head learned from none of them."""
    num_traces: int
    """Of those questions."""
    traces: str
    """Digest of those traces."""
    lm: str
    """The LM that they are of, which the certificate is for; of several their mixture."""
    head: str
    """Digest of the head that was certified, see `HaltHead.digest`."""
    smallest_em_drop: float | None
    """With which some saving could have been certified; for planning, it is no certificate."""
    command: str
    """The command that certified."""
    segments: tuple[SegmentCertificate, ...] = ()
    """One for each segment, those never to be halted included."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is unknown or out of its range.
        """
        if self.risk not in get_args(Risk):
            raise InputError(f"certified risk is {self.risk!r}, expected {get_args(Risk)}")
        check_asked(self.max_em_drop, self.confidence)
        _check_found(self.num_questions, self.price, self.saving, self.observed_loss)
        losses = [self.observed_loss, *(entry.observed_loss for entry in self.segments)]
        if max(losses) > self.max_em_drop + 1e-9:
            raise InputError(f"certificate has a loss above its own bound, {self.max_em_drop}")
        if self.num_traces < self.num_questions:
            raise InputError(
                f"certificate of {self.num_questions} questions with {self.num_traces} traces"
            )
        if self.smallest_em_drop is not None and not 0 < self.smallest_em_drop < 1:
            raise InputError(f"smallest drop is {self.smallest_em_drop}, expected between 0 and 1")
        names = [entry.segment for entry in self.segments]
        if len(set(names)) < len(names):
            raise InputError(f"certificate names a segment twice: {names}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Certificate:
        """Rebuilds a certificate from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            segments = tuple(SegmentCertificate(**entry) for entry in data["segments"])
            return cls(**data | {"segments": segments})
        except (TypeError, KeyError) as error:
            raise InputError(f"certificate is not readable ({error!r})") from None

    def price_of(self, segment: str) -> float:
        """The price certified for a request's segment; 0, which never halts, if none was."""
        prices = {entry.segment: entry.price for entry in self.segments}
        return prices.get(segment) or 0.0


def check_asked(max_em_drop: float, confidence: float) -> None:
    """Refuses what cannot be asked of a certificate.

    Raises:
        InputError: If the drop or the confidence is not between 0 and 1.
    """
    for name, value in (("drop in exact match", max_em_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} is {value}, expected between 0 and 1, neither included")


def _check_found(
    num_questions: int, price: float | None, saving: float, observed_loss: float
) -> None:
    if num_questions < 1:
        raise InputError(f"certificate of {num_questions} questions, expected at least 1")
    if price is not None and not 0 < price < math.inf:
        raise InputError(f"certified price is {price}, expected above 0 or null")
    if not (-1 <= observed_loss <= 1 and 0 <= saving <= 1):
        raise InputError(
            f"certificate has loss {observed_loss} and saving {saving}, expected -1 to 1 and 0 to 1"
        )
    if price is None and (saving or observed_loss):
        raise InputError(
            f"certificate has loss {observed_loss} and saving {saving}, expected 0 without a price"
        )
