"""Batch jobs on vLLM's own engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from haltwise import Control, HaltHead, InputError, Session, Terms
from haltwise.engine.batch_job import BatchAnswer, BatchJob, check_job
from haltwise.engine.token_rules import check_tokenizer
from haltwise.policy.features import unshown_groups
from haltwise.vllm.engine_decoder import EngineDecoder
from haltwise.vllm.halting import log


def generate_all(
    llm: Any,
    head: HaltHead,
    prompts: Iterable[str],
    max_new_tokens: int,
    num_slots: int | None = None,
    price: float | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    control: Control | None = None,
    accepts: Callable[[str], bool] | None = None,
    num_thoughts: int = 1,
    free_answers: bool = False,
) -> Iterator[BatchAnswer]:
    """Answers prompts on a vLLM engine, with a head that halts their thoughts.

    It is `haltwise.transformers.generate_all` on another engine, which works for nobody else
    meanwhile. A row that is not halted gets the tokens of a plain `llm.generate`, if greedy.
    Sampled tokens have the LM's distribution; which ones they are depends on the prompt, the seed
    and the places where the thought was looked at.

    Args:
        llm: A `vllm.LLM`, with prefix caching.
        head: The policy. One that looks at no answers and reads the group "ending" is
            `haltwise.vllm.HaltProcessor`'s.
        prompts: The LM's whole inputs; they are taken one by one as slots become free.
        max_new_tokens: The most tokens of an answer, its thought included.
        num_slots: How many prompts are answered at once; by default the engine's `max_num_seqs`.
        price: The price in exact match per 1,000 tokens; by default the head's own. At 0 the head
            never halts.
        min_tokens: The head does not halt before this many thinking tokens.
        max_tokens: A thought is closed at this many thinking tokens, whatever the head says.
        temperature: The temperature of sampling; 0 takes the likeliest token.
        seed: The seed of sampling.
        control: It sets terms and prices; by default those that are asked for are constant.
        accepts: Tells of the text of an answer whether it can be given; by default of one that the
            head's answer rule can read. Where the head has halted a thought and it cannot, the
            thought goes on to its end.
        num_thoughts: The most thoughts of a prompt.
        free_answers: Whether the LM's answers behind thoughts that were closed are sampled too.
            What a certificate says is about likeliest answers.

    Returns:
        An iterator that gives each answer as soon as it is known.

    Raises:
        InputError: If a setting makes no sense, the engine or the head cannot be run, or the
            tokenizer is not the head's; and, as the first answer is asked for, if the engine has
            other requests.
    """
    config = llm.llm_engine.vllm_config
    if num_slots is None:
        num_slots = config.scheduler_config.max_num_seqs
    check_job(num_slots, max_new_tokens, num_thoughts, temperature)
    _check_shown(head)
    check_tokenizer(head, llm.get_tokenizer())
    if not config.cache_config.enable_prefix_caching:
        log.warning("without prefix caching every look computes its whole thought anew")
    terms = Terms(head.price_or_own(price), min_tokens, max_tokens)
    measures = terms.price > 0 or control is not None
    session = Session(head, num_slots, control)
    decoder = EngineDecoder(
        llm,
        head.config.halting,
        max_new_tokens,
        temperature,
        head.config.observing.signals if measures else (),
        session.next_look,
        free_answers,
    )
    job = BatchJob(session, decoder, terms, accepts, num_thoughts, seed)
    return _answers(decoder, job.run(prompts))


def _answers(decoder: EngineDecoder, answers: Iterator[BatchAnswer]) -> Iterator[BatchAnswer]:
    """Yields the answers of a job, and leaves the engine without requests."""
    decoder.check_idle()
    try:
        yield from answers
    finally:
        decoder.abort()


def _check_shown(head: HaltHead) -> None:
    """Refuses a head that needs more than the engine shows in a batch job.

    Raises:
        InputError: If it reads hidden states, or the end of thinking without looking at answers.
    """
    groups, looks = head.config.observing.groups, head.config.halting.probing == "always"
    if unshown := unshown_groups(groups, "vllm_jobs"):
        raise InputError(f"head has groups {', '.join(unshown)}: expected none that vLLM hides")
    if not looks and (unshown := unshown_groups(groups, "proxy")):
        raise InputError(
            f"head has groups {', '.join(unshown)} and looks at no answer: expected one that does, "
            "or haltwise.vllm.HaltProcessor"
        )
