"""The tokenizer of a recipe: of a folder, of a hub name, or made here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sa_models.errors import PostshareError
from sa_models.weights.companion_files import TOKENIZER_CONFIG, TOKENIZERS
from sa_models.weights.config_file import read_json
from train.data.local.files import STDLIB
from train.models.gguf_folder import named_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
OBJECTS = (FAST, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
PROBE = "The quick brown fox, aged 27, can't jump over 3 lazy dogs.\nIt (really) tried."


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, of a named base or GGUF file; stdlib: trained now, in
    seconds. Code that comes with a tokenizer is never run, and nobody is asked whether to.

    Raises:
        PostshareError: there is none; it cannot be read; its class makes other tokens than its
            file; or it cannot be had offline or without permission.
    """
    from transformers import AutoTokenizer

    if name == STDLIB:
        from train.demo.tokenizer import train_tokenizer

        return train_tokenizer()
    local = named_base(name) or Path(name).expanduser()
    is_local = local.is_dir()
    if is_local:
        _check_files(local)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if is_local else name, revision=revision, trust_remote_code=False
        )
        tokenizer(PROBE)
    except Exception as error:  # what reads tokenizer.json raises Exception itself
        reason = " ".join(str(error).split())[:200]
        if type(error) not in (OSError, ValueError, Exception):
            reason = f"{type(error).__name__}: {reason}"
        cure = _cure_of_folder(local, error) if is_local else _cure_of_name(name, error)
        raise PostshareError(f"no tokenizer can be loaded from {name} ({reason}); {cure}") from None
    if is_local:
        _check_tokens(tokenizer, local)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raises PostshareError where a folder has no tokenizer, or a file of it is no JSON object."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise PostshareError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZERS)}); set model.tokenizer to a folder "
            f"with {FAST}"
        )
    for name in OBJECTS:
        if (folder / name).is_file():
            read_json(folder / name)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises PostshareError where the class that its config names makes other tokens than its file.

    transformers 5 builds a `LlamaTokenizer`, say, of the file's vocabulary alone, and cuts text as
    Llama 2 does, whatever the file says.
    """
    backend, settings = getattr(tokenizer, "backend_tokenizer", None), folder / TOKENIZER_CONFIG
    if backend is None or not (folder / FAST).is_file():
        return
    if settings.is_file() and "add_prefix_space" in read_json(settings):
        return  # other tokens are asked for
    stored = Tokenizer.from_file(str(folder / FAST))
    of_file, of_class = (t.encode(PROBE, add_special_tokens=False).ids for t in (stored, backend))
    if of_file != of_class:
        raise PostshareError(
            f"{folder}: {type(tokenizer).__name__}, the class that transformers takes for it, "
            f"makes other tokens than {FAST} says; set tokenizer_class to "
            f"PreTrainedTokenizerFast in {TOKENIZER_CONFIG}"
        )


def _cure_of_folder(folder: Path, error: Exception) -> str:
    other = f"set model.tokenizer to a folder with {FAST}"
    if "trust_remote_code" in str(error):
        return f"its own code (auto_map) is never run: {other}"
    if not (folder / FAST).is_file() and (folder / SENTENCEPIECE).is_file():
        return (
            f"{SENTENCEPIECE} alone needs sentencepiece (pip install sentencepiece protobuf); or "
            f"save it anew with AutoTokenizer.save_pretrained where that is, and {other}"
        )
    return other


def _cure_of_name(name: str, error: Exception) -> str:
    if "gated" in str(error).lower():
        return (
            f"it is gated: accept its terms at https://huggingface.co/{name}, run "
            "`hf auth login`, then `postshare prepare RECIPE`"
        )
    if "trust_remote_code" in str(error):
        return f"its own code (auto_map) is never run: set model.tokenizer to one with {FAST}"
    return (
        "correct model.tokenizer (or model.path), or run `postshare prepare RECIPE` on a "
        "machine with network"
    )
