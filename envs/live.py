"""The live environment in batches, in which one LM thinks about many questions at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.batched import BatchedEnv, Mask
from envs.live_episodes import MAX_MISSES, EpisodeSeries, LiveEpisode, LiveEpisodes, no_points
from haltwise import Halting, Observing
from haltwise.policy.signals import Float, Index
from lms.language_model import LanguageModel
from lms.questions import Question

_ENVS_PER_SPARE = 8


class LiveEnv(BatchedEnv):
    """Many episodes of halting a running LM, stepped together: `HaltEnv` in batches.

    Description, spaces, rewards, starting state and episode end are those of `HaltEnv`. One
    forward pass of the LM moves all episodes by a token. Some spare slots keep newcomers waiting
    at their first decision points, so that no step has to run the LM for a few of them alone.

    Args:
        lm: The LM that thinks.
        questions: The questions to ask.
        halting: The decision rule, the close text, and whether answers are forced at every point.
        observing: How features become observations, and the price range.
        num_envs: B, the number of episodes that are played at once.
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
        num_envs: int,
        max_tokens: int,
        temperature: float | None = None,
        price: float | None = None,
    ) -> None:
        """Prepares the LM; nothing is generated before `reset`."""
        super().__init__(observing, num_envs)
        self._num_slots = num_envs + num_envs // _ENVS_PER_SPARE
        self._live = LiveEpisodes(lm, halting, observing, self._num_slots, max_tokens, temperature)
        self._series = EpisodeSeries(questions, observing, price)

    @property
    def price(self) -> NDArray[np.float64]:
        """The prices of the episodes that are being played (B,), in EM per 1,000 tokens."""
        return np.array([episode.price for episode in self._playing()])

    def _restart(self) -> None:
        """Begins a new pass over the questions."""
        self._series.restart()

    def _begin(self) -> Float:
        """Empties all slots and runs the LM until B episodes are at their first decision points.

        Returns:
            The observations (B, F + 1) there.

        Raises:
            InputError: If too many questions in a row have no decision point.
        """
        self._free = list(range(self._num_slots))
        self._ready: deque[int] = deque()
        self._slots = np.empty(self.num_envs, dtype=np.int64)
        self._misses = 0
        self._seat(np.arange(self.num_envs))
        return self._live.obs[self._slots]

    def _act(self, halts: Mask) -> tuple[Float, NDArray[np.float64], Mask, dict[str, Any]]:
        """Forces answers in some episodes (B,), and runs the LM in the others and in newcomers.

        Returns:
            Observations (B, F + 1), of the next episode where one is over; rewards (B,); which
            episodes are over (B,); and infos.

        Raises:
            InputError: If too many questions in a row have no decision point.
        """
        live, slots, played = self._live, self._slots.copy(), self._playing()
        last_obs = live.obs[slots]
        live.halt(slots[halts])
        rewards = np.array([episode.pay() for episode in played])
        self._free += slots[halts].tolist()
        over = halts.copy()
        over[~halts] = ~self._round(slots[~halts])
        ended = over & ~halts
        self._free += slots[ended].tolist()
        rewards[ended] += [played[i].pay() for i in np.flatnonzero(ended)]
        infos: dict[str, Any] = {}
        rows = np.flatnonzero(over)
        if len(rows):
            told = [played[i].info() for i in rows]
            columns = {name: [info[name] for info in told] for name in told[0]}
            infos = self._infos(rows, last_obs[rows], columns)
            self._seat(rows)
        return live.obs[self._slots], rewards, over, infos

    def _playing(self) -> list[LiveEpisode]:
        """Returns the B episodes that are being played."""
        return [self._live.episodes[slot] for slot in self._slots.tolist()]

    def _round(self, going: Index) -> Mask:
        """Runs the LM in some slots (G,), and in newcomers that take all free slots.

        Returns:
            Whether each of those slots is at a decision point (G,); the episodes of the others are
            over.

        Raises:
            InputError: If too many questions in a row have no decision point.
        """
        fresh = np.array(self._free, dtype=np.int64)
        self._live.begin(fresh, [self._series.next(self.np_random) for _ in fresh])
        at_point = self._live.run(np.concatenate([going, fresh]))
        arrived = at_point[len(going) :]
        self._ready.extend(fresh[arrived].tolist())
        self._free = fresh[~arrived].tolist()
        self._misses = 0 if arrived.any() else self._misses + len(fresh)
        if self._misses > MAX_MISSES:
            raise no_points(self._misses)
        return at_point[: len(going)]

    def _seat(self, envs: Index) -> None:
        """Gives some places (N,) of the batch the episodes that have waited longest."""
        while len(self._ready) < len(envs):
            self._round(np.empty(0, dtype=np.int64))
        for env in envs:
            self._slots[env] = self._ready.popleft()
