"""Certifies a run's head: finds the most saving price whose loss of exact match is bounded.

    python calibrate.py --head RUN --traces FILE_OR_FOLDER --max-em-drop 0.02 --confidence 0.9
    python calibrate.py ... --apply

Questions that the head learned from are left out. Without --apply the head stays as it is: what
could be certified is shown beside its own price. With it, the certificate goes into the run's
head.json, and the certified price becomes the head's own: 0, which never halts, if there is none.
The certificate holds for questions like the calibration ones, of the same LM, and for one call:
what is asked must be settled before, and asking otherwise afterwards needs fresh questions. What
else is printed is for planning.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import installed  # noqa: F401, tells what is missing

import numpy as np

from command import run
from evaluation.certify import (
    Measured,
    certify,
    certify_segments,
    fewest_questions,
    measure,
    measure_segments,
    questions_needed,
    segments_to_test,
    smallest_drop,
)
from evaluation.outcome import em_delta, halt_outcome, saving, sweep
from haltwise import Certificate, HaltHead, HeadConfig, InputError
from haltwise.errors import check_ranges
from haltwise.policy.certificate import Risk, SegmentCertificate
from haltwise.policy.head import NEVER_HALTS
from lms.scorers import agreeing
from policies.head import HeadPolicy
from policies.policy import Signal, decisions
from runs import Run
from traces import MAX_TRACES, TraceFiles, Traces

# The drops that the table for planning shows, beside the one that was asked for.
_DROPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)

_LOSS = {
    "net-em-loss": "exact match lost, net of what halting wins,",
    "right-to-wrong": "right answers turned wrong",
}

_TITLES = ("price", "saving %", "observed loss %")
_NEVER = ("never halt", "", "")


@dataclass(frozen=True)
class CalibrateConfig:
    """Certify a run's head on questions that it never learned from."""

    head: Path
    """Run folder, written by train.py; with --apply its head.json gets the certificate."""
    traces: Path
    """Recorded traces, a file or a folder. Where nobody knows the right answer, every answer that
    differs from the full one counts as lost."""
    max_em_drop: float
    """How much may be lost in the mean over questions: 0.02 is two points of exact match."""
    confidence: float = 0.9
    """Probability that the certificate is right, at least."""
    risk: Risk = "net-em-loss"
    """What counts as a loss: net-em-loss is exact match lost, less what halting wins;
    right-to-wrong is every right answer turned wrong."""
    split: str = "all"
    """Which of the traces to use: train, dev, test, or all."""
    max_traces: int = MAX_TRACES
    """The most traces to hold in memory; of more, the certificate rests on a sample of
    questions."""
    apply: bool = False
    """Write the certificate into the head, and make the certified price the head's own."""


def main(config: CalibrateConfig) -> Certificate:
    """Certifies, prints what was found, and writes it into the run's head if that is asked for.

    Returns:
        The certificate; its price is None (never halt) if nothing can be certified.

    Raises:
        InputError: If the run or the traces cannot be used, or do not fit each other.
    """
    shares = {name: getattr(config, name) for name in ("max_em_drop", "confidence")}
    between = "between 0 and 1, neither included"
    check_ranges(config, {name: (0 < share < 1, between) for name, share in shares.items()})
    certified = Run(config.head)
    head = certified.head()
    traces = _fresh(config, certified, head)
    if traces.target:
        print(traces.target)
    _count_asking(config, certified, head, traces)
    policy = HeadPolicy(head)
    signal = policy.signal(traces)
    by_price = sweep(traces, decisions(policy, signal), head.config.halting.probing)
    prices, outcomes = sorted(by_price), [by_price[price] for price in sorted(by_price)]
    pooled = measure(traces, outcomes, config.risk)
    segments = measure_segments(traces, outcomes, config.risk)
    certificate = _certificate(config, head, traces, prices, pooled, segments)
    print(_told(certificate, prices, pooled))
    own = head.config.default_price
    print(f"\nThe head's own price, {own:.6g}, {_came_to(own, policy, signal, traces)}.")
    print(
        "What training has told is an estimate from its own questions, by other heads. A "
        f"certificate is about this one, and rests on these {certificate.num_questions} new "
        "questions alone: the fewer, the less it vouches for."
    )
    # Whoever names no price gets what is certified: at a price of 0 the head never halts.
    price = certificate.price or 0.0
    if not config.apply:
        halting = "" if price else ", at which it never halts"
        print(f"The head is as it was: --apply would make {price:.6g} its own price{halting}.")
        if certificate.segments:
            print("It would also give each segment the price that the table above has for it.")
        return certificate
    # Prices of segments that nobody has certified would break the certificate.
    by_segment = {of.segment: of.price or 0.0 for of in certificate.segments}
    head_config = replace(
        head.config, certificate=certificate, default_price=price, segment_prices=by_segment
    )
    if head_config == head.config:  # what came before it is to be had back still
        print("The head has this certificate and its prices already: it is as it was.")
        return certificate
    undo = certified.replace_prices(HaltHead(head_config, head.weights))
    print(_replaced(head.config, head_config))
    print(f"To have the former prices back: {undo}")
    return certificate


def _replaced(before: HeadConfig, now: HeadConfig) -> str:
    """Says which prices of a head have been replaced by which."""
    own = f"{now.default_price:.6g} is the head's own price now."
    lines = [own if now.default_price else NEVER_HALTS]
    lines[0] += f" It was {before.default_price:.6g}."
    names = sorted(before.segment_prices | now.segment_prices)
    if names:
        changes = (f"{name} {_price_of(before, name)} -> {_price_of(now, name)}" for name in names)
        lines.append(f"Prices of segments were replaced too: {', '.join(changes)}.")
    return "\n".join(lines)


def _price_of(config: HeadConfig, segment: str) -> str:
    """Returns the price of a segment, or says that it has none of its own."""
    price = config.segment_prices.get(segment)
    return "none of its own" if price is None else f"{price:.6g}"


def _came_to(price: float, policy: HeadPolicy, signal: Signal, traces: Traces) -> str:
    """Says what a price comes to on some traces, which certifies nothing."""
    if not price:  # nothing is looked at either, so that nothing is paid for it
        return "halts nothing: it saves nothing and loses nothing"
    halts = policy.halts(signal, price)
    outcome = halt_outcome(traces, halts, policy.head.config.halting.probing)
    lost = -em_delta(traces, outcome) + 0.0  # no negative zero
    return f"saves {saving(traces, outcome):.1%} here and {_lost(lost)}, uncertified"


def _fresh(config: CalibrateConfig, certified: Run, head: HaltHead) -> Traces:
    """Reads the traces of questions that the head never learned from.

    Raises:
        InputError: If there are none, or they were recorded under other conditions than the head's.
    """
    learned = certified.learned()
    files = TraceFiles.of_head(config.traces, head.config, agreeing)
    rows = files.rows(*([] if config.split == "all" else [config.split]))
    known = rows & files.rows_of_questions(learned.questions, learned.texts)
    dropped = len(np.unique(files.question[known]))
    if (known == rows).all():
        raise InputError(
            f"{config.traces}: the head learned from all {dropped} questions, expected others"
        )
    if dropped:
        print(f"Left out {dropped} questions that the head learned from.")
    return files.one_id_a_text(files.read(files.sample(rows & ~known, config.max_traces)))


def _count_asking(config: CalibrateConfig, certified: Run, head: HaltHead, traces: Traces) -> None:
    """Keeps what this head is asked for, and warns if it was asked otherwise before."""
    what = (
        f"{config.risk} of at most {config.max_em_drop:g} with confidence {config.confidence:g} "
        f"on traces {traces.digest[:16]}, head {head.digest[:16]}"
    )
    asked = certified.asked()
    others = sum(num for earlier, num in asked.items() if earlier != what)
    certified.save_asked(asked | {what: asked.get(what, 0) + 1})
    if others:
        print(
            f"Certificates of this run have been asked for before ({others}), otherwise or on "
            "other traces.\nThe confidence holds for one that is asked for once, on fresh "
            "questions: whoever picks the best of\nseveral has a lower one."
        )


def _certificate(
    config: CalibrateConfig,
    head: HaltHead,
    traces: Traces,
    prices: Sequence[float],
    pooled: Measured,
    segments: dict[str, Measured],
) -> Certificate:
    """Returns the certificate, pooled over all questions and for each segment.

    Args:
        config: What is asked.
        head: The head to certify.
        traces: The traces that the certificate rests on.
        prices: K prices, the strictest first.
        pooled: What the prices come to on all questions.
        segments: By name of a segment, what the prices come to on its questions.
    """
    delta = 1 - config.confidence
    found = _found("", pooled, prices, certify(pooled, config.max_em_drop, delta))
    by_segment = certify_segments(segments, config.max_em_drop, delta)
    return Certificate(
        risk=config.risk,
        max_em_drop=config.max_em_drop,
        confidence=config.confidence,
        price=found.price,
        saving=found.saving,
        observed_loss=found.observed_loss,
        num_questions=found.num_questions,
        num_traces=len(traces),
        num_unlabelled=int((~traces.labelled).sum()),
        traces=traces.digest,
        lm=", ".join(np.unique(traces.model).tolist()),
        head=head.digest,
        smallest_em_drop=smallest_drop(pooled, config.max_em_drop, delta),
        command=shlex.join(sys.argv),
        segments=tuple(_found(name, segments[name], prices, k) for name, k in by_segment.items()),
    )


def _found(
    segment: str, measured: Measured, prices: Sequence[float], k: int | None
) -> SegmentCertificate:
    """Returns what is certified of a segment by the k-th price; None certifies no price."""
    num_questions = len(measured.losses)
    if k is None:
        return SegmentCertificate(segment, num_questions, None, 0.0, 0.0)
    loss, saving = float(measured.losses[:, k].mean()), float(measured.savings[k])
    return SegmentCertificate(segment, num_questions, prices[k], saving, loss)


def _told(certificate: Certificate, prices: Sequence[float], pooled: Measured) -> str:
    """Returns all that is printed about a certificate."""
    drop, delta = certificate.max_em_drop, 1 - certificate.confidence
    lines = [
        f"{certificate.num_questions} questions, {certificate.num_traces} traces of "
        f"{certificate.lm}. Asked, with a "
        f"confidence of {certificate.confidence:.10g}: {_LOSS[certificate.risk]} at most "
        f"{_points(drop)} in the mean.",
    ]
    if certificate.price is None:
        lines += ["Certified: no price that saves anything."]
    else:
        lines += [
            f"Certified: price {certificate.price:.6g}. On these traces it saves "
            f"{certificate.saving:.1%}, and {_lost(certificate.observed_loss)}."
        ]
    lines += [
        "",
        "This bounds the mean over all questions, not over those of one segment. For each segment "
        "by itself,\nall at once with that confidence:",
        *_table(("segment", "questions", *_TITLES), _segment_rows(certificate)),
        "",
        "For planning only: nothing below is certified, and to ask for it takes fresh questions.",
        *_table(("drop %", *_TITLES), _planned_rows(certificate, prices, pooled)),
        _smallest(certificate),
        f"Questions needed for {_points(drop)}: {fewest_questions(drop, delta)} without a single "
        f"loss; {_needed(certificate, pooled)}.",
    ]
    return "\n".join(lines)


def _segment_rows(certificate: Certificate) -> list[tuple[str, ...]]:
    """Returns the cells of a row for each segment."""
    drop, delta = certificate.max_em_drop, 1 - certificate.confidence
    counts = {entry.segment: entry.num_questions for entry in certificate.segments}
    tested = segments_to_test(counts, drop, delta)
    # All that are not tested yet are to be, together.
    needed = fewest_questions(drop, delta / len(counts)) if counts else 0
    rows = []
    for entry in certificate.segments:
        cells = _cells(entry.price, entry.saving, entry.observed_loss)
        if entry.segment not in tested:
            cells = (*_NEVER[:2], f"too few: {needed - entry.num_questions} more needed")
        rows.append((entry.segment, str(entry.num_questions), *cells))
    return rows


def _planned_rows(
    certificate: Certificate, prices: Sequence[float], pooled: Measured
) -> list[tuple[str, ...]]:
    """Returns the cells of a row for each drop that might have been asked for."""
    rows = []
    for drop in sorted({*_DROPS, certificate.max_em_drop}):
        k = certify(pooled, drop, 1 - certificate.confidence)
        found = _found("", pooled, prices, k)
        rows.append((f"{100 * drop:.4g}", *_cells(found.price, found.saving, found.observed_loss)))
    return rows


def _cells(price: float | None, saving: float, loss: float) -> tuple[str, ...]:
    """Returns the cells of a price, its saving and its loss."""
    if price is None:
        return _NEVER
    return f"{price:.6g}", f"{100 * saving:.1f}", f"{100 * loss:z.2f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, the titles first."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (titles, *rows)]


def _smallest(certificate: Certificate) -> str:
    """Says what the smallest drop is with which something would be certified."""
    if certificate.smallest_em_drop is None:
        return "No drop would be certified with some saving."
    return f"Smallest drop with some saving: {_points(certificate.smallest_em_drop)}."


def _needed(certificate: Certificate, pooled: Measured) -> str:
    """Says how many questions are needed if losses stay as observed."""
    if certificate.price is not None:
        return f"with losses as observed, these {certificate.num_questions} were enough"
    needed = questions_needed(pooled, certificate.max_em_drop, 1 - certificate.confidence)
    if needed is None:
        return "if losses stay as observed, no number would do for any saving"
    return f"if losses stay as observed, about {needed} for some saving in 4 of 5 cases"


def _lost(share: float) -> str:
    """Says in words what was lost, or gained."""
    return f"gains {_points(-share)}" if share < 0 else f"loses {_points(share)}"


def _points(share: float) -> str:
    """Returns a share as points of a hundred, with the word."""
    number = f"{100 * share:.4g}"
    return f"{number} point" if number == "1" else f"{number} points"


if __name__ == "__main__":
    run(main, CalibrateConfig)
