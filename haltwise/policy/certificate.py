"""What was certified about a head: a price, and how much exact match it costs at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from haltwise.errors import InputError

#: The loss that a certificate bounds:
#: - net-em-loss: the exact match that halting loses, less what it wins;
#: - right-to-wrong: the share of questions that the LM would have answered right by itself and
#:   answers wrong when halted.
Risk = Literal["net-em-loss", "right-to-wrong"]


@dataclass(frozen=True)
class SegmentCertificate:
    """What was certified for the questions of one segment."""

    segment: str
    """The segment's name, or the task's if the traces name no segment."""
    num_questions: int
    """Calibration questions of this segment."""
    price: float | None
    """The price that was certified for this segment; None if its questions are never to be
    halted."""
    saving: float
    """Share of the tokens that was not spent on the segment's traces at that price."""
    observed_loss: float
    """Mean loss of the segment's questions at that price."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If a value is out of its range.
        """
        _check_found(self)


@dataclass(frozen=True)
class Certificate:
    """A statement: the mean loss of a question at `price` is at most `max_em_drop`.

    It holds with the probability `confidence`, for the average over all questions like those that
    it was calibrated on. The statements on segments bound each segment by itself; with the same
    probability all of them hold together.
    """

    risk: Risk
    """The loss that is bounded. The loss of a question is the mean over its traces."""
    max_em_drop: float
    """The bound that was asked for, in (0, 1)."""
    confidence: float
    """The probability that was asked for, in (0, 1): how likely it is, over the draw of the
    questions, that the statement holds."""
    price: float | None
    """The certified price with the largest saving; None if no question is to be halted."""
    saving: float
    """Share of the calibration traces' tokens that was not spent at that price."""
    observed_loss: float
    """Mean loss of the calibration questions at that price."""
    num_questions: int
    """Calibration questions; the head learned from none of them."""
    num_traces: int
    """Traces of those questions."""
    traces: str
    """Digest of those traces."""
    lm: str
    """The LM that the traces are of, which the certificate is for. If there are several LMs, it
    is for their mixture."""
    head: str
    """Digest of the head that was certified, see `HaltHead.digest`."""
    smallest_em_drop: float | None
    """The smallest bound with which some saving could have been certified. It helps to plan and
    is no certificate itself."""
    command: str
    """The command that certified the head."""
    segments: tuple[SegmentCertificate, ...] = ()
    """One statement for each segment, also for those whose questions are never to be halted."""
    num_unlabelled: int = 0
    """Traces of those questions without a reference answer: in them every answer that differs from
    the full one counts as lost, so that the exact match lost is bounded all the same."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If a value is unknown or out of its range.
        """
        if self.risk not in get_args(Risk):
            raise InputError(f"certified risk is {self.risk!r}, expected {get_args(Risk)}")
        _check_asked(self.max_em_drop, self.confidence)
        _check_found(self)
        losses = [self.observed_loss, *(entry.observed_loss for entry in self.segments)]
        if max(losses) > self.max_em_drop + 1e-9:
            raise InputError(f"certificate has a loss above its own bound, {self.max_em_drop}")
        if self.num_traces < self.num_questions:
            raise InputError(
                f"certificate of {self.num_questions} questions with {self.num_traces} traces"
            )
        if not 0 <= self.num_unlabelled <= self.num_traces:
            raise InputError(
                f"certificate of {self.num_traces} traces, {self.num_unlabelled} of them without "
                "a reference answer"
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
        """Returns the price for a request of some segment: 0, never halt, if none was certified."""
        prices = {entry.segment: entry.price for entry in self.segments}
        return prices.get(segment) or 0.0


def _check_asked(max_em_drop: float, confidence: float) -> None:
    """Refuses a bound and a probability that no certificate can have.

    Raises:
        InputError: If one of them is not between 0 and 1.
    """
    for name, value in (("drop in exact match", max_em_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} is {value}, expected between 0 and 1, neither included")


def _check_found(part: Certificate | SegmentCertificate) -> None:
    """Refuses results that no calibration can have."""
    loss, saving = part.observed_loss, part.saving
    if part.num_questions < 1:
        raise InputError(f"certificate of {part.num_questions} questions, expected at least 1")
    if part.price is not None and not 0 < part.price < math.inf:
        raise InputError(f"certified price is {part.price}, expected above 0 or null")
    found = f"certificate has loss {loss} and saving {saving}"
    if not (-1 <= loss <= 1 and 0 <= saving <= 1):
        raise InputError(f"{found}, expected -1 to 1 and 0 to 1")
    if part.price is None and (saving or loss):
        raise InputError(f"{found}, expected 0 without a price")
