"""Companions of the weights in a model folder: configs, tokenizer, licence, modeling files."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from sa_models.errors import PostshareError

GENERATION_CONFIG = "generation_config.json"
AUTO_MAP = {
    "AutoConfig": "configuration.SharedLlamaConfig",
    "AutoModelForCausalLM": "modeling.SharedLlamaForCausalLM",
}
# The first three make a tokenizer; any one of them is enough.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
COMPANIONS = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_configs(config: LlamaConfig, folder: Path, origins: list[Path | None]) -> None:
    """Write config.json, and generation_config.json: the first that an origin has, or a new one."""
    config.save_pretrained(folder)
    for origin in origins:
        if origin is not None and (origin / GENERATION_CONFIG).is_file():
            shutil.copyfile(origin / GENERATION_CONFIG, folder / GENERATION_CONFIG)
            return
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def tokenizer_folder(tokenizer: Path | PreTrainedTokenizerBase | None) -> Path | None:
    """The local folder whose files are to be copied; None when the tokenizer has none."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        origin = Path(tokenizer.name_or_path)
        return origin if any((origin / name).is_file() for name in TOKENIZERS) else None
    return None if tokenizer is None else Path(tokenizer)


def copy_companions(origin: Path, folder: Path) -> None:
    """Copy tokenizer and licence files. Raises PostshareError when there is no tokenizer."""
    if not any((origin / name).is_file() for name in TOKENIZERS):
        raise PostshareError(
            f"{origin} has no tokenizer ({', '.join(TOKENIZERS)}); put its files there, or name "
            "the tokenizer's folder in model.tokenizer"
        )
    for pattern in COMPANIONS:
        for path in origin.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def copy_code(config: LlamaConfig, folder: Path) -> None:
    """Copy the modeling files, and name them in ``config.auto_map``.

    With them the folder loads where this package is not installed, if its user says
    ``trust_remote_code=True``. transformers itself tells which files these are.
    """
    package = Path(__file__).parents[1]
    modules = {entry.partition(".")[0] for entry in AUTO_MAP.values()}
    files = {package / f"{module}.py" for module in modules}
    for file in list(files):
        files.update(map(Path, get_relative_import_files(file)))
    for file in files:
        shutil.copyfile(file, folder / file.name)
    config.auto_map = dict(AUTO_MAP)
