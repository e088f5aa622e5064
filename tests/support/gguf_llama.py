"""A tiny Llama as a GGUF file, as llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PARTS = {
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
WORDS = [chr(256 + i) if i < 33 else chr(i) for i in range(126)] + ["Ġt", "he"]


def tiny_model() -> LlamaForCausalLM:
    """Four query heads of 16 on two KV heads, two layers, untied, vocabulary 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, 1.0, 0.1)
    return model


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{PARTS['.'.join(part)]}.weight"


def interleaved(rows: np.ndarray, width: int = 16) -> np.ndarray:
    """Row 2 i of each head is what row i was, row 2 i + 1 what row i + width / 2 was."""
    heads = rows.reshape(-1, width, rows.shape[1])
    out = np.empty_like(heads)
    out[:, 0::2], out[:, 1::2] = heads[:, : width // 2], heads[:, width // 2 :]
    return out.reshape(rows.shape)


def write_gguf(
    file: Path,
    kind: str = "Q8_0",
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
    pre: str | None = "smollm",
) -> dict[str, torch.Tensor]:
    """Write `tiny_model` with its matrices rounded to `kind`, norms in F32.

    Args:
        keys: of the header, written too: a number or a string.
        more: tensors that a plain Llama has not.
        pre: how its tokenizer cuts; None writes no tokenizer.

    Returns:
        What a reader must find, fp32, by the names of transformers.
    """
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(128)
    for key, value in (keys or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(WORDS)
        writer.add_token_types([1] * 128)
        writer.add_token_merges(["Ġ t", "h e"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    found = {}
    for name, value in tiny_model().state_dict().items():
        rows = value.float().numpy()
        stored = rows
        if kind != "F32" and rows.ndim == 2:
            form = gguf.GGMLQuantizationType[kind]
            stored = gguf.quants.quantize(rows, form)
            found[name] = torch.from_numpy(np.array(gguf.quants.dequantize(stored, form)))
            if "q_proj" in name or "k_proj" in name:
                stored = gguf.quants.quantize(interleaved(rows), form)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=form)
            continue
        found[name] = torch.from_numpy(rows.copy())
        if "q_proj" in name or "k_proj" in name:
            stored = interleaved(rows)
        writer.add_tensor(gguf_name(name), stored)
    for name, rows in (more or {}).items():
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
