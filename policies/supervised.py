"""Supervised baselines, which learn how probably the forced answer is right and threshold that.

They are the strongest of the simple policies: they see the same features as the head, learn from
the same traces by scikit-learn, and are calibrated. The models are not stored: they are fitted
again from the traces that the run learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from haltwise import HeadConfig, Observing
from haltwise.policy.signals import Float
from policies.observing import observing_of
from policies.policy import Halts
from traces import Traces

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator, ClassifierMixin

_CALIBRATION_FOLDS = 3
# So many questions must have a right answer, and so many a wrong one. Then some of either are in
# every one of five folds, and again in every one of the three for calibration.
_MIN_QUESTIONS = 10
# Stands for the probability at a point where a feature is unknown: no threshold is as low.
_UNKNOWN = -1.0


@dataclass(frozen=True)
class _Kind:
    """A kind of classifier, with its readable name and its sentence for the page."""

    title: str
    sentence: str
    estimator: Callable[[], BaseEstimator]


def _logistic() -> BaseEstimator:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=1000)


def _boosted_trees() -> BaseEstimator:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(early_stopping=False, random_state=0)


_KINDS = {
    "logistic": _Kind(
        "logistic regression",
        "A linear classifier of the head's features: halts where the answer is likely right.",
        _logistic,
    ),
    "boosted_trees": _Kind(
        "boosted trees",
        "A tree classifier of the head's features: halts where the answer is likely right.",
        _boosted_trees,
    ),
}

#: By name, the readable name and the sentence of every supervised baseline.
SUPERVISED = {name: (kind.title, kind.sentence) for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Supervised:
    """Halts at the first point whose answer is right with a probability of `parameter` or more.

    Probabilities are calibrated by isotonic regression on predictions for questions that were
    kept back (Zadrozny and Elkan, KDD 2002).
    """

    name: str
    """The policy's name, one of SUPERVISED."""
    learned: Traces
    """The labelled traces that the models are fitted on."""
    fold: Mapping[str, int]
    """By question id, the fold that keeps the question back, so that it is judged by a model that
    never saw it. A question that is not named is judged by a model of all traces."""
    config: HeadConfig
    """The head's config, which names its features and the conditions of halting."""

    probes = False  # its features are the head's, which fit the head's probing

    @property
    def title(self) -> str:
        """The policy's readable name, for the page and its figures."""
        return _KINDS[self.name].title

    @property
    def sentence(self) -> str:
        """What the policy does, in a sentence for the page."""
        return _KINDS[self.name].sentence

    def signal(self, traces: Traces) -> NDArray[np.float64] | None:
        """Returns the probability (P,) that the forced answer is right, -1 where it is unknown.

        It is None if fewer than 10 of the questions to learn from have a right answer, or fewer
        than 10 a wrong one.

        Raises:
            InputError: If the traces lack a signal that the features need.
        """
        for right in (True, False):
            points = self.learned.trace_of_point[self.learned.correct == right]
            if len(np.unique(self.learned.question_id[points])) < _MIN_QUESTIONS:
                return None
        fold = _folds_of(traces, self.fold)
        own = _folds_of(self.learned, self.fold)
        signal = np.empty(traces.num_points)
        for k in np.unique(fold[np.diff(traces.offsets) > 0]):
            learned = self.learned.select(own != k) if k >= 0 else self.learned
            observing = observing_of(learned, self.config.observing.groups, self.config.halting)
            model = self._fit(learned, self._observe(learned, observing))
            rows = fold == k
            obs = self._observe(traces.select(rows), observing)
            sound = np.isfinite(obs).all(axis=1)
            prob = np.full(len(obs), _UNKNOWN)
            prob[sound] = model.predict_proba(obs[sound])[:, 1] if sound.any() else 0.0
            signal[rows[traces.trace_of_point]] = prob
        return signal

    def grid(self, signal: NDArray[np.float64]) -> list[float]:
        """Returns up to 200 quantiles of the probabilities, dense near the largest."""
        levels = 1 - np.logspace(0, -4, 200)
        quantiles: list[float] = np.unique(np.quantile(signal[signal >= 0], levels)).tolist()
        return quantiles

    def halts(self, signal: NDArray[np.float64], parameter: float) -> Halts:
        """Halts (P,) where the probability is at least `parameter`."""
        return signal >= parameter

    def _observe(self, traces: Traces, observing: Observing) -> Float:
        """Returns standardised features (P, F)."""
        features = observed_features(traces, observing, self.config.halting)
        return observing.observe(features, 1.0)[:, :-1]

    def _fit(self, traces: Traces, obs: Float) -> ClassifierMixin:
        """Fits a calibrated model of whether the answer at a point is right.

        Args:
            traces: Labelled traces with P points.
            obs: Their standardised features (P, F).
        """
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.model_selection import StratifiedGroupKFold

        question = np.unique(traces.question_id, return_inverse=True)[1][traces.trace_of_point]
        sound = np.isfinite(obs).all(axis=1)
        obs, right, question = obs[sound], traces.correct[sound], question[sound]
        folds = StratifiedGroupKFold(_CALIBRATION_FOLDS).split(obs, right, question)
        model = CalibratedClassifierCV(
            _KINDS[self.name].estimator(), method="isotonic", cv=list(folds), ensemble=False
        )
        return model.fit(obs, right)


def _folds_of(traces: Traces, fold: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the fold (N,) that keeps each trace's question back, -1 where none does."""
    return np.array([fold.get(question_id, -1) for question_id in traces.question_id.tolist()])
