"""Loading an LM from a GGUF file: turned once into an ordinary folder, which is kept."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from haltwise import InputError
from haltwise.errors import from_clone, reason_of

_NAME_LENGTH = 16
# The packages with which transformers reads GGUF files.
_NEEDED = ("gguf", "accelerate")


def is_gguf(name: str | Path) -> bool:
    """Says whether an LM's name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf")


def cache_folder() -> Path:
    """Returns where LMs made from GGUF files are kept: $HALTWISE_CACHE, or ~/.cache/haltwise."""
    stated = os.environ.get("HALTWISE_CACHE")
    return (Path(stated) if stated else Path.home() / ".cache" / "haltwise") / "gguf"


def folder_of(path: Path) -> Path:
    """Returns a folder with what a GGUF file holds, as `from_pretrained` reads it.

    The first call makes the folder, whole or not at all; files with the same bytes share it.
    Weights are kept in float32, at a cost of four bytes a parameter: a block's scale times its
    integers fits no 16-bit format, and so the LM is the same as straight from the file.

    Args:
        path: The GGUF file.

    Raises:
        InputError: If a package that reads it is missing, or transformers cannot read what is in
            it.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / digest[:_NAME_LENGTH]
    if not folder.is_dir():
        if any(find_spec(name) is None for name in _NEEDED):
            raise InputError(f"{path} cannot be read without more packages: {from_clone('gguf')}")
        _check_is_read_right(path)
        print(f"{path.name}: unpacked once, into {folder}", file=sys.stderr, flush=True)
        _write(path, folder)
    return folder


def _check_is_read_right(path: Path) -> None:
    """Checks that transformers puts the rows of attention weights back in its own order.

    GGUF files of this family may leave out how many heads keys and values have, and then
    transformers leaves the rows as they are, without a word: it would be another LM.

    Raises:
        InputError: If it would not, or the file is damaged.
    """
    import gguf

    try:
        known = set(gguf.GGUFReader(path).fields)
    # The reader raises errors of many kinds about a damaged file.
    except Exception as error:
        raise InputError(f"cannot read the GGUF file {str(path)!r}: {reason_of(error)}") from None
    needed = "llama.attention.head_count_kv"
    if "llama.attention.head_count" in known and needed not in known:
        expected = f"expected {needed} in it, or collect.py --engine openai from its server"
        raise InputError(f"transformers would read {str(path)!r} wrongly: {expected}")


def _write(path: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        part = Path(temporary) / "lm"
        _convert(path, part)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise


def _convert(path: Path, folder: Path) -> None:
    import torch
    import transformers

    where, name = path.parent, path.name
    # Recent releases of transformers keep the weights in their blocks unless they are told not
    # to, and blocks cannot be saved.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.float32, **options
        )
    # Transformers raises errors of many kinds about a damaged file or an unknown architecture.
    except Exception as error:
        reason = reason_of(error)
        raise InputError(f"cannot read the GGUF file {str(path)!r}: {reason}") from None
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
