"""The shape of a model from its config alone, for arithmetic before any download.

Gated models cannot be reached without an account, nor the hub from every machine. For estimates,
and for nothing else, the shapes of the public Llamas are therefore written down here.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.errors import PostshareError
from train.demo import DEMO_BASE, demo_base_path
from train.demo.smollm2 import SMOLLM2
from train.models.gguf_file import is_gguf, read_gguf

if TYPE_CHECKING:
    from train.recipe.recipe import ModelSection

_PROBE_SECONDS = 5.0
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class LlamaShape:
    """The fields of a LlamaConfig that count; one that a config leaves out has the default.

    Attribute names are those of LlamaConfig, so that the plan's arithmetic reads either.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, config: dict[str, Any], origin: str) -> LlamaShape:
        """Read it from the JSON of a config.

        Raises:
            PostshareError: not a Llama, or a size that is no positive integer.
        """
        kind = config.get("model_type", "llama")
        if kind == "mistral":  # an export with fewer heads, perhaps
            from sa_models.weights.uneven_heads import as_llama

            config = as_llama(config)
            kind = config["model_type"]
        if kind != "llama":
            raise PostshareError(
                f"{origin} is a {kind!r} model; only the Llama architecture "
                "(model_type 'llama') can be shared"
            )
        names = {field.name for field in fields(cls)}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        values.setdefault("dtype", config.get("torch_dtype") or cls.dtype)
        for key in values.keys() & {f.name for f in fields(cls) if "int" in str(f.type)}:
            if type(values[key]) is not int or values[key] < 1:
                raise PostshareError(f"{origin}: {key} is {values[key]!r}; correct its config.json")
        if values["dtype"] not in DTYPE_BYTES:
            raise PostshareError(f"{origin}: dtype is {values['dtype']!r}; use a float type")
        return cls(**values)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of the stored weights."""
        return DTYPE_BYTES[self.dtype]


_7B = LlamaShape(max_position_embeddings=4096, dtype="float16")
_13B = LlamaShape(32000, 5120, 13824, 40, 40, 40, None, 4096, dtype="float16")
_70B = LlamaShape(32000, 8192, 28672, 80, 64, 8, None, 4096, dtype="float16")
_3_8B = LlamaShape(128256, 4096, 14336, 32, 32, 8, None, 8192, dtype="bfloat16")
_3_70B = LlamaShape(128256, 8192, 28672, 80, 64, 8, None, 8192, dtype="bfloat16")
_31_8B = LlamaShape(128256, 4096, 14336, 32, 32, 8, None, 131072, dtype="bfloat16")
_31_70B = LlamaShape(128256, 8192, 28672, 80, 64, 8, None, 131072, dtype="bfloat16")
_32_1B = LlamaShape(128256, 2048, 8192, 16, 32, 8, 64, 131072, True, dtype="bfloat16")
_32_3B = LlamaShape(128256, 3072, 8192, 28, 24, 8, 128, 131072, True, dtype="bfloat16")
_SMOLLM2 = LlamaShape(49152, 576, 1536, 30, 9, 3, 64, 8192, True, dtype="bfloat16")

KNOWN: dict[str, LlamaShape] = {
    "meta-llama/Llama-2-7b-hf": _7B,
    "meta-llama/Llama-2-7b-chat-hf": _7B,
    "meta-llama/Llama-2-13b-hf": _13B,
    "meta-llama/Llama-2-13b-chat-hf": _13B,
    "meta-llama/Llama-2-70b-hf": _70B,
    "meta-llama/Llama-2-70b-chat-hf": _70B,
    "meta-llama/Meta-Llama-3-8B": _3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _3_8B,
    "meta-llama/Meta-Llama-3-70B": _3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _3_70B,
    "meta-llama/Llama-3.1-8B": _31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _31_8B,
    "meta-llama/Llama-3.1-70B": _31_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _31_70B,
    "meta-llama/Llama-3.2-1B": _32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _32_1B,
    "meta-llama/Llama-3.2-3B": _32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _32_3B,
    SMOLLM2: _SMOLLM2,
}


def find_shape(model: ModelSection) -> tuple[LlamaShape, str]:
    """The shape of a recipe's model, and where it was found.

    Looked for in model.config, a GGUF file's header, a local folder, the hub's cache, the hub (one
    try of 5 seconds), and last in the table above.

    Raises:
        PostshareError: found nowhere, or not a Llama.
    """
    if model.config is not None:
        return LlamaShape.from_dict(model.config, "model.config"), "model.config"
    if model.path == SMOLLM2:  # nothing is made for a dry run
        return KNOWN[SMOLLM2], "built-in table of Llama shapes"
    if is_gguf(model.path):
        file = Path(model.path).expanduser()
        return LlamaShape.from_dict(read_gguf(file).config, str(file)), str(file)
    folder = _local_folder(model.path)
    if folder is not None:
        file = folder / "config.json"
        if not file.is_file():
            raise PostshareError(
                f"{folder} has no config.json; give the folder of a Hugging Face Llama"
            )
        return _read(file.read_text(encoding="utf-8", errors="replace"), str(file)), str(file)
    if cached := _cached(model):
        text = Path(cached).read_text(encoding="utf-8", errors="replace")
        return _read(text, cached), "the hub's cache"
    answer, problem = _probe(model)
    if answer is not None:
        return _read(answer, model.path), "the hub"
    if model.path in KNOWN:
        return KNOWN[model.path], f"built-in table of Llama shapes ({problem})"
    raise PostshareError(
        f"model {model.path!r} is neither a local folder nor cached, and {problem}; give a local "
        "folder, or run `hf auth login` and `postshare prepare` where the hub can be reached"
    )


def _local_folder(path: str) -> Path | None:
    if path == DEMO_BASE:
        return demo_base_path()
    folder = Path(path).expanduser()
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    return folder if folder.is_dir() or looks_local else None


def _read(text: str, origin: str) -> LlamaShape:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise PostshareError(f"{origin} is not valid JSON ({error}); copy it again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise PostshareError(f"{origin} names no model_type; give a Hugging Face Llama")
    return LlamaShape.from_dict(config, origin)


def _cached(model: ModelSection) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None


def _probe(model: ModelSection) -> tuple[str | None, str]:
    """The config's text from the hub, or None and why not; one try, as a dry run takes seconds."""
    from huggingface_hub import constants, get_token, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    try:
        url = hf_hub_url(model.path, "config.json", revision=model.revision)
    except HFValidationError:
        return None, "is no hub name (owner/name)"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
            return answer.read().decode("utf-8"), ""
    except urllib.error.HTTPError as error:
        return None, f"the hub refuses it (HTTP {error.code}: gated, private or absent)"
    except (OSError, ValueError):
        return None, "the hub cannot be reached"
