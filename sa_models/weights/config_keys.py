"""Keys of a config.json by which transformers 5 and 4 read the same model.

transformers 5 writes what 4 calls ``rope_theta`` and ``rope_scaling`` into ``rope_parameters``. 4,
and what is built on it, takes the keys that it misses for a theta of 10,000 and no scaling, and
says nothing: the file has both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sa_models.weights.config_file import CONFIG
from sa_models.weights.uneven_heads import written_config


def write_config(config: LlamaConfig, folder: Path) -> None:
    """Write config.json into an existing folder; see :func:`written_config` for its class."""
    written_config(config).save_pretrained(folder)
    write_values(json.loads((folder / CONFIG).read_text(encoding="utf-8")), config, folder)


def write_values(values: Mapping[str, Any], config: LlamaConfig, folder: Path) -> None:
    """Write these values as config.json, with the keys of transformers 4 for what ``config`` says.

    Args:
        values: of a config.json that any version of transformers has written.
        config: that is read from it.
    """
    text = json.dumps({**values, **earlier_keys(config)}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def earlier_keys(config: LlamaConfig) -> dict[str, Any]:
    """The keys of transformers 4 for what a config says."""
    values = config.to_dict()
    rope = dict(values["rope_parameters"])
    found: dict[str, Any] = {"rope_theta": rope.pop("rope_theta")}
    if values["dtype"] is not None:
        found["torch_dtype"] = values["dtype"]
    kind, partial = rope.get("rope_type", "default"), rope.pop("partial_rotary_factor", None)
    if partial is not None and kind != "default":  # there 5 does without it
        found["partial_rotary_factor"] = partial
    if kind in ("yarn", "longrope"):
        _say_what_is_derived(rope, values["max_position_embeddings"])
    if kind == "longrope":  # 4 reads it outside
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    found["rope_scaling"] = None if kind == "default" else rope
    return found


def _say_what_is_derived(rope: dict[str, Any], length: int) -> None:
    """Put in what 4 derives in another way than 5, where the file leaves it open.

    For yarn 4 does not know a factor of none. For longrope it takes the ratio of the two lengths
    for the factor even where there is one.
    """
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor")
    if rope["rope_type"] == "yarn":
        rope["factor"] = length / original if factor is None else factor
    elif factor not in (None, length / original) and rope.get("attention_factor") is None:
        grows = math.log(factor) / math.log(original) if factor > 1 else 0
        rope["attention_factor"] = math.sqrt(1 + grows)
