"""What a cascade is compared with: routers, confidence cascades, and hindsight.

Each has one number or two to tune. Where the large LM is halted, too, the price that it is halted
at is one more. Shapes: N pairs of traces, P points of the small LM's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from haltwise.policy.halting import Probing
from haltwise.policy.question import Question, QuestionReader
from policies.baselines import Budget, Confidence
from policies.course import AT_END, AT_START, Bills, Course, LargeAnswers, Parameter
from policies.head import HeadPolicy
from traces import Pairs

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

_Scores = NDArray[np.float64]

# Words of questions that a router tells apart, at most, and the fewest questions that have one.
_NUM_WORDS, _FEWEST = 200, 10
# Numbers to try of each kind.
_NUM_SCORES, _NUM_CONFIDENCES = 40, 40


@dataclass(frozen=True)
class Always:
    """Lets one of the two LMs answer everything, the small one to its end."""

    name: str
    """always_small or always_large."""
    large_prices: Sequence[float]
    """The prices that the large LM may be halted at."""

    probing: ClassVar[Probing] = "at_halt"

    def signal(self, pairs: Pairs) -> None:
        """Looks at nothing."""

    def grid(self, signal: None) -> list[Parameter]:
        """Returns the prices that the large LM is halted at."""
        choices = self.large_prices if self.name == "always_large" else self.large_prices[:1]
        return [(price,) for price in choices]

    def course(self, pairs: Pairs, signal: None, parameter: Parameter) -> Course:
        """Leaves all questions to one LM."""
        large = np.full(len(pairs), self.name == "always_large")
        return Course(np.where(large, AT_START, AT_END), large)

    def large_price(self, parameter: Parameter) -> float:
        """Returns the price that the large LM is halted at."""
        return parameter[-1]


def _logistic() -> ClassifierMixin:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=1000)


def _boosted_trees() -> ClassifierMixin:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.05, max_leaf_nodes=8, random_state=0
    )


_MODELS: dict[str, Callable[[], ClassifierMixin]] = {
    "logistic": _logistic,
    "boosted_trees": _boosted_trees,
}

#: The models that a router may be.
ROUTERS = tuple(_MODELS)


@dataclass(frozen=True)
class Router:
    """Scores questions by what is known of them before the first token.

    The score is how much likelier the large LM is to be right than the small one, by two
    classifiers of task, segment, counts of the text, and its words.
    """

    model: str
    """One of ROUTERS."""
    learned: Pairs
    """The pairs that it learns from."""
    fold: Mapping[str, int] = field(default_factory=dict)
    """By question id, the fold that keeps the question back."""

    def scores(self, pairs: Pairs) -> _Scores:
        """Returns the score (N,) of each question, by a model that never saw it."""
        fold = _folds_of(pairs, self.fold)
        own = _folds_of(self.learned, self.fold)
        scores = np.zeros(len(pairs))
        for k in np.unique(fold):
            learned = self.learned.select(own != k) if k >= 0 else self.learned
            rows = fold == k
            read = reading(learned.questions)
            seen = read(learned.questions)
            asked = read([pairs.questions[n] for n in np.flatnonzero(rows)])
            large, small = (
                self._prob(seen, right, asked)
                for right in (learned.large.final_correct, learned.small.final_correct)
            )
            scores[rows] = large - small
        return scores

    def _prob(self, seen: _Scores, right: NDArray[np.bool_], asked: _Scores) -> _Scores:
        """Returns the probability (n,) of being right, learned from what is `right`."""
        if right.all() or not right.any():
            return np.full(len(asked), float(right.all()))
        prob: _Scores = _MODELS[self.model]().fit(seen, right).predict_proba(asked)[:, 1]
        return prob


@dataclass(frozen=True)
class Routed:
    """Escalates questions before the first token, by a router's score.

    The small LM answers the others to its end, or is halted by its head: then the head's price is a
    second number.
    """

    router: Router
    large_prices: Sequence[float]
    """The prices that the large LM may be halted at."""
    head: HeadPolicy | None = None

    @property
    def name(self) -> str:
        """The policy's name, with the model's."""
        return f"router_{self.router.model}" + ("" if self.head is None else "_head")

    @property
    def probing(self) -> Probing:
        """How the small LM is probed."""
        return "at_halt" if self.head is None else self.head.head.config.halting.probing

    def signal(self, pairs: Pairs) -> Any:
        """Returns the scores (N,), and by price of the head the course of what stays."""
        return self.router.scores(pairs), _head_courses(self.head, pairs)

    def grid(self, signal: Any) -> list[Parameter]:
        """Returns quantiles of the scores, with every price of the head and of the large LM."""
        scores, courses = signal
        bars = [*np.unique(np.quantile(scores, np.linspace(0, 1, _NUM_SCORES))).tolist(), np.inf]
        return list(product(bars, courses, self.large_prices))

    def course(self, pairs: Pairs, signal: Any, parameter: Parameter) -> Course:
        """Escalates questions with a score of at least the first number."""
        scores, courses = signal
        course: Course = courses[parameter[1]]
        return course.routed(scores >= parameter[0])

    def large_price(self, parameter: Parameter) -> float:
        """Returns the price that the large LM is halted at."""
        return parameter[-1]


@dataclass(frozen=True)
class ConfidenceCascade:
    """Escalates answers of the small LM that it is not sure enough of.

    It is halted at the first answer that is surer than the first number, or by its head at that
    price. Where it is halted, or has ended by itself, the question is escalated if the confidence
    in the last forced answer is below the second number. An unknown confidence is below any.
    """

    large_prices: Sequence[float]
    """The prices that the large LM may be halted at."""
    head: HeadPolicy | None = None

    @property
    def name(self) -> str:
        """The policy's name."""
        return "confidence_cascade" + ("" if self.head is None else "_head")

    @property
    def probing(self) -> Probing:
        """It looks at answers at every point."""
        return "always"

    def signal(self, pairs: Pairs) -> Any:
        """Returns the confidence (P,), and by the first number the course without escalation."""
        small = pairs.small
        confidence = Confidence().signal(small)
        if confidence is None:
            confidence = np.full(small.num_points, -1.0)
        if self.head is not None:
            return confidence, _head_courses(self.head, pairs)
        bars = [*(1 - np.logspace(0, -5, _NUM_CONFIDENCES)).tolist(), 1.0]
        nothing = np.zeros(small.num_points, dtype=bool), np.zeros(len(small), dtype=bool)
        return confidence, {
            bar: Course.of_points(small, confidence > bar, *nothing) for bar in bars
        }

    def grid(self, signal: Any) -> list[Parameter]:
        """Returns every first number with levels of the confidence, none and all included."""
        confidence, courses = signal
        levels = np.concatenate([np.linspace(0, 1, 20), 1 - np.logspace(-0.3, -5, 20)])
        known = confidence[confidence >= 0]
        bars = np.unique(np.quantile(known, levels)).tolist() if len(known) else []
        return list(product(courses, [-np.inf, *bars, np.inf], self.large_prices))

    def course(self, pairs: Pairs, signal: Any, parameter: Parameter) -> Course:
        """Escalates where the last confidence is below the second number."""
        confidence, courses = signal
        course: Course = courses[parameter[0]]
        small = pairs.small
        last = np.where(course.point >= 0, course.point, small.offsets[1:] - 1)
        has_any = np.diff(small.offsets) > 0
        known = np.full(len(small), -1.0)
        known[has_any] = confidence[last[has_any]]
        return Course(course.point, known < parameter[1])

    def large_price(self, parameter: Parameter) -> float:
        """Returns the price that the large LM is halted at."""
        return parameter[-1]


@dataclass(frozen=True)
class Halted:
    """Lets the small LM answer everything, halted by its head."""

    head: HeadPolicy

    name: ClassVar[str] = "head"

    @property
    def probing(self) -> Probing:
        """How the head probes."""
        return self.head.head.config.halting.probing

    def signal(self, pairs: Pairs) -> dict[float, Course]:
        """Returns the course at each price."""
        return _head_courses(self.head, pairs)

    def grid(self, signal: dict[float, Course]) -> list[Parameter]:
        """Returns the prices."""
        return [(price,) for price in signal]

    def course(self, pairs: Pairs, signal: dict[float, Course], parameter: Parameter) -> Course:
        """Returns the course at a price."""
        return signal[parameter[0]]

    def large_price(self, parameter: Parameter) -> float:
        """The large LM answers nothing: any price will do."""
        return parameter[0]


@dataclass(frozen=True)
class Capped:
    """Lets the small LM answer everything, on a budget of thinking tokens."""

    name: ClassVar[str] = "budget"
    probing: ClassVar[Probing] = "at_halt"

    def signal(self, pairs: Pairs) -> Any:
        """Returns the position (P,) of every point."""
        return Budget().signal(pairs.small)

    def grid(self, signal: Any) -> list[Parameter]:
        """Returns the budgets."""
        return [(budget,) for budget in Budget().grid(signal)]

    def course(self, pairs: Pairs, signal: Any, parameter: Parameter) -> Course:
        """Returns the course at a budget."""
        small = pairs.small
        nothing = np.zeros(small.num_points, dtype=bool), np.zeros(len(small), dtype=bool)
        return Course.of_points(small, Budget().halts(signal, parameter[0]), *nothing)

    def large_price(self, parameter: Parameter) -> float:
        """The large LM answers nothing: any price will do."""
        return parameter[0]


@dataclass(frozen=True)
class Hindsight:
    """Does what is best at a price, which only the gold answers tell: a bound."""

    answers: Callable[[Pairs], LargeAnswers]
    """Tells what the large LM answers to some pairs."""
    price_ratio: float
    prices: Sequence[float]
    probing: Probing

    name: ClassVar[str] = "oracle"

    def signal(self, pairs: Pairs) -> LargeAnswers:
        """Looks at the large LM's answers."""
        return self.answers(pairs)

    def grid(self, signal: LargeAnswers) -> list[Parameter]:
        """Returns the prices."""
        return [(price,) for price in self.prices]

    def course(self, pairs: Pairs, signal: LargeAnswers, parameter: Parameter) -> Course:
        """Returns the course with the largest return of each question.

        Escalating pays best before the first token: nothing is learned later that is not known.
        """
        (price,), answers = parameter, signal
        bills, small = Bills.of(pairs.small, self.probing), pairs.small
        at = answers.nearest(price * self.price_ratio)
        large = answers.em[at] - price * self.price_ratio * answers.cost[at] / 1000
        at_end = bills.end_em - price * bills.end_cost / 1000
        at_points = bills.halt_em - price * bills.halt_cost / 1000
        best = np.maximum(large, at_end)
        np.maximum.at(best, small.trace_of_point, at_points)
        nothing = np.zeros(small.num_points, dtype=bool), np.zeros(len(small), dtype=bool)
        leaves = at_points >= best[small.trace_of_point]
        return Course.of_points(small, leaves, *nothing).routed(large >= best)

    def large_price(self, parameter: Parameter) -> float:
        """Returns what a token of the large LM costs at a price."""
        return parameter[0] * self.price_ratio


def _head_courses(head: HeadPolicy | None, pairs: Pairs) -> dict[float, Course]:
    """Returns, by price of a head, the course without escalation; without a head by no price."""
    small = pairs.small
    nothing = np.zeros(small.num_points, dtype=bool), np.zeros(len(small), dtype=bool)
    if head is None:
        return {0.0: Course.of_points(small, nothing[0], *nothing)}
    signal = head.signal(small)
    courses = {}
    for price in head.grid(signal)[::2]:
        courses[price] = Course.of_points(small, head.halts(signal, price), *nothing)
    return courses


def reading(questions: Sequence[Question]) -> Callable[[Sequence[Question]], _Scores]:
    """Returns what turns questions into numbers, with the words that are frequent among some.

    The first number is always 1: of some questions nothing is known.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    reader = QuestionReader.fit(questions)
    words = CountVectorizer(token_pattern=r"\S+", max_features=_NUM_WORDS, min_df=_FEWEST)
    try:
        words.fit([question.text for question in questions])
    except ValueError:  # no word is in so many questions, or no text is known
        words = None

    def read(asked: Sequence[Question]) -> _Scores:
        parts: list[NDArray[Any]] = [np.ones((len(asked), 1)), reader.read(asked)]
        if words is not None:
            counts = words.transform([question.text for question in asked])
            parts.append(np.log1p(counts.toarray()))
        return np.concatenate(parts, axis=1)

    return read


def _folds_of(pairs: Pairs, fold: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the fold (N,) that keeps each pair's question back, -1 where none does."""
    return np.array([fold.get(name, -1) for name in pairs.small.question_id.tolist()])
