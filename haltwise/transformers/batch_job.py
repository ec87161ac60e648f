"""Batch jobs of a model of transformers, in refilled slots."""

from collections.abc import Callable, Iterable, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haltwise import Control, HaltHead, Session, Terms
from haltwise.engine.batch_job import BatchAnswer, BatchJob, check_job
from haltwise.engine.decoder import Decoder
from haltwise.engine.token_rules import check_tokenizer


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: HaltHead,
    prompts: Iterable[str],
    num_slots: int,
    max_new_tokens: int,
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
    """Answers prompts in refilled slots, with a head that halts their thoughts.

    Of several thoughts of a prompt, each with the next seed, the answer that most of them give is
    the prompt's. They run in turn, and none begins that could not change it any more.

    What a prompt gets depends on itself and the seed alone, not on the other slots. A row that is
    not halted gets the tokens of a plain `generate`, if greedy. A head that looks at answers gives
    those it has seen; with another one the LM answers by itself behind a thought that was closed,
    with its likeliest tokens at any temperature.

    Args:
        model: The LM: decoder-only, with full attention in every layer.
        tokenizer: The LM's tokenizer.
        head: The policy.
        prompts: The LM's whole inputs; they are taken one by one as slots become free.
        num_slots: How many prompts are answered at once.
        max_new_tokens: The most tokens of an answer, its thought included.
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
        InputError: If a setting makes no sense, the LM or the head cannot be run, or the tokenizer
            is not the head's.
    """
    check_job(num_slots, max_new_tokens, num_thoughts, temperature)
    check_tokenizer(head, tokenizer)
    terms = Terms(head.price_or_own(price), min_tokens, max_tokens)
    measures = terms.price > 0 or control is not None
    decoder = Decoder(
        model,
        tokenizer,
        head.config.halting,
        num_slots,
        max_new_tokens,
        temperature,
        signals=head.config.observing.signals if measures else (),
        keeps_on=True,
        free_answers=free_answers,
    )
    session = Session(head, num_slots, control)
    return BatchJob(session, decoder, terms, accepts, num_thoughts, seed).run(prompts)
