"""Thinking on vLLM's own engine: a thought is one request from decision point to decision point.

    start -> advance -> at a decision point -> force (look at the answer) -> advance or halt
                     -> ended by the LM or by the token budget

What goes on with a thought, and what looks at its answer, is a request whose prompt is the prompt
and all tokens so far: the prefix cache has most of their keys and values. The engine's batch holds
the requests of all slots at once, whatever they are for, and no slot waits for another one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig

from haltwise import Halting, InputError, Signals
from haltwise.engine.forced_answers import extend_answer
from haltwise.engine.slot_thoughts import SlotThoughts
from haltwise.engine.token_rules import TokenRules, end_tokens
from haltwise.policy.signals import Index
from haltwise.session.signal_collector import LOWEST_LOGPROB, NUM_TOP, SignalCollector
from haltwise.session.thought import NEVER, ForcedAnswer, Probe

Logprobs = NDArray[np.float64]
"""Log probabilities of a token, nats: its own, then those of the likeliest in its place, if they
were asked for."""

TakeToken = Callable[[int, Logprobs], bool]
"""Takes in the next token of a request, and its log probabilities; returns whether that is all that
the request is for."""


@dataclass
class _Look:
    """What is asked about a thought where it stands."""

    answer: ForcedAnswer = field(default_factory=lambda: ForcedAnswer([], [], 0))
    """The forced answer so far."""
    end_logprob: float = float("nan")
    """The log probability that the LM itself closes the thought here."""


class EngineDecoder(SlotThoughts):
    """Runs prompts in slots on a vLLM engine; see `haltwise.engine.batch_job.BatchDecoder`.

    What a slot gets depends on its prompt, its seed and the places where it was looked at, not on
    the other slots. (Batches of another size may round differently.)

    Args:
        llm: A `vllm.LLM`.
        halting: It has the decision rule, the close text and the length of forced answers.
        max_tokens: The token budget of a prompt, its answer included.
        temperature: The temperature of sampling; 0 takes the likeliest token. Forced answers are
            always greedy.
        signals: Names of the signals to measure beside position and forced answer.
        next_look: (num_slots,) tokens of each slot before which there is nothing to decide; the
            session keeps them up to date.
        free_answers: Whether answers behind thoughts that `close` has closed are sampled too,
            instead of being the likeliest tokens.

    Raises:
        InputError: If the engine or the halting conditions cannot be run.
    """

    def __init__(
        self,
        llm: Any,
        halting: Halting,
        max_tokens: int,
        temperature: float,
        signals: Collection[str],
        next_look: Index,
        free_answers: bool,
    ) -> None:
        """Starts with every slot empty."""
        config, tokenizer = llm.llm_engine.model_config, llm.get_tokenizer()
        stated = config.try_get_generation_config().get("eos_token_id", tokenizer.eos_token_id)
        super().__init__(
            TokenRules(tokenizer, halting),
            end_tokens(GenerationConfig(eos_token_id=stated)),
            len(next_look),
            max_tokens,
            temperature,
            config.max_model_len,
            keeps_on=True,
            free_answers=free_answers,
        )
        self._engine, self._next_look = llm.llm_engine, next_look
        self._collector = SignalCollector(self.rules, signals, len(next_look))
        self._num_top = 0
        if self._collector.wants_logprobs:
            self._num_top = min(NUM_TOP, config.get_vocab_size())
            _check_logprobs(config, self._num_top)
        self._sees_end = "end_think_logprob" in signals
        self.tokens_beside = int(self._sees_end)
        # The prompt, its tokens and the seed of each slot.
        self._prompts: dict[int, tuple[str, list[int], int]] = {}
        # Log probabilities of the tokens of each slot since its newest decision point.
        self._measured: dict[int, list[Logprobs]] = {}
        self._looks: dict[int, _Look] = {}
        # By its name, the slot of each request that runs, and what takes in its tokens.
        self._requests: dict[str, tuple[int, TakeToken]] = {}
        self._num_asked: Counter[int] = Counter()  # by slot, requests that run
        self._names = (f"haltwise-{number}" for number in count())

    def start(self, slots: Index, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Gives slots (B,) to new prompts; one that cannot be run is a trouble of its slot."""
        self._abort(set(slots.tolist()))
        self._collector.reset(slots)
        for slot, prompt, seed in zip(slots.tolist(), prompts, seeds, strict=True):
            self._prompts[slot] = prompt, self.begin(slot, prompt), seed
            self._measured[slot] = []
            self._looks.pop(slot, None)

    def advance(self, slots: Index) -> None:
        """Takes slots (B,) further, until a request of one of them has ended."""
        for slot in slots.tolist():
            if not self._num_asked[slot] and self.is_going(slot):
                self._think_on(slot)
        while self._requests and not self._step():
            pass

    def force(self, slots: Index) -> list[Probe | None]:
        """Asks for the forced answers of slots (B,); returns those that are known, None for others.

        Their thoughts go on as if it never was.
        """
        return [self._answer_of(slot) for slot in slots.tolist()]

    def signals(self, slots: Index, probes: Sequence[Probe] | None = None) -> Signals:
        """Returns what is seen of slots (B,) at their decision points.

        Args:
            slots: Each is at a decision point.
            probes: Their forced answers, if anybody looked.
        """
        measured = {}
        if self._sees_end:
            ends = [self._looks[slot].end_logprob for slot in slots.tolist()]
            measured["end_think_logprob"] = np.maximum(ends, LOWEST_LOGPROB, dtype=np.float32)
        for slot in slots.tolist():
            if self._measured[slot]:
                logprobs = np.stack(self._measured[slot])
                rows = np.full(len(logprobs), slot)
                missing = ((0, 0), (0, NUM_TOP - self._num_top))
                top = np.pad(logprobs[:, 1:], missing, constant_values=-np.inf)
                self._collector.add(rows, logprobs[:, 0], top)
                self._measured[slot] = []
        thoughts = [self.thoughts[slot] for slot in slots.tolist()]
        return self._collector.collect(slots, thoughts, probes, measured)

    def close(self, slots: Index) -> None:
        """Closes the thoughts of slots (B,); their answers follow, as far as the budget goes."""
        for slot in slots.tolist():
            self.close_thought(slot)

    def reopen(self, slot: int) -> int:
        """Takes back that the thought of a slot was closed; returns how many tokens are dropped."""
        return self.reopen_thought(slot)

    def check_idle(self) -> None:
        """Refuses an engine that works for somebody else.

        Raises:
            InputError: If it has requests.
        """
        if num := self._engine.get_num_unfinished_requests():
            raise InputError(f"the engine has {num} unfinished requests, a job expects none")

    def abort(self) -> None:
        """Breaks off all that runs in the engine."""
        self._abort(set(self.thoughts))

    def _abort(self, slots: set[int]) -> None:
        """Breaks off the requests of some slots."""
        names = [name for name, (slot, _) in self._requests.items() if slot in slots]
        if names:
            self._engine.abort_request(names)
        for name in names:
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Notes that a request does not run any more."""
        slot, _ = self._requests.pop(name)
        self._num_asked[slot] -= 1

    def _step(self) -> bool:
        """Runs one step of the engine; returns whether a request has ended."""
        has_ended = False
        for output in self._engine.step():
            slot, take = self._requests[output.request_id]
            (new,) = output.outputs
            has_all = _take_in(take, new)
            if output.finished and new.finish_reason not in ("length", "stop"):
                self.troubles[slot] = f"vLLM broke off a request: {new.finish_reason!r}"
            if has_all or output.finished:
                has_ended = True
                self._forget(output.request_id)
            if has_all and not output.finished:
                self._engine.abort_request([output.request_id])
        return has_ended

    def _ask(
        self,
        slot: int,
        tokens: Sequence[int],
        most: int,
        take: TakeToken,
        num_top: int = 0,
        **sampling: Any,
    ) -> None:
        """Sends the engine a request that goes on from the prompt of a slot.

        Args:
            slot: The slot.
            tokens: What follows its prompt.
            most: The most tokens that are generated.
            take: Takes them in.
            num_top: Of how many of the likeliest tokens to tell log probabilities.
            sampling: Other sampling parameters of vLLM.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=most,
            logprobs=num_top,
            flat_logprobs=True,
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # there may be other ends than those of vLLM
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"haltwise_off": True},  # should a `HaltProcessor` be there
            **sampling,
        )
        name = next(self._names)
        self._requests[name] = slot, take
        self._num_asked[slot] += 1
        prompt = {"type": "token", "prompt_token_ids": [*self._prompts[slot][1], *tokens]}
        self._engine.add_request(name, prompt, params)

    def _think_on(self, slot: int) -> None:
        """Asks for the tokens of a thought up to its next decision point or cap, or its end."""
        self._looks.pop(slot, None)
        thought, (prompt, _, seed) = self.thoughts[slot], self._prompts[slot]
        num, look = thought.num_tokens, int(self._next_look[slot])
        temperature = self.temperature_of(slot)
        # Where points follow a text, `_think` sees them.
        end = min(self.max_tokens, look if self.rules.every else NEVER)
        self._ask(
            slot,
            thought.tokens,
            end - num,
            partial(self._think, slot),
            num_top=self._num_top if look < NEVER else 0,
            temperature=temperature,
            seed=segment_seed(prompt, seed, num) if temperature else None,
        )

    def _think(self, slot: int, token: int, logprobs: Logprobs) -> bool:
        """Takes in a token of a thought, or of the answer that follows it."""
        if np.isnan(logprobs).any():
            self._has_no_logits(slot)
            return True
        self.add(slot, token)
        thought, look = self.thoughts[slot], self._next_look[slot]
        if len(logprobs) > 1:
            self._measured[slot].append(logprobs)
        return thought.ended or (thought.waits and thought.num_tokens >= look)

    def _answer_of(self, slot: int) -> Probe | None:
        """Returns the forced answer of a slot where it stands; asks for it if nobody has."""
        if slot not in self._looks:
            self._looks[slot] = self._look(slot)
        if self._num_asked[slot]:
            return None
        answer = self._looks[slot].answer
        if not np.isfinite(answer.logprobs).all():
            self._has_no_logits(slot)
        return self.rules.read(answer)

    def _look(self, slot: int) -> _Look:
        """Asks for all that is to be seen of a slot where it stands."""
        look, rules, tokens = _Look(), self.rules, self.thoughts[slot].tokens

        def hear(token: int, logprobs: Logprobs) -> bool:
            return extend_answer(look.answer, [token], [float(logprobs[0])], self.eos_ids, rules)

        def see_end(_: int, logprobs: Logprobs) -> bool:
            look.end_logprob = float(logprobs[0])
            return True

        self._ask(slot, [*tokens, *rules.close_ids], rules.max_answer_tokens, hear, temperature=0.0)
        if self._sees_end:
            # The log probability is the LM's own, whatever is allowed.
            end_alone = [rules.end_id]
            self._ask(slot, tokens, 1, see_end, temperature=0.0, allowed_token_ids=end_alone)
        return look


def _take_in(take: TakeToken, new: Any) -> bool:
    """Takes in the new tokens of a request; returns whether it has all that it is for."""
    if not new.token_ids:
        return False
    table = np.array(new.logprobs.logprobs).reshape(len(new.token_ids), -1)
    return any(take(token, seen) for token, seen in zip(new.token_ids, table, strict=True))


def segment_seed(prompt: str, seed: int, position: int) -> int:
    """Returns the seed of the draws of a request.

    Args:
        prompt: The LM's whole input.
        seed: The seed of the job.
        position: Tokens that have been generated before.
    """
    digest = hashlib.blake2b(f"{seed} {position} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check_logprobs(config: Any, num_top: int) -> None:
    """Refuses an engine that does not tell the LM's own log probabilities.

    Raises:
        InputError: If it tells too few, or others.
    """
    if 0 <= config.max_logprobs < num_top:
        raise InputError(f"max_logprobs is {config.max_logprobs}, expected at least {num_top}")
    if config.logprobs_mode != "raw_logprobs":
        raise InputError(f"logprobs_mode is {config.logprobs_mode}, expected raw_logprobs")
