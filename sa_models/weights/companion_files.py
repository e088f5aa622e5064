"""Companions of the weights in a model folder: configs, tokenizer, licence, modeling files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import metadata_load
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from yaml import YAMLError

from sa_models.errors import PostshareError
from sa_models.weights.config_file import GENERATION_CONFIG, read_json
from sa_models.weights.config_keys import write_config

AUTO_MAP = {
    "AutoConfig": "entry.SharedLlamaConfig",
    "AutoModel": "entry.SharedLlamaModel",
    "AutoModelForCausalLM": "entry.SharedLlamaForCausalLM",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Each of them makes a tokenizer."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *TOKENIZERS,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
TERMS = (
    "*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "[Cc][Oo][Pp][Yy][Ii][Nn][Gg]*",
    "*[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "*[Uu][Ss][Ee][-_][Pp][Oo][Ll][Ii][Cc][Yy]*",
)
"""Under which conditions a model may be used and passed on: files, or folders of them."""
MODEL_CARD = "README.md"
FETCHED = ("*.safetensors", "*.json", "*.model", "tokenizer*", MODEL_CARD, *TOKENIZER_FILES, *TERMS)
"""What is taken of a model on the hub: weights, configs, and all that an export passes on."""


def companions(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """The files of a folder that match, such as :data:`TOKENIZER_FILES` or :data:`TERMS`."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            inside = path.rglob("*") if path.is_dir() else [path]
            yield from sorted(file for file in inside if file.is_file())


def write_configs(config: LlamaConfig, folder: Path, origins: Sequence[Path | None]) -> None:
    """Write config.json, and generation_config.json: the first that an origin has, or a new one."""
    write_config(config, folder)
    if not copy_generation_config(origins, folder):
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def copy_generation_config(origins: Sequence[Path | None], folder: Path) -> bool:
    """Copy the first generation_config.json that an origin has. Returns whether one has it."""
    for origin in origins:
        if origin is not None and (origin / GENERATION_CONFIG).is_file():
            shutil.copyfile(origin / GENERATION_CONFIG, folder / GENERATION_CONFIG)
            return True
    return False


def tokenizer_folder(tokenizer: Path | PreTrainedTokenizerBase | None) -> Path | None:
    """The local folder whose files are to be copied; None when the tokenizer has none."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        origin = Path(tokenizer.name_or_path)
        return origin if any((origin / name).is_file() for name in TOKENIZERS) else None
    return None if tokenizer is None else Path(tokenizer)


def write_tokenizer(tokenizer: Path | PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Copy a tokenizer's files, or save a tokenizer that has none; None writes nothing.

    Raises:
        PostshareError: its folder holds no tokenizer, or a config that is no JSON.
    """
    origin = tokenizer_folder(tokenizer)
    if origin is not None:
        require_tokenizer(origin)
        copy_tokenizer(origin, folder)
    elif isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder)
        _write_tokenizer_config(folder / TOKENIZER_CONFIG, folder)


def require_tokenizer(folder: Path) -> None:
    """Raises PostshareError where a folder has none of :data:`TOKENIZERS`."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise PostshareError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZERS)}); put its files there, or "
            "name the tokenizer's folder in model.tokenizer"
        )


def copy_tokenizer(origin: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, those that there are; a link becomes a file."""
    for path in companions(origin, TOKENIZER_FILES):
        _copy(path, folder / path.relative_to(origin))
    if (origin / TOKENIZER_CONFIG).is_file():
        _write_tokenizer_config(origin / TOKENIZER_CONFIG, folder)


def copy_terms(model: Path, tokenizer: Path | None, folder: Path) -> None:
    """Copy the licence files of a model and of its tokenizer, where they are two folders.

    The tokenizer's get a name of their own where they are others than the model's.
    """
    for path in companions(model, TERMS):
        _copy(path, folder / path.relative_to(model))
    if tokenizer is None:
        return
    for path in companions(tokenizer, TERMS):
        target = folder / path.relative_to(tokenizer)
        if target.is_file() and target.read_bytes() != path.read_bytes():
            target = target.with_name(f"tokenizer-{target.name}")
        _copy(path, target)


def licence_of(model: Path, folder: Path) -> dict[str, str]:
    """The licence of a model, as the front matter of a card has it on the hub.

    What the model's own card says; else ``other``, with a licence file of the folder; nothing where
    neither is there.
    """
    card = model / MODEL_CARD
    try:
        said = (metadata_load(card) or {}) if card.is_file() else {}
    except (OSError, ValueError, YAMLError):  # a foreign file that is no card
        said = {}
    if isinstance(said.get("license"), str):
        keys = ("license", "license_name", "license_link")
        return {key: str(said[key]) for key in keys if said.get(key)}
    files = sorted(path.relative_to(folder).as_posix() for path in companions(folder, TERMS[:1]))
    if not files:
        return {}
    return {"license": "other", "license_name": "of-the-base", "license_link": files[0]}


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _write_tokenizer_config(source: Path, folder: Path) -> None:
    """Write tokenizer_config.json, with the names of transformers 4 for what only 5 knows."""
    values = read_json(source)
    renamed = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        tokens = renamed.pop("extra_special_tokens")
        renamed |= {"additional_special_tokens": tokens} if tokens else {}
    if renamed != values:
        text = json.dumps(renamed, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def code_files(auto_map: Mapping[str, str]) -> set[str]:
    """The files that a config's ``auto_map`` names."""
    return {f"{entry.partition('.')[0]}.py" for entry in auto_map.values()}


def copy_code(config: LlamaConfig, folder: Path) -> None:
    """Copy the modeling files, and name them in ``config.auto_map``.

    With them the folder loads where this package is not installed, if its user says
    ``trust_remote_code=True``. transformers itself tells which files these are.
    """
    package = Path(__file__).parents[1]
    for name in code_files(AUTO_MAP):
        shutil.copyfile(package / name, folder / name)
        for file in get_relative_import_files(package / name):
            shutil.copyfile(file, folder / Path(file).name)
    config.auto_map = dict(AUTO_MAP)
