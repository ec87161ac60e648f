"""Simple policies to compare a head with.

A baseline is one class here, which says its name, its words for the page, what it looks at and
when it halts, and has its place in BASELINES. Shapes: N traces, P points of all of them.
"""

from __future__ import annotations

import numpy as np

from envs.replay import point_features
from haltwise import feature_names
from policies.policy import Halts, Policy, Signal
from traces import Traces

# EAT's weight of the newest value in its moving mean and variance, and the number of the first
# point at which it may halt.
_EAT_WEIGHT, _EAT_WARM_UP = 0.2, 4


# Probabilities of being wrong are told apart down to this: half of what float32 sees beside 1.
_LEAST = 2.0**-25


class Budget:
    """Halts at the first point with at least `parameter` thinking tokens."""

    name = "budget"
    title = "token budget"
    sentence = "Halts after a fixed number of thinking tokens."
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """Returns the position (P,), in thinking tokens."""
        return traces.position

    def grid(self, signal: Signal) -> list[float]:
        """Returns up to 60 quantiles of the positions."""
        quantiles: list[float] = np.unique(np.quantile(signal, np.linspace(0, 1, 60))).tolist()
        return quantiles

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the position is at least `parameter`."""
        halts: Halts = signal >= parameter
        return halts


class Confidence:
    """Halts at the first answer whose confidence is above `parameter`."""

    name = "confidence"
    title = "confidence threshold"
    sentence = "Halts at the first forced answer that the LM is sure enough of."
    probes = True

    def signal(self, traces: Traces) -> Signal | None:
        """Returns the LM's confidence in the forced answer (P,).

        It is -1 where there is no answer or the confidence is unknown; None if none is known.
        """
        if np.isnan(traces.confidence).all():
            return None
        known = (traces.answer != "") & ~np.isnan(traces.confidence)
        return np.where(known, traces.confidence.astype(np.float64), -1.0)

    def grid(self, signal: Signal) -> list[float]:
        """Returns 200 thresholds from 0 to 1 - 1e-6, dense near 1."""
        thresholds: list[float] = (1 - np.logspace(0, -6, 200)).tolist()
        return thresholds

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the confidence is above `parameter`."""
        halts: Halts = signal > parameter
        return halts


class _AtMost:
    """Halts at the first point where a signal (P,) is at most `parameter`."""

    def grid(self, signal: Signal) -> list[float]:
        """Returns up to 200 quantiles of the finite values of the signal."""
        known = signal[np.isfinite(signal)]
        quantiles: list[float] = np.unique(np.quantile(known, np.linspace(0, 1, 200))).tolist()
        return quantiles

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the signal is at most `parameter`."""
        halts: Halts = signal <= parameter
        return halts


class AnswerEntropy(_AtMost):
    """Halts at the first answer whose entropy, in nats a token, is at most `parameter`."""

    name = "answer_entropy"
    title = "answer entropy"
    sentence = "Halts where the LM's distribution over the forced answer's tokens is narrow enough."
    probes = True

    def signal(self, traces: Traces) -> Signal | None:
        """Returns the entropy of the forced answer (P,), in nats a token.

        It is infinite where there is no answer or the entropy is unknown; None if none is known.
        """
        known = (traces.answer != "") & ~np.isnan(traces.answer_entropy)
        return np.where(known, traces.answer_entropy, np.inf) if known.any() else None


class Entropy(_AtMost):
    """Halts at the first point where the thought has been certain enough.

    That is where the entropy of the LM's next-token distribution, in the mean since the point
    before, is at most `parameter`, in nats.
    """

    name = "entropy"
    title = "entropy threshold"
    sentence = "Halts where the LM's distribution over the thought's next token is narrow enough."
    probes = False

    def signal(self, traces: Traces) -> Signal | None:
        """Returns the mean entropy since the point before (P,), in nats.

        It is infinite where it is unknown; None if it is known nowhere.
        """
        entropy = traces.signals.get("entropy")
        if entropy is None or np.isnan(entropy).all():
            return None
        return np.where(np.isnan(entropy), np.inf, entropy.astype(np.float64))


class EntropyVariance(_AtMost):
    """Halts at the first point where the entropy that `Entropy` looks at has ceased to vary.

    That is where its moving variance is at most `parameter`, in nats squared. EAT (Wang et al.,
    arXiv 2509.26522) does the same with the entropy after the close text, which traces do not
    hold. With an entropy x at a point, the mean is m += w (x - m) and the variance
    v += w ((x - m)^2 - v), from m = x and v = 0 at the first point, with w = 0.2. It does not halt
    before the fourth point, while v is still small. Points of unknown entropy are passed over.
    """

    name = "entropy_variance"
    title = "entropy variance"
    sentence = "Halts where the entropy of the thought's next token has ceased to vary."
    probes = False

    def signal(self, traces: Traces) -> Signal | None:
        """Returns the moving variance (P,), in nats squared.

        It is infinite where the policy may not halt; None if that is everywhere.
        """
        entropy = Entropy().signal(traces)
        if entropy is None:
            return None
        lengths = np.diff(traces.offsets)
        signal = np.full(traces.num_points, np.inf)
        mean, variance = np.zeros(len(traces)), np.zeros(len(traces))
        known = np.isfinite(entropy)
        num_known = np.zeros(len(traces), dtype=np.int64)
        for i in range(lengths.max(initial=0)):
            rows = np.flatnonzero(lengths > i)
            rows = rows[known[traces.offsets[rows] + i]]
            at = traces.offsets[rows] + i
            num_known[rows] += 1
            weight = np.where(num_known[rows] == 1, 1.0, _EAT_WEIGHT)
            mean[rows] += weight * (entropy[at] - mean[rows])
            variance[rows] += _EAT_WEIGHT * ((entropy[at] - mean[rows]) ** 2 - variance[rows])
            late = num_known[rows] >= _EAT_WARM_UP
            signal[at[late]] = variance[rows[late]]
        return signal if np.isfinite(signal).any() else None


class Stability:
    """Halts at the first answer that was forced `parameter` times in a row."""

    name = "stability"
    title = "answer stability"
    sentence = "Halts when the same answer has been forced often enough in a row."
    probes = True

    def signal(self, traces: Traces) -> Signal:
        """Returns how many equal answers in a row end at each point (P,); 0 for no answer."""
        column = feature_names(["agreement"]).index("log_run")
        return np.rint(np.expm1(point_features(traces, ("agreement",))[:, column]))

    def grid(self, signal: Signal) -> list[float]:
        """Returns 1 to 30 times."""
        return [float(times) for times in range(1, 31)]

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the answer was forced at least `parameter` times in a row."""
        halts: Halts = signal >= parameter
        return halts


class Evidence:
    """Halts at the first answer that is sure enough, often enough in a row.

    That is where logit(confidence) + 1.5 ln(times in a row) is above `parameter`: each repetition
    counts as more evidence for an answer, the more so the surer the LM is of it. Weights from 1 to
    2 do the same on the recordings that they were compared on.
    """

    name = "evidence"
    title = "evidence threshold"
    sentence = "Halts where confidence in the answer and its repetitions are together large enough."
    probes = True

    _WEIGHT = 1.5

    def signal(self, traces: Traces) -> Signal | None:
        """Returns the evidence for the forced answer (P,).

        It is minus infinite where there is no answer or the confidence is unknown; None if no
        confidence is known.
        """
        confidence = Confidence().signal(traces)
        if confidence is None:
            return None
        known = (confidence >= 0) & (confidence < 1)
        logit = np.full(len(confidence), -np.inf)
        logit[known] = np.log(np.maximum(confidence[known], _LEAST)) - np.log1p(-confidence[known])
        logit[confidence >= 1] = -np.log(_LEAST)  # float32 lies no closer to 1
        times = Stability().signal(traces)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.isfinite(logit), logit + self._WEIGHT * np.log(times), -np.inf)

    def grid(self, signal: Signal) -> list[float]:
        """Returns up to 200 quantiles of the finite values, dense near the largest."""
        known = signal[np.isfinite(signal)]
        levels = np.concatenate([np.linspace(0, 1, 100), 1 - np.logspace(0, -4, 100)])
        quantiles: list[float] = np.unique(np.quantile(known, levels)).tolist()
        return quantiles

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the evidence is above `parameter`."""
        halts: Halts = signal > parameter
        return halts


class Random:
    """Halts at each point with probability `parameter`; the control that looks at nothing."""

    name = "random"
    title = "random halting"
    sentence = "Halts by chance: the control that looks at nothing."
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """Returns a random number in [0, 1) for each point (P,), the same for the same traces."""
        return np.random.default_rng(0).random(traces.num_points)

    def grid(self, signal: Signal) -> list[float]:
        """Returns 60 probabilities from 1e-5 to 1, evenly spaced in their logarithm."""
        probabilities: list[float] = np.logspace(-5, 0, 60).tolist()
        return probabilities

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the random number is below `parameter`."""
        halts: Halts = signal < parameter
        return halts


#: Every simple policy, in the order of tables. The last one is the control, which is tuned to halt
#: as often as the head.
BASELINES: tuple[Policy, ...] = (
    Budget(),
    Confidence(),
    AnswerEntropy(),
    Entropy(),
    EntropyVariance(),
    Stability(),
    Evidence(),
    Random(),
)
