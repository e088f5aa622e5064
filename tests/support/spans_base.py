"""A small base model in a folder, and recipes on it: spans and KV heads through the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.plan import SharingPlan
from tests.support.reference import Reference
from train.distributed.engines.start import start
from train.recipe.recipe import Recipe, validate
from train.stages.run import Run

# Threads that wait for each other between tiny operations take longer than the operations.
torch.set_num_threads(1)

LAYERS, HEADS, HEAD_DIM, HIDDEN, LENGTH = 6, 4, 8, 32, 32
TEXT = """
Importing the package registers the compact model with the Auto classes of the library, so that a
call of from_pretrained loads a compact folder. What sharing is: plans, units, similarity,
materializing, compact models, exporting. Every stage reads files and writes files.
"""


def write_base(folder: Path) -> Path:
    """A random Llama for the demo's tokenizer, whose layers differ enough for losses to differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 0.25  # what the layers add then matters
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight *= 2
    model.save_pretrained(folder)
    return folder


def write_text(file: Path) -> Path:
    words = TEXT.split()
    rows = [" ".join(words[i % len(words) :] + words[: i % len(words)]) for i in range(24)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def recipe(home: Path, folder: Path, **sections: Any) -> Recipe:
    """A recipe without ties on the base and the text in ``home``; ``...`` removes a key."""
    value: dict[str, Any] = {
        "name": "test",
        "output_dir": str(folder),
        "model": {"path": str(home / "base"), "tokenizer": "demo-base"},
        "data": {
            "train": str(home / "text.jsonl"),
            "validation": str(home / "text.jsonl"),
            "sequence_length": LENGTH,
        },
        "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        "evaluate": {"blocks": 4, "continued": False},
    }
    for name, section in sections.items():
        merged = value.get(name, {}) | section if isinstance(section, dict) else section
        if isinstance(merged, dict):
            merged = {k: v for k, v in merged.items() if v is not ...}
        value[name] = merged
    return validate(value)


def read(folder: Path, name: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{name} holds {constant}, which is no JSON")

    return json.loads((folder / name).read_text(), parse_constant=refuse)


def base_model(home: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(home / "base", dtype=torch.float32).eval()


def ids(made: Recipe, count: int, validation: bool = False) -> torch.Tensor:
    """The first blocks of a recipe's training or validation text, (count, LENGTH)."""
    blocks = Run(made, start(made)).blocks[validation]
    return torch.stack([blocks[i]["input_ids"] for i in range(count)])


def calibration_ids(made: Recipe, count: int) -> torch.Tensor:
    """Blocks at equal distances of a recipe's training text, (count, LENGTH)."""
    blocks = Run(made, start(made)).blocks[0]
    return torch.stack([blocks[i * len(blocks) // count]["input_ids"] for i in range(count)])


@torch.no_grad()
def reference_loss(
    base: LlamaForCausalLM, plan: SharingPlan, tokens: torch.Tensor, leaders: str = "mean"
) -> float:
    """Nats per predicted token of the model that a plan makes of the base, written out by head."""
    logits = Reference.of(base, plan, leaders)(tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
