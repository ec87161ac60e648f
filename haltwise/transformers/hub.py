"""A head as a repository of the Hugging Face hub, run by `generate(custom_generate=...)`.

    python -m haltwise.transformers.hub --head RUN --out FOLDER --repo OWNER/NAME
    hf upload OWNER/NAME FOLDER

    model.generate(
        **inputs, tokenizer=tokenizer, custom_generate="OWNER/NAME", trust_remote_code=True
    )

The folder runs as it is, too: `custom_generate=FOLDER`.
"""

import argparse
import sys
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)

from haltwise import Control, HaltHead, HeadConfig, InputError, ThoughtReport
from haltwise.errors import printing, reason_of, what_failed
from haltwise.transformers.probing import ProbingGeneration
from haltwise.transformers.processor import HaltProcessor

_FILES = ["head.json", "head.safetensors"]
_NOT_THERE = (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
# What a repository is made from: its code and its card.
_TEMPLATES = files("haltwise.transformers") / "repository"


def export(head: HaltHead, folder: Path | str, repo_id: str | None = None) -> None:
    """Writes a head as a repository: weights, the code that runs it, and a card.

    Args:
        head: The head to write.
        folder: The folder to write it to.
        repo_id: The name of the repository that the folder will be, OWNER/NAME. By default the
            folder is run where it is.

    Raises:
        InputError: If the repository's name makes no sense, or the folder is a file.
    """
    folder = Path(folder)
    if repo_id is not None and not _is_repository(repo_id):
        raise InputError(f"repository is {repo_id!r}, expected OWNER/NAME")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder to write")
    source = repo_id or str(folder.resolve())
    head.save(folder)
    code = folder / "custom_generate"
    code.mkdir(exist_ok=True)
    (code / "generate.py").write_text(_template("generate.py.in").format(source=source))
    (code / "requirements.txt").write_text(f"haltwise>={version('haltwise')}\n")
    (folder / "README.md").write_text(_card(head.config, source))


def load(source: str, revision: str | None = None) -> HaltHead:
    """Reads a head from a folder, or else from the hub.

    Args:
        source: A folder, or a repository of the hub.
        revision: The revision of the repository; by default its newest.

    Raises:
        InputError: If what is there is no head.
    """
    if Path(source).is_dir():
        return HaltHead.load(source)
    if not _is_repository(source):  # where the hub cannot be reached, a look takes a minute
        raise InputError(f"{source!r} is no folder, expected one with a head, or OWNER/NAME")
    return _load_from_hub(source, revision)


def _is_repository(name: str) -> bool:
    """Returns whether a text can be OWNER/NAME of the hub."""
    return [bool(part.strip(".~")) for part in name.split("/")] == [True, True]


@lru_cache(maxsize=8)
def _load_from_hub(source: str, revision: str | None) -> HaltHead:
    """Reads a head from the hub, once in a process and not at every call of `generate`.

    Raises:
        InputError: If there is no such repository or revision, or it holds no head.
    """
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=_FILES)
    except _NOT_THERE as error:
        reason = reason_of(error)
        raise InputError(f"{source!r} is no folder and no repository: {reason}") from None
    return HaltHead.load(folder)


def generate(
    model: PreTrainedModel,
    head: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    price: Any = None,
    min_tokens: Any = 0,
    max_tokens: Any = None,
    report: list[ThoughtReport] | None = None,
    control: Control | None = None,
    revision: str | None = None,
    free_answers: bool = False,
    **arguments: Any,
) -> Any:
    """Generates with a head beside the LM; the code in a repository calls it.

    Args:
        model: The LM.
        head: The folder, or the repository of the hub, that holds the head.
        tokenizer: The LM's tokenizer.
        price: The price in exact match per 1,000 tokens: one, or one for each row; by default the
            head's own.
        min_tokens: The head does not halt before this many thinking tokens: one number, or one for
            each row.
        max_tokens: A thought is closed at this many thinking tokens, whatever the head says: one
            number, or one for each row; None for no such cap.
        report: A list that is filled with what happened to each row.
        control: It sets terms and prices; by default those that are asked for are constant.
        revision: The revision of the repository; by default its newest.
        free_answers: Whether the answers of rows whose thoughts were closed are sampled as the call
            has it, see `HaltProcessor`. A head that looks at answers gives those it has seen.
        arguments: What else `model.generate` takes.

    Returns:
        What `model.generate` returns.

    Raises:
        InputError: If there is no tokenizer, if there is a streamer beside a head that looks at
            answers, or if the head refuses the LM or an argument.
    """
    if tokenizer is None:
        raise InputError("no tokenizer: expected generate(..., tokenizer=tokenizer)")
    loaded, asked = load(head, revision), (price, min_tokens, max_tokens)
    runner: HaltProcessor | ProbingGeneration
    if loaded.config.halting.probing == "at_halt":
        eos = arguments.get("eos_token_id")
        if eos is None and arguments.get("generation_config") is not None:
            eos = arguments["generation_config"].eos_token_id
        runner = HaltProcessor(loaded, model, tokenizer, *asked, eos, control, free_answers)
        arguments["logits_processor"] = [*(arguments.get("logits_processor") or ()), runner]
    elif arguments.get("streamer") is not None:
        raise InputError("the head looks at answers while the LM thinks: expected no streamer")
    else:
        runner = ProbingGeneration(loaded, tokenizer, *asked, control)
        arguments["custom_generate"] = runner
        # Beside a callable `generate` drops the tokenizer that its stop strings need.
        if stop_strings := arguments.pop("stop_strings", None):
            stops = StopStringCriteria(tokenizer, stop_strings)
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or ()), stops]
    # `model.generate` may be what calls this.
    out: Any = GenerationMixin.generate(model, tokenizer=tokenizer, **arguments)  # type: ignore[arg-type]
    reports = runner.report  # reading it ends the requests
    if report is not None:
        report[:] = reports
    return out


def _template(name: str) -> str:
    """Returns the text of a file that a repository is made from."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _card(config: HeadConfig, source: str) -> str:
    """Returns the README of a head's repository, found under a name or in a folder."""
    low, high = config.observing.price_range
    certified = "nothing"
    if config.certificate is not None:
        found = config.certificate
        certified = (
            f"price {found.price or 0:.3g}: a loss of exact match of at most {found.max_em_drop}, "
            f"with a confidence of {found.confidence} ({found.risk})"
        )
    looks = config.halting.probing == "always"
    return _template("README.md.in").format(
        lm=config.lm or "an LM that its traces do not name",
        tokenizer=config.tokenizer or "not known",
        price=config.default_price,
        source=source,
        low=low,
        high=high,
        rule=config.halting.decision_rule,
        probing="looked at, at every decision point" if looks else "not looked at before halting",
        close=config.halting.close_text,
        certified=certified,
    )


def main() -> None:
    """Exports a head from the command line.

    It reads its flags with argparse, since the extra `hf` brings no tyro.
    """
    about = str(export.__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m haltwise.transformers.hub", description=about)
    parser.add_argument("--head", required=True, help="folder of the head")
    parser.add_argument("--out", required=True, help="folder to write, a new one")
    parser.add_argument("--repo", help="the hub repository that it will be, OWNER/NAME")
    with printing():  # of its help
        asked = parser.parse_args()
    try:
        head = HaltHead.load(asked.head)
        if Path(asked.out).is_dir():
            raise InputError(f"{asked.out} exists: expected a new folder")
        export(head, asked.out, asked.repo)
        print(f"{asked.out} is written; {Path(asked.out) / 'README.md'} says how to run it")
    except (InputError, OSError) as error:
        print("error:", " ".join(what_failed(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
