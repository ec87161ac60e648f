"""The live environment, in which an LM thinks about one question at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.live_episodes import MAX_MISSES, EpisodeSeries, LiveEpisodes, no_points
from envs.single import Ended, SingleEnv
from haltwise import Halting, Observing
from haltwise.policy.signals import Float
from lms.language_model import LanguageModel
from lms.questions import Question

_ONLY_SLOT = np.zeros(1, dtype=np.int64)


class HaltEnv(SingleEnv):
    """Halting a running LM: one question an episode.

    ## Description
    An LM thinks about a question. At every decision point the policy continues or halts; halting
    closes the thought and takes the answer that is forced there. The policy trades exact match
    (EM) for tokens at a price, in EM per 1,000 tokens.

    ## Action space
    `Discrete(2)`: 0 continue, 1 halt.

    ## Observation space
    `Box(-5, 5, (F + 1,), float32)`: F features of all that was seen up to the decision point, each
    less its mean over the training points, divided by its spread there, and clipped; then the log
    price, which maps the observing's price range to [-1, 1]. Features come in groups, and
    `observing.groups` names those that there are, in their order; `haltwise.FEATURE_GROUPS` names
    the features of each.

    | Group | Features | Made from the signals |
    |---|---|---|
    | pace | 3 | position |
    | limit | 2 | points_left |
    | confidence | 5 | confidence |
    | tokens | 3 | worst_logprob, answer, probe_tokens |
    | agreement | 7 | answer |
    | distribution | 7 | entropy, max_entropy, logprob, min_logprob, margin |
    | ending | 3 | end_think_logprob |
    | reflection | 3 | num_reflections |
    | hidden | 16 | hidden |

    ## Rewards
    A step pays price / 1000 for each token generated since the previous point (the forced answer
    included when probing is "always"). Halting gains the EM of the forced answer (and pays for it
    when probing is "at_halt"); continuing at the last point pays for the rest and gains the EM of
    the LM's own answer. Nothing is discounted: the return is EM - price * cost / 1000.

    ## Starting state
    An episode starts at the first decision point of a question drawn from a shuffled pass, at a
    price drawn log-uniformly from the observing's range. Questions without a decision point are
    skipped.
    `reset(options={"price": p})` sets the price of one episode.

    ## Episode end
    An episode is terminated by halting, by the LM's own end or by the token budget: each leaves an
    answer that counts. It is never truncated. The last info tells how it ended, see `SingleEnv`.

    ## Arguments
    `gymnasium.make("haltwise/Halt-v0", lm=..., questions=..., halting=..., observing=...,
    max_tokens=...)`; `gymnasium.make_vec` takes the same and `num_envs`, and gives `LiveEnv`.

    Args:
        lm: The LM that thinks.
        questions: The questions to ask.
        halting: The decision rule, the close text, and whether answers are forced at every point.
        observing: How features become observations, and the price range.
        max_tokens: The token budget of a question, its answer included.
        temperature: The temperature of sampling; 0 always takes the likeliest token, None is the
            LM's own.
        price: A fixed price for every episode; None draws one for each.

    Raises:
        InputError: If the questions or conditions cannot be used.
    """

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
        super().__init__(observing)
        self._live = LiveEpisodes(lm, halting, observing, 1, max_tokens, temperature)
        self._series = EpisodeSeries(questions, observing, price)

    def _restart(self) -> None:
        """Begins a new pass over the questions."""
        self._series.restart()

    def _begin(self, price: float | None) -> Float:
        """Runs the LM to the first decision point of the next question that has one.

        Returns:
            The observation (F + 1,) there.

        Raises:
            InputError: If MAX_MISSES questions in a row have none.
        """
        for _ in range(MAX_MISSES):
            self._live.begin(_ONLY_SLOT, [self._series.next(self.np_random, price)])
            if self._live.run(_ONLY_SLOT)[0]:
                return self._observe()
        raise no_points(MAX_MISSES)

    def _act(self, halts: bool) -> tuple[Float, float, Ended | None]:
        """Forces the answer, or runs the LM to its next decision point or its end.

        Returns:
            The observation (F + 1,) at the newest point, the reward, and what is told of the
            episode if it is over.
        """
        episode = self._live.episodes[0]
        if halts:
            self._live.halt(_ONLY_SLOT)
        value = episode.pay()
        goes_on = not halts and bool(self._live.run(_ONLY_SLOT)[0])
        if not (halts or goes_on):
            value += episode.pay()
        return self._observe(), value, None if goes_on else episode.info()

    def _observe(self) -> Float:
        """Returns the observation (F + 1,) at the newest decision point."""
        obs: Float = self._live.obs[0].copy()
        return obs
