"""Pruning the embedded LM: which units go, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from haltwise import InputError
from lms.embedded import EMBEDDED
from lms.gguf import write_gguf
from lms.prune import PruneConfig, kept_units, main, prune
from lms.train_embedded import EmbeddedTrainingConfig, build_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two layers of 16 units."""
    found: LlamaForCausalLM = build_model(EmbeddedTrainingConfig(width=4, layers=2)).eval()
    return found


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(20)[None]).logits
    return found


@torch.no_grad()
def test_the_smallest_units_go(model: LlamaForCausalLM) -> None:
    mlp = model.model.layers[0].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
        weight[:] = 1.0
    mlp.up_proj.weight[3] *= 0.5  # by 0.5 in all
    mlp.gate_proj.weight[5] *= 0.25
    mlp.down_proj.weight[:, 5] *= 3.0  # by 0.75 in all
    mlp.down_proj.weight[:, 7] *= 0.1
    assert kept_units(mlp, 2 / 16).tolist() == [0, 1, 2, 4, 5, 6, *range(8, 16)]
    assert kept_units(mlp, 3 / 16).tolist() == [0, 1, 2, 4, 6, *range(8, 16)]
    assert len(kept_units(mlp, 0.99)) == 1
    assert kept_units(mlp, 0.01).tolist() == list(range(16))


@torch.no_grad()
def test_units_without_weight_are_missed_by_nobody(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 4:12] = 0.0
    before, num = logits(model), model.num_parameters()
    prune(model, 0.5)
    torch.testing.assert_close(logits(model), before)
    assert num - model.num_parameters() == 2 * 3 * 8 * 4
    assert model.config.intermediate_size == 8


def test_a_pruned_lm_is_a_folder_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned"
    main(PruneConfig(out, share=0.25, steps=0))
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 384
    assert AutoTokenizer.from_pretrained(out).get_vocab()["</think>"] == 4
    same = "model.norm.weight"
    whole = load_file(EMBEDDED / "model.safetensors")
    assert torch.equal(load_file(out / "model.safetensors")[same], whole[same])
    assert "feed-forward width 384, 860,288 parameters" in capsys.readouterr().out
    assert write_gguf(tmp_path / "pruned.gguf", "q4_0", out) == {"q4_0": 29, "f32": 9}
    with pytest.raises(InputError, match="pruned exists: expected a new folder"):
        main(PruneConfig(out))


def test_what_is_left_is_trained_on(tmp_path: Path) -> None:
    found = []
    for name in ("one", "same"):
        main(PruneConfig(tmp_path / name, share=0.9, steps=1))
        found.append(load_file(tmp_path / name / "model.safetensors"))
    weight = "model.norm.weight"
    assert not torch.equal(found[0][weight], load_file(EMBEDDED / "model.safetensors")[weight])
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "--share is 1.0, expected from 0 to 1, 1 not included"),
        ({"share": -0.1}, "--share is -0.1, expected"),
        ({"steps": -1}, "--steps is -1, expected 0 or more"),
        ({"lr": 0.0}, "--lr is 0.0, expected above 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        main(PruneConfig(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
