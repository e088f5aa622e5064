"""Small models whose heads can be written in another gauge, by index arithmetic of its own."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.plan import HeadTie, SharingPlan

HEADS, HEAD_DIM, HIDDEN = 4, 6, 20


def tiny(kv_heads: int, layers: int = 3, seed: int = 3, **fields) -> LlamaForCausalLM:
    """Odd shapes: heads * head_dim is not the hidden size; norms have gains."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        initializer_range=0.3,
        **fields,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.uniform_(0.2, 2.0)
    return model.eval()


def tokens(blocks: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(32, (blocks, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def change_gauge_(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Another angle and scale for every plane, another basis of v, for every KV group."""
    generator = torch.Generator().manual_seed(seed)
    half, kv_heads = HEAD_DIM // 2, model.config.num_key_value_heads
    group = HEADS // kv_heads
    for layer in model.model.layers:
        q, k, v, o = (getattr(layer.self_attn, f"{p}_proj").weight for p in "qkvo")
        for unit in range(kv_heads):
            angles = torch.rand(half, generator=generator) * 6.283
            scales = torch.rand(half, generator=generator) * 2 + 0.3
            heads = range(unit * group, (unit + 1) * group)
            for i in range(half):
                c, s, r = angles[i].cos(), angles[i].sin(), scales[i]
                for weight, at, scale in [(k, unit, 1 / r), *((q, head, r) for head in heads)]:
                    a, b = at * HEAD_DIM + i, at * HEAD_DIM + i + half
                    x, y = weight[a].clone(), weight[b].clone()
                    weight[a], weight[b] = scale * (c * x - s * y), scale * (s * x + c * y)
            m = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator) + 3 * torch.eye(HEAD_DIM)
            rows = slice(unit * HEAD_DIM, (unit + 1) * HEAD_DIM)
            v[rows] = m @ v[rows]
            for head in heads:
                columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                o[:, columns] = o[:, columns] @ torch.linalg.inv(m)


def slices(model: LlamaForCausalLM, layer: int, unit: int) -> dict[str, list[torch.Tensor]]:
    """q, k, v, o of the heads of a unit, float64; o's columns transposed."""
    group = HEADS // model.config.num_key_value_heads
    attention = model.model.layers[layer].self_attn
    found: dict[str, list[torch.Tensor]] = {}
    for p in "qkvo":
        weight = getattr(attention, f"{p}_proj").weight.detach().double()
        weight = weight.T if p == "o" else weight
        heads = range(unit * group, (unit + 1) * group) if p in "qo" else [unit]
        found[p] = [weight[h * HEAD_DIM : (h + 1) * HEAD_DIM] for h in heads]
    return found


def plan_of(*ties: tuple[tuple[int, int], tuple[int, int], str]) -> SharingPlan:
    """Ties of target, source and projections."""
    return SharingPlan(tuple(HeadTie(target, source, tuple(ps)) for target, source, ps in ties))
