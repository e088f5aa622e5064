"""A Llama with ties, removed units, spans and pooled KV heads, written out head by head.

What the tests compare with: it shares no code with ``sa_models``. There is no cache, no kernel and
no broadcasting over KV groups: one softmax for each sequence, layer and query head, under a mask
that is written out for every pair of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sa_models import AttentionSpan, HeadTie, SharedLlamaForCausalLM, SharingPlan
from sa_models.materialize.ties import materialize_
from sa_models.weights.structure import convert

LAYERS = 6
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
    # head_dim is not hidden / heads, the head count is no power of two, embeddings are tied
    "odd": {
        "hidden_size": 30,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "mqa": {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
}
VOCABULARY = 41


def dense(shape: str = "gqa", seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A random Llama of one of the shapes, in fp32."""
    torch.manual_seed(seed)
    values = {"num_hidden_layers": LAYERS, "intermediate_size": 23, "initializer_range": 0.15}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **(values | SHAPES[shape] | fields),
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def exact_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    """LlamaRMSNorm in its input's precision; the library's computes in fp32 whatever the input."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def tokens(rows: int = 2, length: int = 9, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


# --- plans ----------------------------------------------------------------------------------------


def some_plan(kind: str, shape: str) -> SharingPlan:
    """A plan of one of the kinds of :data:`PLANS` that fits the shape."""
    heads, kv_heads = (SHAPES[shape][f"num_{key}_heads"] for key in ("attention", "key_value"))
    last, pooled = kv_heads - 1, {4: 2, 3: 1, 1: 1}[kv_heads]

    def span(leader: int, followers: Sequence[int], share: str, mapped: bool = False):
        size = heads if share == "attention" else kv_heads
        # A permutation that crosses KV groups, and a map that reads one head several times.
        maps = ([*range(size)][::-1], [(3 * h) % size // 2 for h in range(size)])
        chosen = tuple(tuple(maps[i % 2]) for i in range(len(followers))) if mapped else None
        return AttentionSpan(leader, tuple(followers), share, chosen)

    if kind == "sa":
        return SharingPlan(spans=(span(1, [2, 3], "attention"), span(4, [5], "attention")))
    if kind == "sa interleaved, mapped":
        spans = (span(0, [2, 4], "attention", True), span(1, [3, 5], "attention", True))
        return SharingPlan(spans=spans)
    if kind == "cla":
        return SharingPlan(spans=(span(0, [1], "kv"), span(2, [3, 5], "kv")))
    if kind == "cla mapped":
        return SharingPlan(spans=(span(0, [1, 2], "kv", True), span(3, [4], "kv", True)))
    if kind == "both":
        return SharingPlan(spans=(span(0, [1, 3], "attention", True), span(2, [4, 5], "kv", True)))
    if kind == "pooled":
        return SharingPlan(kv_heads=pooled)
    if kind == "pooled, both":
        spans = (span(0, [1, 3], "attention", True), span(2, [4, 5], "kv"))
        return SharingPlan(kv_heads=pooled, spans=spans)
    assert kind == "both, ties"
    ties = [
        HeadTie((2, 0), (0, last), ("q", "k", "v", "o")),  # leader of keys from leader of attention
        HeadTie((1, last), (0, 0), ("v", "o")),  # a follower's values from its leader's
        HeadTie((4, last), (2, last), ("q",)) if kv_heads > 1 else HeadTie((4, 0), (0, 0), ("q",)),
        HeadTie((5, last), (3, 0), ("o",)),
    ]
    spans = (span(0, [1, 3], "attention"), span(2, [4, 5], "kv"))
    return SharingPlan(ties=tuple(ties), spans=spans)


PLANS = (
    "sa",
    "sa interleaved, mapped",
    "cla",
    "cla mapped",
    "both",
    "pooled",
    "pooled, both",
    "both, ties",
)
SPAN_PLANS = tuple(kind for kind in PLANS if kind != "pooled")


# --- the model ------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """``logits`` (rows, tokens, vocabulary); ``hidden`` before every layer and after the last norm;
    ``maps`` (rows, heads, tokens, tokens), one for each layer."""

    logits: Tensor
    hidden: list[Tensor]
    maps: list[Tensor]


class Reference:
    """The model that a plan makes of a dense Llama.

    Args:
        weights: of the dense Llama, by parameter name; computed with in their dtype.
        leaders: ``mean`` or ``copy``, for the leaders of ``kv`` spans.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        config: LlamaConfig,
        plan: SharingPlan,
        leaders: str = "mean",
    ) -> None:
        self.weights, self.config, self.plan = weights, config, plan
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.kv_heads = plan.kv_heads or config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        layers = range(config.num_hidden_layers)
        self.q = [self._split(f"layers.{i}.self_attn.q_proj") for i in layers]
        self.o = [self._split(f"layers.{i}.self_attn.o_proj", 1) for i in layers]
        base_k = [self._split(f"layers.{i}.self_attn.k_proj") for i in layers]
        base_v = [self._split(f"layers.{i}.self_attn.v_proj") for i in layers]
        self.k = [[self._kv(base_k, i, h, leaders) for h in range(self.kv_heads)] for i in layers]
        self.v = [[self._kv(base_v, i, h, leaders) for h in range(self.kv_heads)] for i in layers]
        self._tie()

    @classmethod
    def of(
        cls,
        model: LlamaForCausalLM,
        plan: SharingPlan,
        leaders: str = "mean",
        dtype: torch.dtype = torch.float64,
        requires_grad: bool = False,
    ) -> Reference:
        weights = {
            name: p.detach().to(dtype, copy=True).requires_grad_(requires_grad)
            for name, p in model.named_parameters()
        }
        return cls(weights, model.config, plan, leaders)

    def _matrix(self, name: str) -> Tensor:
        return self.weights[f"model.{name}.weight"]

    def _split(self, name: str, axis: int = 0) -> list[Tensor]:
        """The matrix by head."""
        return list(self._matrix(name).split(self.head_dim, axis))

    def _kv(self, base: list[list[Tensor]], layer: int, head: int, leaders: str) -> Tensor:
        """The mean of the pooled heads; for a leader of keys and values, of all it serves."""
        served = [layer]
        for span in self.plan.spans:
            if span.share == "kv" and span.leader == layer and leaders == "mean":
                served = [layer, *span.followers]
        pool = len(base[layer]) // self.kv_heads
        members = [base[i][head * pool + n] for i in served for n in range(pool)]
        return sum(members[1:], members[0]) / len(members)

    def _tie(self) -> None:
        for tie in self.plan.ties:
            (layer, unit), (source_layer, source_unit) = tie.target, tie.source
            for p in tie.projections:
                heads = getattr(self, p)
                size = self.group if p in "qo" else 1
                for n in range(size):
                    source = heads[source_layer][source_unit * size + n]
                    heads[layer][unit * size + n] = source

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Outputs:
        """Args: all (rows, tokens). ``mask`` is 0 for padding; a token sees its document alone."""
        mask = torch.ones_like(ids) if mask is None else mask
        documents = torch.zeros_like(ids) if documents is None else documents
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        rows = [self._sequence(*row) for row in zip(ids, mask, positions, documents, strict=True)]
        return Outputs(
            torch.stack([row.logits for row in rows]),
            [torch.stack(states) for states in zip(*[row.hidden for row in rows], strict=True)],
            [torch.stack(maps) for maps in zip(*[row.maps for row in rows], strict=True)],
        )

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids

    # --- one sequence -----------------------------------------------------------------------------

    def _sequence(self, ids: Tensor, mask: Tensor, positions: Tensor, documents: Tensor) -> Outputs:
        count = len(ids)
        sees = torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            for j in range(i + 1):
                sees[i, j] = bool(mask[j]) and bool(documents[i] == documents[j])
        x = self._matrix("embed_tokens")[ids]
        hidden, maps, kept = [], [], {}
        for layer in range(self.config.num_hidden_layers):
            hidden.append(x)
            attended, kept[layer] = self._attention(
                layer, self._norm(f"layers.{layer}.input_layernorm", x), sees, positions, kept
            )
            maps.append(torch.stack(kept[layer]["maps"]))
            x = x + attended
            inside = self._norm(f"layers.{layer}.post_attention_layernorm", x)
            gate = inside @ self._matrix(f"layers.{layer}.mlp.gate_proj").t()
            up = inside @ self._matrix(f"layers.{layer}.mlp.up_proj").t()
            x = x + (functional.silu(gate) * up) @ self._matrix(f"layers.{layer}.mlp.down_proj").t()
        hidden.append(self._norm("norm", x))
        head = self.weights.get("lm_head.weight", self._matrix("embed_tokens"))
        return Outputs(hidden[-1] @ head.t(), hidden, maps)

    def _attention(
        self, layer: int, x: Tensor, sees: Tensor, positions: Tensor, kept: dict[int, Any]
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The layer's attention, and {"maps", "keys", "values"} by head."""
        share, leader, head_map = self._role(layer)
        keys, values, maps = [], [], []
        for g in range(self.kv_heads):
            if share == "kv":
                read = g if head_map is None else head_map[g]
                keys.append(kept[leader]["keys"][read])
                values.append(kept[leader]["values"][read])
            else:
                keys.append(self._rotate(x @ self.k[layer][g].t(), positions))
                values.append(x @ self.v[layer][g].t())
        output = torch.zeros_like(x)
        for h in range(self.config.num_attention_heads):
            if share == "attention":
                maps.append(kept[leader]["maps"][h if head_map is None else head_map[h]])
            else:
                query = self._rotate(x @ self.q[layer][h].t(), positions)
                scores = query @ keys[h // self.group].t() / self.head_dim**0.5
                scores = scores.masked_fill(~sees, float("-inf"))
                maps.append(scores.softmax(-1).nan_to_num())  # a padded token may see nothing
            if (layer, h // self.group) in self.plan.removed:
                continue
            output = output + maps[h] @ values[h // self.group] @ self.o[layer][h].t()
        return output, {"maps": maps, "keys": keys, "values": values}

    def _role(self, layer: int) -> tuple[str | None, int, Sequence[int] | None]:
        for span in self.plan.spans:
            if layer in span.followers:
                at = span.followers.index(layer)
                return span.share, span.leader, span.head_map and span.head_map[at]
        return None, layer, None

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x / (mean + self.config.rms_norm_eps).sqrt() * self._matrix(name)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pair (i, i + d/2) turned by position * base^(-2i/d); the angle in fp32, as everywhere."""
        half = self.head_dim // 2
        base = float(self.config.rope_parameters["rope_theta"])
        frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = positions[:, None].float() * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# --- the model under test -------------------------------------------------------------------------


def shared(
    model: LlamaForCausalLM, plan: SharingPlan, leaders: Literal["mean", "copy"] = "mean"
) -> LlamaForCausalLM:
    """What ``sa_models`` makes of a dense model: converted, tied, compact where it can be."""
    converted = convert(model, plan, leaders)
    if not plan.ties and not plan.removed:
        return converted
    converted = copy.deepcopy(
        converted
    )  # it shares parameters with ``model``, which must not change
    materialize_(dict(converted.named_parameters()), plan.layout(converted.config), plan)
    return SharedLlamaForCausalLM.from_materialized(converted, plan)


def use(model: LlamaForCausalLM, implementation: str = "sdpa", reuse_rows: int = 16) -> Any:
    """Choose the attention kernel, and up to how many rows attention weights are reused."""
    model.set_attn_implementation(implementation)
    model.config.reuse_rows = reuse_rows
    return model
