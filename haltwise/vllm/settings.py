"""What a vLLM engine's config says to haltwise, and whether the two fit each other."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config

from haltwise import Control, HaltHead, InputError, Terms
from haltwise.engine.token_rules import TokenRules, check_tokenizer
from haltwise.policy.features import unshown_groups
from haltwise.policy.head import NEVER_HALTS
from haltwise.session.control import load_control

# Under vLLM's own logger: it is the one that vLLM shows.
_log = logging.getLogger("vllm.haltwise")


@dataclass(frozen=True)
class Settings:
    """What all requests of an engine have in common."""

    head: HaltHead
    """The policy."""
    terms: Terms
    """The terms of requests that ask for nothing."""
    rules: TokenRules
    """How thoughts are read and closed."""
    control: Control
    """Sets terms and prices."""
    free_answers: bool
    """Whether answers behind closed thoughts are sampled as requests have it."""


def read_settings(vllm_config: Any) -> Settings:
    """Reads what the engine's config says to haltwise.

    Raises:
        InputError: If there is no head, or the head does not fit this engine.
    """
    _check_engine(vllm_config)
    terms = _stated(vllm_config.additional_config)
    control = load_control(terms.pop("control", None))
    if control.moves_prices and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise InputError(
            "a control that moves prices: expected one GPU an LM, since each process asks its own"
        )
    free_answers = terms.pop("free_answers", False)
    if not isinstance(free_answers, bool):
        raise InputError(
            f"haltwise in additional-config: free_answers is {free_answers!r}, expected true or "
            "false"
        )
    folder = terms.pop("head", None) or os.environ.get("HALTWISE_HEAD")
    if not folder:
        raise InputError(
            "no head: expected additional-config {'haltwise': {'head': FOLDER}}, or HALTWISE_HEAD"
        )
    head = HaltHead.load(folder)
    _check_runnable(head)
    try:
        default = Terms.read(terms, Terms.of_head(head.config))
    except InputError as error:
        raise InputError(f"haltwise in additional-config: {error}") from None
    if default.price == 0:
        _log.warning(NEVER_HALTS)
    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    if tokenizer is None:
        raise InputError("the engine has no tokenizer: expected one, without skip_tokenizer_init")
    check_tokenizer(head, tokenizer)
    rules = TokenRules(tokenizer, head.config.halting)
    return Settings(head, default, rules, control, free_answers)


def _check_engine(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise InputError("speculative decoding: expected none, a head decides token by token")
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise InputError("a diffusion LM: expected one that generates token by token")


def _stated(additional_config: Any) -> dict[str, Any]:
    """Returns what the engine's config says: the head, a control, `free_answers`, and terms."""
    stated = additional_config.get("haltwise", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(stated, dict):
        raise InputError(
            f"haltwise in additional-config is {stated!r}, expected {{'head': FOLDER}}"
        )
    folder = stated.get("head", "FOLDER")
    if not (isinstance(folder, str) and folder):
        raise InputError(f"haltwise in additional-config: head is {folder!r}, expected text")
    return dict(stated)


def _check_runnable(head: HaltHead) -> None:
    if head.config.halting.probing != "at_halt":
        raise InputError("head probes always: expected at_halt, vLLM cannot try out answers")
    unshown = unshown_groups(head.config.observing.groups, "vllm")
    if unshown:
        raise InputError(f"head has features {unshown[0]!r}: expected none, vLLM cannot show them")


def check_tokens_are_shown(vllm_config: Any) -> None:
    """Refuses a V1 engine that would show placeholders instead of the newest tokens."""
    if vllm_config.scheduler_config.async_scheduling and not (
        vllm_config.model_config.logits_processors
    ):
        raise InputError(
            "loaded as a plugin, V1 with async scheduling hides the newest tokens: expected "
            "--logits-processors haltwise.vllm:HaltProcessor, or --no-async-scheduling"
        )


def is_first(parallel_config: Any) -> bool:
    """Whether this process is the first of those that sample the same requests: it logs."""
    is_alone = getattr(parallel_config, "enable_batch_sharded_sampling", False)
    return bool(is_alone or parallel_config.rank % parallel_config.tensor_parallel_size == 0)
