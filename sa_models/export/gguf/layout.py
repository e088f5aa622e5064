"""The layout of a Llama with a sharing plan in GGUF: architecture, keys of the header, tensors.

============  ==================================================================================
``llama``     every layer has as many heads: nothing is removed, or as many units of each layer
``deci``      layers differ: head counts are arrays, a dropped layer has no attention tensors
============  ==================================================================================

Neither knows ties or factors: they are stored where they are used, multiplied out. Of removed units
nothing is stored, with one exception: llama.cpp takes the width of all heads from the first layer,
which therefore keeps a unit, of zeros, and its norm where it is dropped.

llama.cpp rotates consecutive pairs of a head's features, transformers pairs that are half a head
apart: rows of q and k are stored in the order of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import dense_config
from sa_models.weights.parameter_shapes import llama_shapes

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
BLOCKS: dict[Kind, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
}
"""By type: weights of a block, consecutive in a row, and the bytes that it takes."""
FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}
"""``general.file_type``, by which tools name a file's quantization."""
EMBEDDINGS = ("token_embd.weight", "output.weight")
ROPE_FACTORS = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens.weight": EMBEDDINGS[0],
    "lm_head.weight": EMBEDDINGS[1],
    "model.norm.weight": "output_norm.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROTATIONS = ("default", "linear", "llama3")
"""What of ``rope_type`` is written; others depend on the length of the text."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: llama.cpp's.
        source: the dense weight that it is made of; None: it is made of the config.
        shape: (features,), or (outputs, inputs).
        kind: how it is stored.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file, without padding."""
        weights, size = BLOCKS[self.kind]
        count = 1
        for length in self.shape:
            count *= length
        return count // weights * size


class GgufLayout:
    """What a file says and stores of a model.

    Args:
        config: the dense config, as the base has it or with the plan's KV heads.
        plan: without spans.
        to: the type of the matrices.

    Attributes:
        heads: the attention shape, with the plan's KV heads.
        kept: for every layer, the units that are stored, ascending.

    Raises:
        PostshareError: llama.cpp computes no such model: spans, another activation, or a rotation
            that depends on the length of the text.
    """

    def __init__(self, config: LlamaConfig, plan: SharingPlan, to: Kind) -> None:
        check_plan(plan)
        check_config(config)
        plan = plan.effective()
        self.config, self.plan, self.to = config, plan, to
        self.heads = plan.layout(config)
        kept = plan.kept_units(self.heads)
        self.kept = [kept[0] or [0], *kept[1:]]

    @cached_property
    def architecture(self) -> str:
        return "llama" if len(set(map(len, self.kept))) == 1 else "deci"

    def keys(self) -> dict[str, Any]:
        """The header's keys about the architecture: numbers, strings, and a list for what differs
        from layer to layer."""
        config, heads = self.config, self.heads
        rope: Any = config.rope_parameters
        kv_heads = [len(kept) for kept in self.kept]
        query_heads = [count * heads.heads_per_unit for count in kv_heads]
        inner = [config.intermediate_size] * heads.layers
        differ = self.architecture == "deci"
        values: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": heads.layers,
            "feed_forward_length": inner if differ else inner[0],
            "attention.head_count": query_heads if differ else query_heads[0],
            "attention.head_count_kv": kv_heads if differ else kv_heads[0],
            "attention.key_length": heads.head_dim,
            "attention.value_length": heads.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": heads.head_dim,
            "rope.freq_base": float(rope["rope_theta"]),
        }
        if rope["rope_type"] == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def rope_factors(self) -> torch.Tensor | None:
        """What llama.cpp divides the frequencies of a head by, fp32 (head_dim / 2,); None: 1."""
        rope: Any = self.config.rope_parameters
        if rope["rope_type"] != "llama3":
            return None
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        powers = torch.arange(0, self.heads.head_dim, 2, dtype=torch.float32) / self.heads.head_dim
        return (1.0 / rope["rope_theta"] ** powers) / frequencies

    @cached_property
    def tensors(self) -> list[GgufTensor]:
        """What is stored, in the order of the layers."""
        lost = self.plan.dropped_names(self.heads)
        lost -= {self.heads.norm_name(0), *(self.heads.parameter_name(0, p) for p in PROJECTIONS)}
        shapes = {
            name: shape
            for name, shape in llama_shapes(_pooled(self.config, self.heads)).items()
            if name not in lost
        }
        found = []
        if (factors := self.rope_factors()) is not None:
            found.append(GgufTensor(ROPE_FACTORS, None, tuple(factors.shape), "f32"))
        for source, dense in shapes.items():
            where = HeadLayout.parse_name(source)
            shape = dense
            if where is not None:
                layer, projection = where
                shape = self.heads.with_units(len(self.kept[layer])).shape(projection)
            name = gguf_name(source)
            found.append(GgufTensor(name, source, shape, self._kind(name, shape)))
        return found

    def unblocked(self) -> list[str]:
        """The matrices whose rows the blocks of the type do not divide, which are f16 instead."""
        if BLOCKS[self.to][0] == 1:
            return []
        return [t.name for t in self.tensors if len(t.shape) == 2 and t.kind == "f16"]

    def _kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """As llama.cpp's own tools: vectors in f32, embeddings in 8 bits where others have 4."""
        if len(shape) == 1:
            return "f32"
        if shape[-1] % BLOCKS[self.to][0]:
            return "f16"
        return "q8_0" if name in EMBEDDINGS and self.to in ("q4_0", "q4_1") else self.to

    def rows(self, source: str) -> tuple[int, torch.Tensor] | None:
        """Which features of a dense weight are stored, in which order: (axis, indices), int64;
        None: all, as they are."""
        where = HeadLayout.parse_name(source)
        if where is None:
            return None
        layer, projection = where
        width, size = self.heads.width(projection), self.heads.head_dim
        units = torch.tensor(self.kept[layer])
        features = (units[:, None] * width + torch.arange(width)).flatten()
        if projection in "qk":
            features = features.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten()
        elif len(units) == self.heads.units:
            return None
        return self.heads.axis(projection), features


def check_plan(plan: SharingPlan) -> None:
    """Raises PostshareError for a plan that no architecture of llama.cpp computes."""
    if plan.spans:
        raise PostshareError(
            "a plan with spans has no GGUF form: llama.cpp has no Llama whose layers reuse "
            "another's attention; leave GGUF out, or make a plan without spans"
        )


def check_config(config: LlamaConfig) -> None:
    """Raises PostshareError for a Llama that llama.cpp's computes otherwise."""
    if config.hidden_act != "silu":
        raise PostshareError(
            f"the model's hidden_act is {config.hidden_act!r}, and llama.cpp's Llama computes "
            "silu: it has no GGUF form; leave GGUF out"
        )
    kind = config.rope_parameters["rope_type"]  # type: ignore[index]
    if kind not in ROTATIONS:
        raise PostshareError(
            f"the model's rope_type is {kind!r}, which is not written as GGUF "
            f"({', '.join(ROTATIONS)} are); leave GGUF out"
        )


def gguf_name(source: str) -> str:
    """llama.cpp's name of a Llama's parameter."""
    if source in _OUTSIDE:
        return _OUTSIDE[source]
    _, _, layer, *part, last = source.split(".")
    return f"blk.{layer}.{_INSIDE['.'.join(part)]}.{last}"


def _pooled(config: LlamaConfig, heads: HeadLayout) -> LlamaConfig:
    pooled = dense_config(config)
    pooled.num_key_value_heads = heads.kv_heads
    return pooled


__all__ = ["BLOCKS", "GgufLayout", "GgufTensor", "Kind"]
