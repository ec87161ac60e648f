"""A language model and its tokenizer, by hub name or from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from haltwise import InputError
from haltwise.engine.token_rules import tokenizer_fingerprint
from haltwise.errors import reason_of
from lms.chat import Chat, ChatConfig, detect_chat
from lms.embedded import EMBEDDED
from lms.gguf_file import folder_of, is_gguf
from lms.hub_names import ask_hub, is_hub_name, nearby

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The errors that transformers raises when an LM cannot be loaded.
LOAD_ERRORS = (
    *(OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError, SafetensorError),
)

# The number of parameters below which threads wait for each other more than they work.
_SMALL = 20_000_000


@dataclass(frozen=True, kw_only=True)
class LMConfig(ChatConfig):
    """Which LM, where it runs, and what is known about it."""

    lm: str = "embedded"
    """The LM: its hub name, a local folder or a GGUF file; embedded is the one of this
    repository."""
    device: str = "cpu"
    """The device that the LM runs on, as PyTorch names it."""


@dataclass(frozen=True)
class LanguageModel:
    """An LM that is ready to run."""

    name: str
    """The LM's hub name, or the name of its folder, or of its file without .gguf."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_config: ChatConfig = field(default_factory=ChatConfig)

    @classmethod
    def load(
        cls, name: str | Path, device: str = "cpu", chat: ChatConfig | None = None
    ) -> LanguageModel:
        """Loads whatever AutoModelForCausalLM loads, in bfloat16 on a GPU, in float32 on a CPU.

        A small LM makes PyTorch use one thread from then on, which is several times faster.
        Every token that ends what the LM says is set in its generation config: the config's own,
        the tokenizer's, and the one that the chat template puts behind an answer.

        Args:
            name: A hub name, a local folder or a GGUF file; "embedded" is the LM of this
                repository.
            device: The device to run on, as PyTorch names it.
            chat: What a person states about the LM's chat; None if all of it is to be detected.

        Raises:
            InputError: If there is no such LM or device, the LM is damaged, its chat makes no
                sense, or nothing ends what it says.
        """
        source = source_of(name)
        check_device(device)
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # else it is shown for the smallest LM, amid an error's one line
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        try:
            tokenizer = load_tokenizer(source)
            check_settings(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            model, found = loaded
            _check_weights(found)
        except LOAD_ERRORS as error:
            is_weights = isinstance(error, SafetensorError)
            told = ": expected whole weights, no pointer of Git LFS" if is_weights else ""
            raise InputError(
                f"cannot load an LM from {str(name)!r}: {reason_of(error)}{told}"
            ) from None
        if model.num_parameters() < _SMALL:
            torch.set_num_threads(1)
        model.eval().to(device)
        lm = cls(short_name(name, source), model, tokenizer, chat or ChatConfig())
        lm.set_end_tokens()
        return lm

    def set_end_tokens(self) -> None:
        """Sets every token that ends what the LM says, in its generation config.

        Raises:
            InputError: If there is no such token, or the config's own are no tokens.
        """
        config = self.model.generation_config
        stated = config.eos_token_id
        if not all(isinstance(token, int | None) for token in _listed(stated)):
            raise InputError(
                f"eos_token_id of {self.name!r} is {stated!r}, expected a token's number, or a "
                "list of them, in its generation_config.json"
            )
        ends = [self.chat.turn_end, self.tokenizer.eos_token_id, *_listed(stated)]
        size = self.model.config.get_text_config(decoder=True).vocab_size
        known = list(dict.fromkeys(token for token in ends if token in range(size)))
        if not known:
            raise InputError(
                f"nothing ends what {self.name!r} says: expected eos_token_id in its "
                "generation_config.json, or eos_token in its tokenizer_config.json"
            )
        config.eos_token_id = known
        if self.tokenizer.eos_token is None:  # the end of a thought in the open is seen by it
            self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(known[0])

    @cached_property
    def chat(self) -> Chat:
        """How the LM is asked and how it thinks."""
        return detect_chat(self.tokenizer, self.chat_config)

    def prompt(self, text: str) -> str:
        """Returns the LM's whole input for what a user asks.

        Raises:
            InputError: If the LM's chat template refuses it.
        """
        return self.chat.prompt(text)

    @property
    def temperature(self) -> float:
        """The LM's own sampling temperature; 0 if it prefers the likeliest token.

        Raises:
            InputError: If its generation config has another thing in that place.
        """
        config = self.model.generation_config
        if not config.do_sample:
            return 0.0
        stated = 1.0 if config.temperature is None else config.temperature
        if not isinstance(stated, int | float) or not 0 <= stated < float("inf"):
            raise InputError(
                f"temperature of {self.name!r} is {stated!r}, expected a number from 0 in its "
                "generation_config.json, or --temperature"
            )
        return float(stated)

    @property
    def context(self) -> float:
        """The number of tokens that the LM sees at once; infinite if there is no limit."""
        config = self.model.config.get_text_config(decoder=True)
        return float(getattr(config, "max_position_embeddings", None) or "inf")

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the LM's tokenizer, by which a head knows it."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def revision(self) -> str:
        """The hub's commit of the LM, or the SHA-256 of its weights if it is from a folder."""
        import torch

        commit = getattr(self.model.config, "_commit_hash", None)
        if commit:
            return str(commit)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()


def check_device(device: str) -> None:
    """Refuses a device that PyTorch does not reach here.

    Args:
        device: As PyTorch names it.

    Raises:
        InputError: If there is none of that name, or this build of PyTorch is not for it.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"cannot use device {device!r}: {reason_of(error)}; expected --device cpu, or a build "
            "of torch for a device of this machine"
        ) from None


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [tokens]


def _check_weights(found: Mapping[str, Any]) -> None:
    """Refuses weights that do not fill an LM: transformers would draw the rest at random.

    Args:
        found: What `from_pretrained` tells of loading.

    Raises:
        InputError: If a tensor is missing, or has another shape.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1:,} more" * (len(missing) > 1)
        raise InputError(f"its weights lack {missing[0]}{more}, which its config.json expects")
    for name, there, expected in sorted(found["mismatched_keys"]):
        raise InputError(
            f"its weights have {name} of shape {tuple(there)}, expected {tuple(expected)} as its "
            "config.json says"
        )


def check_settings(source: str) -> None:
    """Refuses a damaged generation config of a folder: transformers would pass over it.

    Raises:
        InputError: If it is none; a folder may have no such file.
    """
    from transformers import GenerationConfig

    file = Path(source) / "generation_config.json"
    try:
        if file.exists():
            GenerationConfig.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: {reason_of(error)}: expected an object of settings") from None


def check_name(name: str | Path) -> None:
    """Refuses, at once, an LM's name that nothing can be loaded from.

    Raises:
        InputError: If it is neither "embedded" nor a name of the hub, and there is no such folder
            or GGUF file, or the folder is a head's.
    """
    told, folder = f"cannot load an LM from {str(name)!r}", Path(name)
    if str(name) == "embedded":
        return
    if is_gguf(name):
        if not folder.is_file():
            raise InputError(f"{told}: expected a GGUF file there{nearby(str(name))}")
    elif (folder / "head.json").exists():
        raise InputError(f"{told}: it holds a head, expected the folder of an LM")
    elif not str(name).strip() or not (folder.is_dir() or is_hub_name(str(name))):
        raise InputError(
            f"{told}: expected 'embedded', a folder, a GGUF file, or OWNER/NAME of the hub"
            f"{nearby(str(name))}"
        )


def source_of(name: str | Path) -> str:
    """Returns the hub name or folder that an LM of some name is loaded from.

    Raises:
        InputError: If the name is none, that of a GGUF file that cannot be read, or of an LM that
            is neither on the hub nor, if the hub cannot be asked, in its cache.
    """
    check_name(name)
    if str(name) == "embedded":
        return str(EMBEDDED)
    if is_gguf(name):
        return str(folder_of(Path(name)))
    if not Path(name).is_dir():
        _find_on_hub(str(name))
    return str(name)


def _find_on_hub(name: str) -> None:
    """Raises InputError if an LM is neither on the hub nor in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    told = f"cannot load an LM from {name!r}"
    try:
        trouble = ask_hub(name, "model")
    except InputError as error:
        raise InputError(f"{told}: {error}") from None
    if trouble and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise InputError(
            f"{told}: {trouble}, and its cache here has no such LM; "
            "expected a folder or a GGUF file where it is not at hand"
        )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a hub name or folder.

    Raises:
        InputError: If there is none; transformers then makes up one that knows no text.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise InputError("found no tokenizer, expected its files beside the weights")
    return tokenizer


def short_name(name: str | Path, source: str) -> str:
    """Returns what an LM is called: its hub name, or the name of its folder or file.

    Args:
        name: The name that a person has given.
        source: The hub name or folder that `source_of` has found for it.
    """
    if is_gguf(name):
        return Path(name).stem
    return Path(source).resolve().name if Path(source).is_dir() else str(name)
