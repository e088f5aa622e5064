"""Perplexity against a bare loop of forwards over the same windows: nothing but logits."""

from __future__ import annotations

import json

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from train.evaluation.sliding_perplexity import window_losses

SHAPES = {
    "hidden512_vocab4096": {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376},
    "hidden512_vocab32000": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376},
}
CONTEXT, WINDOWS, BATCH = 256, 4, 2


@torch.inference_mode()
def measure_shape(shape: dict[str, int]) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, **shape)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(shape["vocab_size"], (WINDOWS * CONTEXT + 1,))
    text, batches = ids.tolist(), ids[:-1].view(-1, BATCH, CONTEXT)

    def bare() -> None:
        for batch in batches:
            model(batch, use_cache=False)

    seconds = interleaved(
        7,
        bare=bare,
        disjoint=lambda: window_losses(model, [text], CONTEXT, CONTEXT, BATCH),
        # Twice the windows, but for the first; logits of their second halves alone.
        half=lambda: window_losses(model, [text], CONTEXT, CONTEXT // 2, BATCH),
    )
    tokens = WINDOWS * CONTEXT
    inputs = (2 * WINDOWS - 1) * CONTEXT
    return {
        "bare_tokens_per_second": tokens / seconds["bare"],
        "perplexity_over_bare": seconds["bare"] / seconds["disjoint"],
        "half_stride_over_bare": inputs / seconds["half"] / (tokens / seconds["bare"]),
        "target_at_least": 0.9,
    }


def measure() -> dict[str, dict[str, float]]:
    return {f"evaluate_{name}": measure_shape(shape) for name, shape in SHAPES.items()}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
