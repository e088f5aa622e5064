"""Numbers of a device against those of a CPU: logits of compact models, penalties, losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sa_models.basis import SharedBasis
from sa_models.calibration import logit_chunks
from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.plan import SharingPlan
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.pairs import make_plan
from sa_models.spans import AttentionSpan
from sa_models.weights.compact_folder import dense_config
from tests.gpu.rows import Machine, Row, Values, within
from tests.support.pulled import LAYOUTS, Weights, star_plan
from train.evaluation.decode_time import compact_model
from train.penalty.coupled import Penalty
from train.recipe.sections.penalty import KINDS
from train.training.chunked_loss import token_sums
from train.training.distill_loss import Projection, likeliest

LAYERS, HEADS, KV_HEADS = 4, 8, 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.06}
"""Relative norm of the difference to float64; a stock Llama in bf16 was 0.038 away on an H100."""
PROMPT, DECODED = 40, 8


def base(machine: Machine) -> LlamaForCausalLM:
    """GQA, fp32, on the CPU."""
    torch.manual_seed(0)
    width = 64 if machine.is_toy else 256
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def plans(layout: HeadLayout) -> dict[str, SharingPlan]:
    spans = {
        share: SharingPlan(
            spans=(AttentionSpan(0, (1,), share), AttentionSpan(2, (3,), share))  # type: ignore[arg-type]
        )
        for share in ("attention", "kv")
    }
    return {
        "stock": SharingPlan(),
        "ties": make_plan(random_matches(layout, 0), layout, 5, "qkvo"),
        "removed": SharingPlan(removed=((1, 0), (2, 1), (2, 3))),
        "attention-spans": spans["attention"],
        "kv-spans": spans["kv"],
        "basis": SharingPlan(basis=SharedBasis(2, *[(16,) * (LAYERS // 2)] * 3)),
    }


def model_of(machine: Machine, form: str) -> PreTrainedModel:
    """The compact model of a plan, fp32 on the CPU."""
    dense = base(machine)
    layout = HeadLayout.from_config(dense.config)
    plan = plans(layout)[form]
    if plan.ties:
        materialize_(dict(dense.named_parameters()), layout, plan)
    if form == "stock":
        return dense
    model = compact_model(dense, plan)
    for name, parameter in model.named_parameters():
        if plan.basis is not None and not parameter.any():  # factors come as zeros
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def moved(
    model: PreTrainedModel, device: str, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A copy; frequencies of the rotary embedding stay fp32, as in a model that is loaded."""
    rotary = copy.deepcopy(model.model.rotary_emb).to(device)
    one = copy.deepcopy(model).to(device=device, dtype=dtype)
    one.model.rotary_emb = rotary
    one.config._attn_implementation = attention
    return one


@torch.no_grad()
def whole(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.to(model.device), use_cache=False).logits.double().cpu()


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same logits, the last ones a token at a time from a cache."""
    ids = ids.to(model.device)
    cache = DynamicCache(config=dense_config(model.config))
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(logits, dim=1).double().cpu()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tokens() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(512, (2, PROMPT + DECODED), generator=draw)


def form(name: str, machine: Machine) -> Values:
    """sdpa and eager, whole and token by token."""
    model, ids, values = model_of(machine, name), tokens(), {}
    expected = whole(moved(model, "cpu", torch.float64, "eager"), ids)
    for dtype, tolerance in TOLERANCES.items():
        worst = 0.0
        for attention in ("sdpa", "eager"):
            one = moved(model, machine.device, dtype, attention)
            worst = max(worst, *(apart(way(one, ids), expected) for way in (whole, decoded)))
        kind = str(dtype)[6:]
        found = within(worst, tolerance, kind)
        values |= {kind: found[kind], f"tolerance {kind}": tolerance}
    return values


def kernel(attention: str, dtype: torch.dtype, tolerance: float, machine: Machine) -> Values:
    """Spans of both kinds by another attention implementation."""
    worst = 0.0
    for name in ("attention-spans", "kv-spans"):
        model, ids = model_of(machine, name), tokens()
        expected = whole(moved(model, "cpu", torch.float64, "eager"), ids)
        found = whole(moved(model, machine.device, dtype, attention), ids)
        worst = max(worst, apart(found, expected))
    return within(worst, tolerance)


class OnDevice(Weights):
    """Attention weights on a device."""

    def __init__(self, layout: HeadLayout, device: str) -> None:
        super().__init__(layout)
        self.device = torch.device(device)
        self.parameters = {
            name: torch.nn.Parameter(p.detach().to(device)) for name, p in self.parameters.items()
        }


def penalty(machine: Machine) -> Values:
    """Value and gradient of every kind, for MHA, GQA and MQA."""
    worst = 0.0
    for layout in LAYOUTS.values():
        plan = star_plan(layout, ("q", "k", "v", "o"))
        for kind in KINDS:
            found = []
            for device in ("cpu", machine.device):
                weights = OnDevice(layout, device)
                value = Penalty(plan, layout, kind).apply(weights, 0.5).value  # type: ignore[arg-type]
                flat = [g.flatten().double().cpu() for g in weights.gradients().values()]
                found.append((value, torch.cat(flat)))
            (value, gradient), (other, theirs) = found
            worst = max(worst, abs(other - value) / abs(value), apart(theirs, gradient))
    return within(worst, 1e-5)


def losses(kind: str, machine: Machine) -> Values:
    """Value and gradients of a loss of tokens, of whole logits and by chunks, against float64."""
    draw = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(2, 37, 48, generator=draw) for _ in range(2))
    weight, taught = (torch.randn(311, 48, generator=draw) / 4 for _ in range(2))
    labels = torch.randint(311, (2, 37), generator=draw)
    labels[:, ::5] = -100
    weights, temperature, k = ((1.0, 0.0) if kind == "text" else (0.3, 0.7)), 1.7, 9
    expected = by_hand(kind, hidden, weight, labels, theirs, taught, weights, temperature, k)
    worst = 0.0
    for elements in chunk_sizes(machine, kind):
        with patch.object(logit_chunks, elements[0], elements[1]):
            own, table = (t.clone().to(machine.device).requires_grad_() for t in (hidden, weight))
            teacher = None
            if kind != "text":
                asked = Projection(theirs.to(machine.device), taught.to(machine.device))
                teacher = asked if kind == "full" else likeliest(asked, k, temperature)
            total = token_sums(own, table, labels, teacher, temperature, weights)[0]
            total.backward()
        found = total.detach(), own.grad, table.grad
        differences = [
            apart(f.double().cpu(), e)
            for f, e in zip(found, expected, strict=True)
            if f is not None
        ]
        assert len(differences) == 3
        worst = max(worst, *differences)
    return within(worst, 1e-5)


def chunk_sizes(machine: Machine, kind: str) -> Iterator[tuple[str, int]]:
    """The constant that decides on this device: as it is (whole logits), and a few rows of 311."""
    name = "CHUNK_ELEMENTS" if machine.is_toy else "GPU_CHUNK_ELEMENTS"
    yield name, getattr(logit_chunks, name)
    yield name, 311 * 7


def by_hand(
    kind: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    theirs: torch.Tensor,
    taught: torch.Tensor,
    weights: tuple[float, float],
    temperature: float,
    k: int,
) -> tuple[torch.Tensor, ...]:
    """The loss as its definition says, all logits at once, in float64 on the CPU."""
    own, table = (t.double().requires_grad_() for t in (hidden, weight))
    logits = (own @ table.T).flatten(0, 1)
    kept = labels.flatten() != -100
    total = weights[0] * F.cross_entropy(logits[kept], labels.flatten()[kept], reduction="sum")
    if kind != "text":
        p = ((theirs.double() @ taught.double().T).flatten(0, 1)[kept] / temperature).softmax(-1)
        q = (logits[kept] / temperature).softmax(-1)
        if kind == "top-k":
            ids = p.topk(k).indices
            p, q = (
                torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, True)], -1)
                for x in (p, q)
            )
        total = total + weights[1] * temperature**2 * (p * (p.log() - q.log())).sum()
    total.backward()
    assert own.grad is not None
    assert table.grad is not None
    return total.detach(), own.grad, table.grad


FORMS = ("stock", "ties", "removed", "attention-spans", "kv-spans", "basis")
ROWS = (
    *(Row(f"logits {name}", partial(form, name), 40) for name in FORMS),
    Row("penalty", penalty, 40),
    *(Row(f"loss {kind}", partial(losses, kind), 40) for kind in ("text", "full", "top-k")),
    Row("spans sdpa", partial(kernel, "sdpa", torch.float32, 1e-5), 40),
    Row("spans flex", partial(kernel, "flex_attention", torch.float32, 1e-4), 90, ("gpu",)),
    Row(
        "spans flash",
        partial(kernel, "flash_attention_2", torch.bfloat16, 0.06),
        40,
        ("gpu", "flash_attn"),
    ),
)
