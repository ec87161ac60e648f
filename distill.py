"""Teaches an LM to think no longer than a head would have let it.

    python distill.py --head RUN --traces FILE_OR_FOLDER --out NEW_LM

The LM's own thoughts, cut where the head would have halted them and closed by the answer that was
forced there, are what it is fine-tuned on, where that answer is right. The result is an LM folder
like any other: it is recorded, evaluated and halted with the same commands.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import installed  # noqa: F401, tells what is missing

import numpy as np

from command import run, whole_folder, write_json
from haltwise import HaltHead, InputError
from lms.fine_tune import Example, FineTuneConfig, fine_tune, save_lm
from lms.language_model import LanguageModel
from recording.cut_thoughts import cut_thoughts
from traces import check_recorded, read_traces


@dataclass(frozen=True)
class DistillConfig:
    """Teach an LM to think no longer than a head would have let it."""

    head: Path
    """A head that was trained on this LM: a run folder, or one of a head alone."""
    traces: Path
    """Recorded traces of this LM with their texts, a file or a folder; only train questions are
    learned from."""
    out: Path
    """The folder for the new LM; it must not exist."""
    lm: str = "embedded"
    """The LM: a hub name, a folder, or "embedded"."""
    price: float | None = None
    """The price at which the head cuts, in exact match per 1,000 tokens; default: its own."""
    device: str = "cpu"
    """The device to train on, as PyTorch names it."""
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """How the LM is fine-tuned."""


def main(config: DistillConfig) -> Path:
    """Cuts the thoughts, trains the LM, and writes it.

    Returns:
        The new folder.

    Raises:
        InputError: If the head, the traces and the LM cannot be used or are not of one LM, or
            nothing is right to learn from.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists: expected a new folder")
    head, traces = HaltHead.load(config.head), read_traces(config.traces)
    traces = traces.select(traces.split == "train")
    if not len(traces):
        raise InputError(f"{config.traces} has no train questions, expected some to learn from")
    lm = LanguageModel.load(config.lm, config.device)
    check_recorded(head.config, traces.recorder, config.traces)
    _check_one_lm(head, str(traces.recorder.get("tokenizer", "")), lm)
    price = head.config.default_price if config.price is None else config.price
    started = time.monotonic()
    cut = cut_thoughts(config.traces, traces, head, price, lm)
    before = np.mean([one.num_tokens for one in cut])
    after = np.mean([len(one.completion) for one in cut])
    print(
        f"{len(cut)} of {len(traces)} thoughts are right where they end or are cut: "
        f"{before:.0f} tokens each, {after:.0f} once they are cut"
    )
    examples = [Example(one.prompt, one.completion) for one in cut]
    model = fine_tune(lm, examples, config.fine_tune)
    minutes = (time.monotonic() - started) / 60
    with whole_folder(config.out) as folder:
        save_lm(lm, model, folder)
        told = {"lm": config.lm, "head": head.digest, "price": price, "thoughts": len(cut)}
        told |= {"traces": str(config.traces), "minutes": round(minutes, 1)}
        write_json(folder / "distilled.json", told | asdict(config.fine_tune))
    print(f"wrote {config.out} after {minutes:.1f} minutes")
    return config.out


def _check_one_lm(head: HaltHead, recorded: str, lm: LanguageModel) -> None:
    """Refuses a head or traces of another LM than the one that is to be trained.

    Raises:
        InputError: If their tokenizers differ.
    """
    for name, found in (("head", head.config.tokenizer), ("traces", recorded)):
        if found and found != lm.fingerprint:
            raise InputError(
                f"the {name} is of an LM with tokenizer {found}, {lm.name} has {lm.fingerprint}: "
                "expected those of one LM"
            )


if __name__ == "__main__":
    run(main, DistillConfig)
