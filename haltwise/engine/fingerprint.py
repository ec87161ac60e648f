"""Which tokenizer a head was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from haltwise import HaltHead, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Of tokenizers in use, with their size: a large vocabulary takes a tenth of a second, and every
# call of `generate` asks.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every token the same id: 16 hex digits of a SHA-256."""
    size, found = _known.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        found = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        _known[tokenizer] = len(tokenizer), found
    return found


def check_tokenizer(head: HaltHead, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that a head was not trained with.

    Raises:
        InputError: If the head names another one.
    """
    expected = head.config.tokenizer
    if expected and (found := tokenizer_fingerprint(tokenizer)) != expected:
        raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
