"""Under ZeRO-3 and FSDP2 a model is whole on no rank at load, and is the same model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.launcher import run

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("loading_worker.py")


def save(folder: Path, dtype: torch.dtype, **sizes: int) -> int:
    """Save a Llama; its fp32 bytes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="400MB")
    return 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_streamed_model_is_the_one_loaded_whole(config: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 49}
    save(tmp_path, torch.bfloat16, **sizes, **heads)
    output = run(config, WORKER, "equal", tmp_path, processes=3, timeout=400)
    assert output.count("3 cases equal") == 3, output


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_no_rank_holds_the_whole_model_at_load(config: str, tmp_path: Path) -> None:
    """A model of 400 MB; the largest tensor has 16 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 7}
    whole = save(
        tmp_path,
        torch.float32,
        **sizes,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    output = run(config, WORKER, "memory", tmp_path, "streamed", processes=2, timeout=300)
    rows = [json.loads(row) for row in re.findall(r"memory (\{.*\})", output)]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    for row in rows:
        added = row["loaded"] - row["base"]
        assert 0.5 * whole < added < 0.75 * whole, (row, whole)
