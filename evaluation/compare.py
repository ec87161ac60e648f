"""Compares policies on the same traces, over their grids and at their operating points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.frozen import AtPoint, report_rows
from evaluation.honest import rows_at
from evaluation.outcome import Outcome, average, halt_outcome, never_outcome
from evaluation.rows import FrozenRow, HonestRow, MissingPoint, MissingSweep, SweepRow
from haltwise import InputError
from haltwise.policy.halting import Probing
from policies.policy import Policy, Signal, signal_under
from policies.rules import RULES
from policies.supervised import SUPERVISED
from runs import Gates
from traces import Traces

#: By name, a policy, or several trainings of one, whose outcomes are averaged.
Policies = Mapping[str, Sequence[Policy]]


@dataclass(frozen=True)
class Compared:
    """What several policies come to on the same traces."""

    rows: list[SweepRow | MissingSweep]
    """The rules, and every policy over its grid."""
    frozen: list[FrozenRow | MissingPoint]
    """Every policy at its operating points, one gate after the other."""
    outcomes: dict[float, dict[str, Outcome]]
    """By gate and policy, the outcomes at those points."""
    honest: list[HonestRow]
    """Every policy at the points that are to keep a gate on new questions too."""


def compare(
    traces: Traces,
    split: str,
    policies: Policies,
    gates: Gates,
    probing: Probing,
    honest: Gates | None = None,
) -> Compared:
    """Evaluates policies on some traces, which are probed as the head needs it.

    Args:
        traces: The traces to evaluate on; nothing is tuned on them.
        split: The name of the split that they are of.
        policies: The policies, "head" among them. One without a training is not available.
        gates: By gate, the frozen points. A baseline that they do not name is not available.
        probing: "always" or "at_halt", see `haltwise.Halting`.
        honest: The points of `evaluation.honest`, likewise; None if none were chosen.

    Raises:
        InputError: If the points name an unknown policy, or the head's signals are missing.
    """
    unknown = sorted({name for points in gates.values() for name in points} - set(policies))
    if unknown:
        known = sorted({*policies, *SUPERVISED})
        raise InputError(f"operating points of unknown policies {unknown}: know {known}")
    rules = parameter_free(traces, probing)
    played = {name: _Played.of(each, traces, probing) for name, each in policies.items()}
    at_points = {
        gate: {
            name: AtPoint(points[name], of.outcome(points[name]))
            for name, of in played.items()
            if of is not None and name in points
        }
        for gate, points in gates.items()
    }
    sweeps = {name: None if of is None else of.sweep() for name, of in played.items()}
    rows, frozen = report_rows(traces, split, sweeps, at_points, rules)
    outcomes = {
        gate: {name: at.outcome for name, at in points.items()}
        for gate, points in at_points.items()
    }
    sure = {
        gate: {
            name: (at, of.outcome(at))
            for name, at in points.items()
            if (of := played.get(name)) is not None
        }
        for gate, points in (honest or {}).items()
    }
    return Compared(rows, frozen, outcomes, rows_at(traces, split, sure))


@dataclass(frozen=True)
class _Played:
    """A policy, or several trainings of one, on some traces."""

    traces: Traces
    probing: Probing
    policies: Sequence[Policy]
    signals: Sequence[Signal]

    @classmethod
    def of(cls, policies: Sequence[Policy], traces: Traces, probing: Probing) -> _Played | None:
        """Lets a policy look at some traces; None if it is not available there."""
        signals = [signal_under(policy, traces, probing) for policy in policies]
        known = [signal for signal in signals if signal is not None]
        return cls(traces, probing, policies, known) if known else None

    def outcome(self, parameter: float | None) -> Outcome:
        """Returns the outcome at one parameter, the mean over the trainings; None never halts."""
        if parameter is None:
            return never_outcome(self.traces)
        outcomes = [
            halt_outcome(self.traces, policy.halts(signal, parameter), self.probing)
            for policy, signal in zip(self.policies, self.signals, strict=True)
        ]
        return outcomes[0] if len(outcomes) == 1 else average(outcomes)

    def sweep(self) -> dict[float, Outcome]:
        """Returns, by parameter, the outcomes over the grid of the first training."""
        grid = self.policies[0].grid(self.signals[0])
        return {parameter: self.outcome(parameter) for parameter in grid}


def parameter_free(traces: Traces, probing: Probing) -> dict[str, Outcome]:
    """Returns, by name, the outcomes of the rules that have no number."""
    return {
        rule.name: never_outcome(traces)
        if rule.halts is None
        else halt_outcome(traces, rule.halts(traces), probing)
        for rule in RULES
    }


def swept(
    policies: Sequence[Policy], traces: Traces, probing: Probing
) -> dict[float, Outcome] | None:
    """Returns, by parameter, the outcomes of a policy, or of several trainings of one.

    They are over the grid of the first; None if the policy is not available.
    """
    played = _Played.of(policies, traces, probing)
    return None if played is None else played.sweep()
