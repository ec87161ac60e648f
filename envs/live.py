"""The live environments: an LM thinks, and the policy decides at its decision points.

One question an episode. `HaltEnv` is the Gymnasium environment; `LiveEnv` plays many episodes in
one batch of the LM, with finished slots refilled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.batched import BatchedEnv, spaces
from envs.reward import reward
from haltwise import FeatureState, Halting, InputError, Observing
from haltwise.engine.decoder import Decoder
from haltwise.policy.features import signals_of
from haltwise.policy.signals import Float, Index
from haltwise.session.forced_answer import Probe
from lms.language_model import LanguageModel
from lms.questions import Question

# Questions in a row without a decision point before an environment gives up.
_MAX_MISSES = 200
_ENVS_PER_SPARE = 8
_ONLY = np.zeros(1, dtype=np.int64)


@dataclass
class Episode:
    """One question at one price."""

    question: Question
    seed: int
    """Of sampling."""
    price: float
    """Exact match per 1,000 tokens."""
    num_points: int = 0
    """Decision points so far."""
    position: int = 0
    """Of the newest point."""
    probe: Probe | None = None
    """The forced answer at the newest point, if anybody looked."""
    owed: int = 0
    """Tokens generated that no step has paid for."""
    cost: int = 0
    """Tokens paid for."""
    answer: str = ""
    """The one that counts, once the episode is over."""
    em: bool = False
    """Its exact match."""
    halted: bool = False

    def pay(self) -> float:
        """The reward for all that has happened since the last payment."""
        self.cost, owed, self.owed = self.cost + self.owed, self.owed, 0
        return float(reward(self.em, owed, self.price))

    def conclude(self, answer: str) -> None:
        """Compares the answer that counts with the gold answer."""
        self.answer, self.em = answer, self.question.is_right(answer)

    def info(self) -> dict[str, Any]:
        """What is told about an episode that is over."""
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


class Draws:
    """An endless series of episodes: shuffled passes over questions, each with a seed and a price.

    Args:
        questions: What to ask.
        observing: Prices are drawn log-uniformly from its range.
        price: A fixed price instead.

    Raises:
        InputError: If there is no question, a gold answer cannot be read, or the price is not
            positive and finite.
    """

    def __init__(
        self, questions: Sequence[Question], observing: Observing, price: float | None
    ) -> None:
        """Checks the questions."""
        _check_price(price)
        if not questions:
            raise InputError("no questions: an environment needs at least one")
        for question in questions:
            try:
                question.is_right("")
            except ValueError as error:
                raise InputError(f"question {question.question_id}: {error}") from None
        self.questions = list(questions)
        self._observing = observing
        self._price = price
        self._queue: deque[int] = deque()

    def seed(self, rng: np.random.Generator) -> None:
        """Begins a new series."""
        self._rng = rng
        self._queue.clear()

    def next(self, price: float | None = None) -> Episode:
        """The next episode, at some price if one is named."""
        _check_price(price)
        if not self._queue:
            self._queue.extend(self._rng.permutation(len(self.questions)).tolist())
        seed = int(self._rng.integers(2**31))
        drawn = float(self._observing.draw_price(self._rng, 1)[0])
        return Episode(self.questions[self._queue.popleft()], seed, price or self._price or drawn)


class Table:
    """Episodes in the slots of one decoder: what is owed, observed and answered.

    Args:
        lm: What thinks.
        halting: Decision rule, close text, and whether answers are forced at every point.
        observing: How features become observations.
        num_slots: Episodes at once.
        max_tokens: Token budget of a question.
        temperature: Of sampling; 0 is greedy.

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
        temperature: float,
    ) -> None:
        """Starts with every slot empty."""
        halting.check_groups(observing.groups)
        self._lm = lm
        self._probes = halting.probing == "always"
        self._decoder = Decoder(
            lm.model,
            lm.tokenizer,
            halting,
            num_slots,
            max_tokens,
            temperature,
            signals=signals_of(observing.groups),
        )
        self._observing = observing
        self._state = FeatureState(num_slots, observing.groups, observing.projection)
        self.episodes: dict[int, Episode] = {}
        #: (S, F + 1) at each slot's newest decision point.
        self.obs = np.zeros((num_slots, observing.size), dtype=np.float32)

    def begin(self, slots: Index, episodes: Sequence[Episode]) -> None:
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
            ended = [
                self._decoder.generations[slot].thought.ended for slot in slots[going].tolist()
            ]
            going = going[~(at_point[going] | ended)]
        for slot, pauses in zip(slots.tolist(), at_point, strict=True):
            episode, generation = self.episodes[slot], self._decoder.generations[slot]
            generated = generation.thought.position if pauses else generation.thought.num_tokens
            episode.owed += generated - episode.position
            if pauses:
                episode.position = generated
                episode.num_points += 1
            else:
                episode.conclude(self._decoder.rules.read_answer(generation.thought.answer_text()))
        self._observe(slots[at_point])
        return at_point

    def _force(self, slots: Index) -> list[Probe]:
        probes = self._decoder.force(slots)
        for slot, probe in zip(slots.tolist(), probes, strict=True):
            self.episodes[slot].probe = probe
            self.episodes[slot].owed += probe.num_tokens
        return probes

    def _observe(self, slots: Index) -> None:
        probes = self._force(slots) if self._probes else None
        features = self._state.update(self._decoder.signals(slots, probes), slots)
        prices = np.array([self.episodes[slot].price for slot in slots.tolist()])
        self.obs[slots] = self._observing.observe(features, prices)


class LiveEnv(BatchedEnv):
    """Many episodes of halting a running LM, stepped together: `HaltEnv` in batches.

    One forward pass of the LM moves all episodes by a token. A finished episode starts anew in
    the same step. Some spare slots keep newcomers waiting at their first decision points, so that
    no step has to run the LM for a few of them alone.

    `infos["final_info"]` holds arrays (B,) of what `HaltEnv` tells about a finished episode, and
    `infos["final_obs"]` its last observation (B, F + 1); `infos["_final_info"]` and
    `infos["_final_obs"]` mark the finished ones.

    Args:
        lm: What thinks.
        questions: What to ask.
        halting: Decision rule, close text and probing.
        observing: How features become observations, and the price range.
        num_envs: Episodes in the batch.
        max_tokens: Token budget of a question.
        temperature: Of sampling; 0 is greedy. Default the LM's own.
        price: A fixed price instead of a random one an episode.

    Raises:
        InputError: If the questions or conditions cannot be used.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question],
        halting: Halting,
        observing: Observing,
        num_envs: int,
        max_tokens: int,
        temperature: float | None = None,
        price: float | None = None,
    ) -> None:
        """Prepares the LM; nothing is generated before `reset`."""
        super().__init__(observing, num_envs)
        self._num_slots = num_envs + num_envs // _ENVS_PER_SPARE
        temperature = lm.temperature if temperature is None else temperature
        self._table = Table(lm, halting, observing, self._num_slots, max_tokens, temperature)
        self._draws = Draws(questions, observing, price)

    @property
    def price(self) -> NDArray[np.float64]:
        """Of the episodes that are being played (B,), in exact match per 1,000 tokens."""
        return np.array([episode.price for episode in self._playing()])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Starts every episode anew; observations (B, F + 1)."""
        super().reset(seed=seed)
        self._draws.seed(self.np_random)
        self._free = list(range(self._num_slots))
        self._ready: deque[int] = deque()
        self._slots = np.empty(self.num_envs, dtype=np.int64)
        self._misses = 0
        self._seat(np.arange(self.num_envs))
        return self._table.obs[self._slots], {}

    def step(
        self, actions: Index
    ) -> tuple[Float, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Continues (0) or halts (1) every episode; actions (B,)."""
        table, slots, played = self._table, self._slots.copy(), self._playing()
        halted, last_obs = actions == 1, table.obs[slots]
        table.halt(slots[halted])
        rewards = np.array([episode.pay() for episode in played])
        self._free += slots[halted].tolist()
        over = halted.copy()
        over[~halted] = ~self._round(slots[~halted])
        ended = over & ~halted
        self._free += slots[ended].tolist()
        rewards[ended] += [played[i].pay() for i in np.flatnonzero(ended)]
        infos: dict[str, Any] = {}
        if over.any():
            told = [episode.info() for episode in played]
            final = {name: np.array([info[name] for info in told]) for name in told[0]}
            infos = {"final_info": final, "_final_info": over}
            infos |= {"final_obs": last_obs, "_final_obs": over}
            self._seat(np.flatnonzero(over))
        return table.obs[self._slots], rewards, over, np.zeros_like(over), infos

    def _playing(self) -> list[Episode]:
        return [self._table.episodes[slot] for slot in self._slots.tolist()]

    def _round(self, going: Index) -> NDArray[np.bool_]:
        """Runs some slots together with newcomers in all that are free.

        Returns:
            Whether each slot that was going is at a decision point.
        """
        fresh = np.array(self._free, dtype=np.int64)
        self._table.begin(fresh, [self._draws.next() for _ in fresh])
        at_point = self._table.run(np.concatenate([going, fresh]))
        arrived = at_point[len(going) :]
        self._ready.extend(fresh[arrived].tolist())
        self._free = fresh[~arrived].tolist()
        self._misses = 0 if arrived.any() else self._misses + len(fresh)
        if self._misses > _MAX_MISSES:
            raise _no_points(self._misses)
        return at_point[: len(going)]

    def _seat(self, envs: Index) -> None:
        """Gives envs (B,) the episodes that have waited longest."""
        while len(self._ready) < len(envs):
            self._round(np.empty(0, dtype=np.int64))
        for env in envs:
            self._slots[env] = self._ready.popleft()


class HaltEnv(gym.Env[NDArray[Any], np.int64]):
    """Halting a running LM: one question an episode.

    ## Description
    An LM thinks about a question. At every decision point the policy continues or halts; halting
    closes the thought and takes the answer that is forced there. The policy trades exact match
    (EM) for tokens at a price.

    ## Action space
    `Discrete(2)`: 0 continue, 1 halt.

    ## Observation space
    `Box(-5, 5)`, float32: the standardised features of all decision points so far, then the
    price. Which groups there are is up to `observing`; see `haltwise.FEATURE_GROUPS`.

    | Num | Observation | Group |
    |---|---|---|
    | 0-2 | log(1 + tokens so far), of points so far, of tokens since the last point | pace |
    | 3-7 | log-odds of confidence: newest, highest, mean, change; log of confidence | confidence |
    | 8-14 | whether answered, and how the answers so far agree | agreement |
    | last | log price: the price range maps to [-1, 1] | - |

    ## Rewards
    A step pays price / 1000 for each token generated since the previous point (the forced answer
    included when probing is "always"). Halting gains the EM of the forced answer (and pays for it
    when probing is "at_halt"); continuing at the last point pays for the rest and gains the EM of
    the LM's own answer. No discount: the return is EM - price * cost / 1000.

    ## Starting state
    The first decision point of a question drawn from a shuffled pass, at a price drawn
    log-uniformly from the observing's range. Questions without a decision point are skipped.

    ## Episode end
    Terminated by halting, by the LM's own end or by the token budget: each leaves an answer that
    counts. Never truncated. The last step's info holds em, cost, halted, price, question_id,
    seed, answer, num_points and position.

    ## Arguments
    As `LiveEnv`. `reset(options={"price": ...})` sets the price of one episode.

    Raises:
        InputError: If the questions or conditions cannot be used.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question],
        halting: Halting,
        observing: Observing,
        max_tokens: int,
        temperature: float | None = None,
        price: float | None = None,
    ) -> None:
        """Prepares the LM; nothing is generated before `reset`."""
        self.observation_space, self.action_space = spaces(observing)
        temperature = lm.temperature if temperature is None else temperature
        self._table = Table(lm, halting, observing, 1, max_tokens, temperature)
        self._draws = Draws(questions, observing, price)
        self._draws.seed(self.np_random)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Asks the next question, up to its first decision point."""
        super().reset(seed=seed)
        if seed is not None:
            self._draws.seed(self.np_random)
        options = options or {}
        if options.keys() - {"price"}:
            raise InputError(f"reset options {sorted(options)}: expected 'price' or none")
        for _ in range(_MAX_MISSES):
            episode = self._draws.next(options.get("price"))
            self._table.begin(_ONLY, [episode])
            if self._table.run(_ONLY)[0]:
                return self._table.obs[0].copy(), {}
        raise _no_points(_MAX_MISSES)

    def step(self, action: np.int64) -> tuple[Float, float, bool, bool, dict[str, Any]]:
        """Continues (0) or halts (1)."""
        episode, over = self._table.episodes[0], bool(action == 1)
        if over:
            self._table.halt(_ONLY)
        value = episode.pay()
        if not over and not self._table.run(_ONLY)[0]:
            over = True
            value += episode.pay()
        return self._table.obs[0].copy(), value, over, False, episode.info() if over else {}


def _no_points(num: int) -> InputError:
    return InputError(
        f"{num} questions in a row ended before their first decision point: "
        "expected a decision rule that fits the LM's thoughts"
    )


def _check_price(price: float | None) -> None:
    if price is not None and not 0 < price < np.inf:
        raise InputError(f"price is {price}, expected positive and finite")
