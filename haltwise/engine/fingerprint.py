"""Which tokenizer a head was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from haltwise import HaltHead, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The size and the fingerprint of each tokenizer in use: reading a large vocabulary takes a tenth of
# a second, and every call of `generate` asks.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 16 hex digits of a SHA-256 of a tokenizer's vocabulary.

    They are equal for tokenizers that give every token the same id.
    """
    size, found = _known.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        found = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        _known[tokenizer] = len(tokenizer), found
    return found


def check_tokenizer(head: HaltHead, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that a head was not trained with.

    Raises:
        InputError: If the head names another tokenizer.
    """
    expected = head.config.tokenizer
    if expected and (found := tokenizer_fingerprint(tokenizer)) != expected:
        raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
