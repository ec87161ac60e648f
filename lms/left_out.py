"""What an LM's own generation settings would do to its tokens, and nothing here does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Settings that keep tokens from being sampled, by the value that keeps none.
_SAMPLING = {
    **{"top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1},
    **{"epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": 1},
}
# Others that change which token comes next, by the value that changes nothing.
_ALWAYS = {
    **{"repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1},
    **{"min_length": 0, "min_new_tokens": 0, "exponential_decay_length_penalty": None},
    **{"stop_strings": None, "suppress_tokens": None, "begin_suppress_tokens": None},
    **{"bad_words_ids": None, "sequence_bias": None, "watermarking_config": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None},
}


def left_out(config: GenerationConfig, temperature: float) -> list[str]:
    """Returns a warning if an LM's own settings change its tokens beyond their temperature.

    Args:
        config: The LM's generation config.
        temperature: The temperature of sampling; 0 is greedy, so that what is kept from being
            sampled does not matter.
    """
    settings = {**(_SAMPLING if temperature else {}), **_ALWAYS}
    found = [
        f"{name} {value!s:.40}"
        for name, neutral in settings.items()
        if not _is_neutral(value := getattr(config, name, None), neutral)
    ]
    if not found:
        return []
    return [
        f"the LM's generation_config.json sets {', '.join(found)}, which is left out: tokens are "
        "chosen by temperature alone. Serve it so, or the head meets other thoughts than it has "
        "learned from"
    ]


def _is_neutral(value: Any, neutral: float | None) -> bool:
    return value is None or value == neutral or value in ([], {}, "")
