"""Prefill and decoding of packed compact models beside the stock Llama: static caches, graphs.

At the shape of Llama-3.2-1B with random weights, bf16, 2,048 tokens in the cache. A step of
decoding is captured as one CUDA graph, which takes away what Python and each launch cost. On a CPU
the same at toy size, without graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from sa_models.basis import SharedBasis
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from sa_models.spans import AttentionSpan
from sa_models.weights.compact_folder import dense_config
from tests.gpu.rows import Machine, Row, Values
from tests.gpu.stepping import config_of
from train.evaluation.decode_time import compact_model

BATCHES = (1, 32)
ROUNDS, CALLS = 7, 10
Step = Callable[[], torch.Tensor]


def plan_of(form: str, layout: HeadLayout) -> SharingPlan:
    """30 % of the units, every other layer, or two layers on a basis."""
    units = units_of_ratio(0.3, layout)
    if form == "removed":
        ties = make_plan(random_matches(layout, 0), layout, units, "qkvo").ties
        return SharingPlan(removed=tuple(sorted(tie.target for tie in ties)))
    if form == "spans":
        spans = (AttentionSpan(leader, (leader + 1,)) for leader in range(0, layout.layers, 2))
        return SharingPlan(spans=tuple(spans))
    if form == "basis":
        rank = layout.kv_heads * layout.head_dim
        return SharingPlan(basis=SharedBasis(2, *[(rank,) * ((layout.layers + 1) // 2)] * 3))
    return make_plan(random_matches(layout, 0), layout, units, form.removeprefix("ties "))


class Served:
    """A model and a static cache of random content: its prefill, and its next token."""

    def __init__(self, model: PreTrainedModel, batch: int, context: int) -> None:
        self.model, self.context, device = model, context, model.device
        self.cache = StaticCache(config=dense_config(model.config), max_cache_len=context + 8)
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (batch, context), device=device)
        self.token = self.prompt[:, :1].clone()
        self.position = torch.full((batch, 1), context, device=device)
        # Made here: transformers may look at values to make one, which no graph can.
        seen = torch.arange(context + 8, device=device) <= context
        self.mask = seen[None, None, None].repeat(batch, 1, 1, 1)
        self.prefill()

    def _back_to(self, length: int) -> None:
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(length)

    def prefill(self) -> torch.Tensor:
        self._back_to(0)
        return self.model(
            self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits

    def decode(self) -> torch.Tensor:
        self._back_to(self.context)
        return self.model(
            self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def check(self) -> None:
        """Raises AssertionError: the next token's logits are not those without a cache."""
        both = torch.cat([self.prompt, self.token], dim=1)
        expected = self.model(both, use_cache=False, logits_to_keep=1).logits.float()
        apart = float((self.decode().float() - expected).norm() / expected.norm())
        assert apart < 0.06, f"decoded logits are {apart:.3g} from those without a cache"


def captured(step: Step) -> Step:
    """The step as a CUDA graph, whose result is where it was. Raises AssertionError: it differs."""
    expected = step().float()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    apart = float((replay().float() - expected).norm() / expected.norm())
    assert apart < 0.01, f"the graph's logits are {apart:.3g} from those of the eager step"
    return replay


def interleaved(machine: Machine, **steps: Step) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            taken = milliseconds(machine, step)
            if number:  # the first warms up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(machine: Machine, step: Step) -> float:
    if machine.is_toy:
        began = time.perf_counter()
        for _ in range(CALLS):
            step()
        return (time.perf_counter() - began) * 1000 / CALLS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


@torch.no_grad()  # what inference mode makes is not packed
def decoding(form: str, machine: Machine) -> Values:
    """Times of the compact model, and their ratio to the stock one's in the same rounds."""
    dtype = torch.float32 if machine.is_toy else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(machine.device):
        stock = LlamaForCausalLM(LlamaConfig(**config_of(machine))).eval()
    rotary = stock.model.rotary_emb
    stock.to(dtype)
    stock.model.rotary_emb = type(rotary)(stock.config).to(machine.device)  # in fp32
    plan = plan_of(form, HeadLayout.from_config(stock.config))
    compact = compact_model(stock, plan)
    context = 64 if machine.is_toy else 2048
    values: Values = {}
    for batch in BATCHES[:1] if machine.is_toy else BATCHES:
        served = {
            "stock": Served(stock, batch, context),
            "compact": Served(compact, batch, context),
        }
        ways = {"decode": {name: one.decode for name, one in served.items()}}
        if batch == 1:
            for one in served.values():
                one.check()
            ways["prefill"] = {name: one.prefill for name, one in served.items()}
        if not machine.is_toy:
            ways["decode by graph"] = {n: captured(step) for n, step in ways["decode"].items()}
        for way, steps in ways.items():
            found = interleaved(machine, **steps)
            values[f"{way} {batch}, ms"] = found["compact"]
            values[f"{way} {batch}, of stock"] = found["compact"] / found["stock"]
    if machine.is_toy:
        values["decode by graph"] = "needs a GPU"
    return values


ROWS = tuple(
    Row(f"decode {form}", partial(decoding, form), 60)
    for form in ("removed", "ties qkvo", "ties qkv", "spans", "basis")
)
