"""The time that decoding one token takes with a plan, measured on the compact model.

Each model is timed against the dense one, token by token in turn: what else the machine does then
falls on both. They share all but their attention weights. The bytes that a token reads stand beside
it: a tied unit is stored once and read as often as it is used, so that ties save no reading.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sa_models.basis import FACTORED, SharedBasis
from sa_models.heads import HeadLayout
from sa_models.materialize.shared_basis import with_factors
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import dense_config
from sa_models.weights.parameter_shapes import compact_shapes
from sa_models.weights.structure import Leaders, convert

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROUNDS = (5, 60)
"""Tokens that are timed of each model: no fewer than the first, no more than the second number."""
SECONDS = 2.0
"""For one plan, unless the fewest rounds take longer."""


@dataclass(frozen=True)
class DecodeTime:
    """Of one token, batch of one.

    Attributes:
        seconds: the ratio times what the dense model takes.
        ratio: median over the rounds of this model's time by the dense one's.
        spread: half the distance of the ratio's quartiles.
    """

    seconds: float
    ratio: float
    spread: float


def decode_time(
    dense: LlamaForCausalLM, plan: SharingPlan, prompt: torch.Tensor, leaders: Leaders = "mean"
) -> DecodeTime:
    """Time the compact model of a plan against the dense one.

    Args:
        dense: the base model in evaluation mode; a plan's structure is made from it. It stays as
            it is.
        prompt: int64 (1, context), in the cache when a token is decoded.
    """
    compact = compact_model(dense, plan, leaders)
    steps = [_decoder(model, prompt) for model in (dense, compact)]
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    for _ in range(ROUNDS[1]):
        one, two = map(_seconds, steps)
        pairs.append((one, two))
        if len(pairs) >= ROUNDS[0] and time.perf_counter() - started > SECONDS:
            break
    ratios = [two / one for one, two in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = middle * statistics.median(one for one, _ in pairs)
    return DecodeTime(seconds, middle, (high - low) / 2)


def compact_model(
    dense: LlamaForCausalLM, plan: SharingPlan, leaders: Leaders = "mean"
) -> SharedLlamaForCausalLM:
    """The compact model of an untrained plan; the dense one stays as it is.

    Tied units are stored once, as their source's, so that nothing has to be written into targets.
    The factors of a basis, which are found on calibration text, are zeros: the time that they take
    does not depend on what they hold.
    """
    if plan.basis is not None:
        names = dict(dense.named_parameters())
        factors = {
            name: torch.zeros(shape, dtype=dense.dtype, device=dense.device)
            for name, shape in compact_shapes(dense.config, plan).items()
            if name not in names
        }
        return with_factors(own_attention(dense), plan, factors).eval()
    # A model with spans stores the weights of o anew, in place.
    model = convert(own_attention(dense) if plan.spans else dense, plan, leaders)
    return SharedLlamaForCausalLM.from_materialized(model, plan).eval()


def own_attention(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy with attention weights of its own, which shares all others."""
    shared = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if HeadLayout.parse_name(name) is None
    }
    return copy.deepcopy(model, shared)


def _decoder(model: LlamaForCausalLM, prompt: torch.Tensor) -> Callable[[], Any]:
    """Decodes one token after the prompt; the cache is cut back each time."""
    cache = DynamicCache(config=dense_config(model.config))
    token = prompt[:, -1:]
    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def step() -> None:
        model(token, past_key_values=cache, use_cache=True).logits.argmax().item()
        cache.crop(-1)

    step()
    return step


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def bytes_read(plan: SharingPlan, config: Any, context: int, size: int) -> int:
    """What decoding one token reads: weights, without the table of embeddings, and cache.

    Args:
        config: of the base model.
        size: bytes of one element.
    """
    savings = plan.savings(config)
    weights = savings.expanded_parameters - savings.removed_unit_parameters
    weights -= savings.dropped_norm_parameters
    if plan.basis is not None:
        weights += _read_of_basis(plan.basis, HeadLayout.from_config(config))
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    return (weights + context * savings.stored_cache) * size


def _read_of_basis(basis: SharedBasis, layout: HeadLayout) -> int:
    """Elements of the factors less those of the dense weights: each layer reads its basis anew."""
    more = 0
    for layer in range(layout.layers):
        for p in FACTORED:
            (rows, columns), (_, rank) = layout.shape(p), basis.place(layer, p)
            more += rank * (rows + columns) - rows * columns
    return more
