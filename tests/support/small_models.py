"""Folders of models that are evaluated in milliseconds: random Llamas with the demo's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.export.export import export_model
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.run_files import PLAN_FILE, RECIPE_FILE
from train.demo import demo_base_path
from train.recipe.recipe import Recipe, validate

PLAN = SharingPlan(ties=(HeadTie((1, 1), (0, 0), ("q", "k", "v")),))
TEXT = "Every stage reads files and writes files in the run folder, so any stage can be run alone. "


def dense(folder: Path, seed: int = 0, tokenizer: bool = True, **config: Any) -> Path:
    """A bf16 Llama, GQA unless the config says otherwise, of 128 positions."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **config})).bfloat16()
    model.save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_base_path() / name, folder / name)
    return folder


def recipe(folder: Path, base: Path, text: Path) -> Recipe:
    return validate(
        {
            "name": "small",
            "output_dir": str(folder),
            "model": {"path": str(base)},
            "data": {"train": str(text), "validation": str(text), "sequence_length": 64},
            "plan": {"strategy": "random", "budget": {"heads": 2}},
            "train": {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-3},
        }
    )


def run(folder: Path) -> Path:
    """A finished run: base, continued, a plan and the exports of weights of their own."""
    base = dense(folder / "base")
    text = folder / "text.txt"
    text.write_text(TEXT * 12, encoding="utf-8")
    made = folder / "run"
    made.mkdir()
    recipe(made, base, text).save(made / RECIPE_FILE)
    PLAN.save(made / PLAN_FILE)
    dense(made / "continued" / "weights", seed=1, tokenizer=False)
    trained = dense(folder / "trained", seed=2)
    export_model(
        WeightsFolder(trained),
        PLAN,
        made / "export",
        dtype=torch.bfloat16,
        shard_bytes=10**9,
        tokenizer=base,
    )
    return made
