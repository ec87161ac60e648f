"""Reads a policy's frontier: what it saves at an EM, and its EM on an allowance of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import Float, Resamples
from evaluation.outcome import Outcome, em_delta, saving
from traces import Traces

#: The floor of `frontier_area`, an EM change: a larger loss is too large for any saving.
AREA_FLOOR = -0.05

# Means over several trainings that are equal differ by less.
_ROUNDING = 1e-12


def saving_at_em(points: Sequence[tuple[float, float]], em_delta: float) -> float | None:
    """Returns the saving of a policy's frontier at some EM change, see `frontier_savings`.

    Args:
        points: The EM change and the saving of each parameter.
        em_delta: The EM change at which to read the frontier.

    Returns:
        The saving; None if the policy does not reach that EM at all.
    """
    deltas, savings = np.array([*points, (0.0, 0.0)]).T[:, :, None]
    if em_delta > deltas.max() + _ROUNDING:
        return None
    return float(frontier_savings(deltas, savings, np.array([em_delta], dtype=float))[0])


def frontier_savings(em_delta: Float, saving: Float, at: Float) -> Float:
    """Returns the saving (R,) of a policy's frontier at some EM change, in each of R samples.

    The frontier is made of the points that no other one beats in both EM and saving; never
    halting, at (0, 0), is one of the candidates. Between neighbours it is a straight line. Below
    its lowest EM its largest saving holds. Above its highest EM the saving there holds, which
    favours the policy: it does not have the EM that it is compared at.

    Args:
        em_delta: (K, R) the EM change at each of K parameters.
        saving: (K, R) the saving at each of them.
        at: (R,) the EM change at which to read the frontier.
    """
    never = np.zeros((1, len(at)))
    em_delta, saving = np.concatenate([em_delta, never]), np.concatenate([saving, never])
    # The neighbours: of the points with that EM, the one that saves most; of those without it that
    # save more, the one with the highest EM. Nothing beats either, so no sorting is needed.
    reaches = em_delta >= at - _ROUNDING
    upper_saving = _largest(saving, reaches)
    upper_em = _largest(em_delta, reaches & (saving == upper_saving))
    saves_more = ~reaches & (saving > upper_saving)
    lower_em = _largest(em_delta, saves_more)
    lower_saving = _largest(saving, saves_more & (em_delta == lower_em))
    # Where one is missing, the other holds.
    no_upper, no_lower = np.isinf(upper_em), np.isinf(lower_em)
    upper_em, upper_saving = np.where(no_upper, (lower_em, lower_saving), (upper_em, upper_saving))
    lower_em, lower_saving = np.where(no_lower, (upper_em, upper_saving), (lower_em, lower_saving))
    width = upper_em - lower_em
    share = np.divide(at - lower_em, width, out=np.zeros_like(at), where=width > 0)
    savings: Float = lower_saving + np.minimum(share, 1) * (upper_saving - lower_saving)
    return savings


def savings_at_losses(
    traces: Traces, outcomes: Sequence[Outcome], losses: Sequence[float], drawn: Resamples
) -> tuple[Float, Float]:
    """Returns what a policy's frontier saves where L losses of EM are allowed.

    Args:
        traces: N traces.
        outcomes: What each parameter comes to on them.
        losses: (L,) the losses, as shares.
        drawn: R resamples of the traces' questions.

    Returns:
        The savings (L,), 0 where the policy does not reach that EM, and those in each resample
        (L, R).
    """
    points = [(em_delta(traces, one), saving(traces, one)) for one in outcomes]
    again = drawn.of(traces, outcomes)
    at = np.ones(again.saving.shape[1])
    each = [frontier_savings(again.em_delta, again.saving, -loss * at) for loss in losses]
    savings = [saving_at_em(points, -loss) or 0.0 for loss in losses]
    return np.array(savings), np.array(each)


def _largest(values: Float, among: NDArray[np.bool_]) -> Float:
    """Returns the largest (R,) of the values (K, R) in a mask, minus infinity if it is empty."""
    largest: Float = values.max(axis=0, where=among, initial=-np.inf)
    return largest


def frontier_area(points: Sequence[tuple[float, float]], floor: float) -> float:
    """Returns the mean EM above a floor over allowances of tokens, from none to never halting's.

    An allowance buys the best EM among the parameters that spend no more on average, and counts
    by how far that is above the floor; what is below it is of no use at any saving. This is the
    hypervolume (Zitzler and Thiele, 1999) of the points (tokens as a share of never halting's, EM
    change) against the corner (1, floor). Never halting itself, at (1, 0), would add nothing.

    Args:
        points: The EM change and the saving of each parameter.
        floor: The EM change at and below which nothing counts.
    """
    spent = [(1 - saving, em_delta) for em_delta, saving in points]
    return float(moocore.hypervolume(spent, ref=[1, floor], maximise=[False, True]))


def swept_area(traces: Traces, swept: Mapping[float, Outcome]) -> float:
    """Returns the area under the frontier of a policy's outcomes by parameter."""
    points = [(em_delta(traces, at), saving(traces, at)) for at in swept.values()]
    return frontier_area(points, AREA_FLOOR)
