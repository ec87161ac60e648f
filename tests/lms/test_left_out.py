"""What an LM's own generation settings say about its tokens, beyond their temperature."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import GenerationConfig

from lms.left_out import left_out


@pytest.mark.parametrize(
    ("settings", "temperature", "told"),
    [
        ({"top_k": 20, "top_p": 0.95}, 0.6, "sets top_k 20, top_p 0.95, which is left out"),
        ({"top_k": 20, "top_p": 0.95}, 0.0, ""),
        ({"repetition_penalty": 1.1}, 0.0, "sets repetition_penalty 1.1, which"),
        ({"stop_strings": ["so"], "num_beams": 4}, 1.0, r"sets num_beams 4, stop_strings \['so'\]"),
        ({"top_k": 0, "top_p": 1.0, "num_beams": 1, "suppress_tokens": []}, 1.0, ""),
        ({"max_new_tokens": 9, "max_length": 20, "eos_token_id": 1}, 1.0, ""),
    ],
)
def test_settings_that_would_change_tokens_are_told(
    settings: dict[str, Any], temperature: float, told: str
) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, **settings)
    if not told:
        assert left_out(config, temperature) == []
        return
    (warning,) = left_out(config, temperature)
    assert re.search(told, warning)
