"""Episodes on a running LM, which `HaltEnv` and `LiveEnv` share.

`EpisodeSeries` says which question is asked next, `LiveEpisodes` lets the LM think about some of
them at once, and a `LiveEpisode` is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.reward import reward
from envs.series import ShuffledPasses, check_price
from haltwise import FeatureState, Halting, InputError, Observing
from haltwise.policy.signals import Index
from haltwise.session.thought import Probe
from lms.language_model import LanguageModel
from lms.questions import Question

#: An environment gives up after so many questions in a row without a decision point.
MAX_MISSES = 200


@dataclass
class LiveEpisode:
    """One question at one price, as far as the LM has thought about it."""

    question: Question
    seed: int
    """The seed that the LM samples with."""
    price: float
    """The price of tokens, in exact match per 1,000."""
    num_points: int = 0
    """Decision points that have been observed."""
    position: int = 0
    """Thinking tokens at the newest point."""
    probe: Probe | None = None
    """The forced answer at the newest point, if anybody looked."""
    owed: int = 0
    """Tokens that were generated and that no step has paid for yet."""
    cost: int = 0
    """Tokens that steps have paid for."""
    answer: str = ""
    """The answer that counts, once the episode is over."""
    em: bool = False
    """Whether that answer is right."""
    halted: bool = False
    """Whether the policy ended it, and not the LM or the token budget."""

    def pay(self) -> float:
        """Pays for all tokens that are owed; returns the reward since the last payment."""
        self.cost, owed, self.owed = self.cost + self.owed, self.owed, 0
        return float(reward(self.em, owed, self.price))

    def conclude(self, answer: str) -> None:
        """Compares the answer that counts with the gold answer."""
        self.answer, self.em = answer, self.question.is_right(answer)

    def info(self) -> dict[str, Any]:
        """Returns what is told of the episode once it is over; see `envs.single.SingleEnv`."""
        return {
            "em": self.em,
            "cost": self.cost,
            "halted": self.halted,
            "price": self.price,
            "question_id": self.question.question_id,
            "seed": self.seed,
            "answer": self.answer,
            "num_points": self.num_points,
            "position": self.position,
        }


class EpisodeSeries:
    """An endless series of live episodes.

    The questions come in shuffled passes over all of them. Each episode has a random seed and a
    price.

    Args:
        questions: The questions to ask.
        observing: Prices are drawn log-uniformly from its range.
        price: A fixed price for every episode; None draws one for each.

    Raises:
        InputError: If there is no question, a gold answer cannot be read, or the price is not
            positive and finite.
    """

    def __init__(
        self, questions: Sequence[Question], observing: Observing, price: float | None
    ) -> None:
        """Checks the questions."""
        check_price(price)
        if not questions:
            raise InputError("no questions: an environment needs at least one")
        for question in questions:
            try:
                question.is_right("")
            except ValueError as error:
                raise InputError(f"question {question.question_id}: {error}") from None
        self._questions = list(questions)
        self._passes = ShuffledPasses(np.arange(len(questions)))
        self._observing = observing
        self._price = price

    def restart(self) -> None:
        """Drops what is left of the current pass: the next episode begins a new one."""
        self._passes.restart()

    def next(self, rng: np.random.Generator, price: float | None = None) -> LiveEpisode:
        """Returns the next episode, at the price that is named, if one is."""
        question = self._questions[int(self._passes.draw(rng, 1)[0])]
        seed = int(rng.integers(2**31))
        # A price is drawn in any case: to name one then leaves all later episodes as they are.
        drawn = float(self._observing.draw_price(rng, 1)[0])
        return LiveEpisode(question, seed, price or self._price or drawn)


class LiveEpisodes:
    """Runs episodes in the slots of one decoder, and keeps what each owes, observes and answers.

    Args:
        lm: The LM that thinks.
        halting: The decision rule, the close text, and whether answers are forced at every point.
        observing: How features become observations.
        num_slots: S, the number of slots: so many episodes run at once.
        max_tokens: The token budget of a question, its answer included.
        temperature: The temperature of sampling; 0 always takes the likeliest token, None is the
            LM's own.

    Raises:
        InputError: If the LM cannot be run so, or the features need answers that nobody forces.
    """

    def __init__(
        self,
        lm: LanguageModel,
        halting: Halting,
        observing: Observing,
        num_slots: int,
        max_tokens: int,
        temperature: float | None,
    ) -> None:
        """Starts with every slot empty."""
        from haltwise.engine.decoder import Decoder

        halting.check_groups(observing.groups)
        self._lm = lm
        self._probes = halting.probing == "always"
        self._decoder = Decoder(
            lm.model,
            lm.tokenizer,
            halting,
            num_slots,
            max_tokens,
            lm.temperature if temperature is None else temperature,
            signals=observing.signals,
        )
        self._observing = observing
        self._state = FeatureState(num_slots, observing.groups, observing.projection)
        self.episodes: dict[int, LiveEpisode] = {}
        #: (S, F + 1) the observation at each slot's newest decision point.
        self.obs = np.zeros((num_slots, observing.size), dtype=np.float32)

    def begin(self, slots: Index, episodes: Sequence[LiveEpisode]) -> None:
        """Puts new episodes into slots (B,)."""
        prompts = [self._lm.prompt(episode.question.text) for episode in episodes]
        self._decoder.start(slots, prompts, [episode.seed for episode in episodes])
        self._state.reset(slots)
        self.episodes.update(zip(slots.tolist(), episodes, strict=True))

    def halt(self, slots: Index) -> None:
        """Ends the episodes of slots (B,) with the forced answers of their newest points."""
        if not self._probes:
            self._force(slots)
        for slot in slots.tolist():
            episode = self.episodes[slot]
            assert episode.probe is not None
            episode.halted = True
            episode.conclude(episode.probe.answer)

    def run(self, slots: Index) -> NDArray[np.bool_]:
        """Lets the LM think in slots (B,) until each is at its next decision point or has ended.

        Returns:
            Whether each is at a point (B,); the episodes of the others are over.
        """
        at_point = np.zeros(len(slots), dtype=bool)
        going = np.arange(len(slots))
        while len(going):
            at_point[going] = self._decoder.advance(slots[going])
            ended = [self._decoder.thoughts[slot].ended for slot in slots[going].tolist()]
            going = going[~(at_point[going] | ended)]
        for slot, pauses in zip(slots.tolist(), at_point, strict=True):
            episode, thought = self.episodes[slot], self._decoder.thoughts[slot]
            generated = thought.position if pauses else thought.num_tokens
            episode.owed += generated - episode.position
            if pauses:
                episode.position = generated
                episode.num_points += 1
            else:
                episode.conclude(self._decoder.rules.read_answer(thought.answer_text()))
        self._observe(slots[at_point])
        return at_point

    def _force(self, slots: Index) -> list[Probe]:
        """Forces the answers of slots (B,) at their newest points; the episodes owe their tokens.

        Returns:
            The forced answer of each slot.
        """
        probes = self._decoder.force(slots)
        for slot, probe in zip(slots.tolist(), probes, strict=True):
            self.episodes[slot].probe = probe
            self.episodes[slot].owed += probe.num_tokens
        return probes

    def _observe(self, slots: Index) -> None:
        """Writes the observations of slots (B,), which are at decision points, into `obs`."""
        probes = self._force(slots) if self._probes else None
        signals = self._decoder.signals(slots, probes)
        if signals.answer is not None:
            for slot, key in zip(slots.tolist(), signals.answer.tolist(), strict=True):
                self._decoder.thoughts[slot].answered(key)
        features = self._state.update(signals, slots)
        prices = np.array([self.episodes[slot].price for slot in slots.tolist()])
        self.obs[slots] = self._observing.observe(features, prices)


def no_points(num: int) -> InputError:
    """Returns the error to raise when `num` questions in a row had no decision point."""
    return InputError(
        f"{num} questions in a row ended before their first decision point: "
        "expected a decision rule that fits the LM's thoughts"
    )
