"""Estimated against measured rise of the loss: rank correlation over single units and ties.

    python tests/benchmarks/rank_sensitivity.py MODEL TEXT.jsonl [--blocks 8] [--pairs 250]

Every removal is measured, and of the ties a seeded sample. Compared are the estimates of
``sa_models.scores.fisher`` (first order; with the Fisher term by token), and for ties what
gradients of the weights say: <G_target, W_source - W_target>, without and with half the square of
every block's.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from sa_models.heads import HeadLayout, unit_view
from sa_models.scores.fisher import Rise, estimate_sensitivity
from sa_models.search.actions import Action
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.search.ranking import spearman

SHARES = [("q", "k", "v", "o"), ("q", "k", "v")]


def blocks(model: str, file: str, count: int, length: int) -> torch.Tensor:
    """Blocks at equal distances, (count, length)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % 40 == 0:  # a fortieth of the documents is text enough
                ids += tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
                ids.append(tokenizer.eos_token_id)
    table = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return table[[i * len(table) // count for i in range(count)]]


def weight_estimates(model: LlamaForCausalLM, ids: torch.Tensor, share: tuple[str, ...]) -> Rise:
    """First order of all ties in the space of weights, and half the squares by block."""
    layout = HeadLayout.from_config(model.config)
    parameters = dict(model.named_parameters())
    size = layout.layers * layout.units
    first, second = torch.zeros(size, size).double(), torch.zeros(size, size).double()

    def rows(projection: str, gradient: bool) -> torch.Tensor:
        weights = [parameters[layout.parameter_name(at, projection)] for at in range(layout.layers)]
        return torch.cat(
            [
                unit_view(w.grad if gradient else w.detach(), layout, projection).flatten(1)
                for w in weights
            ]
        ).double()

    for block in ids:
        model.zero_grad()
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, block[1:], reduction="sum").backward()
        change = torch.zeros_like(first)
        for p in share:
            slope, weight = rows(p, True), rows(p, False)
            change += slope @ weight.T - (slope * weight).sum(1, keepdim=True)
        first += change
        second += change.square() / 2
    model.zero_grad()
    tokens = ids.numel() - len(ids)
    shape = (layout.layers, layout.units) * 2
    return Rise(first.view(shape) / tokens, second.view(shape) / tokens)


def correlate(
    measured: MeasuredLoss, actions: list[Action], rises: dict[str, Rise]
) -> dict[str, float]:
    base = measured(frozenset())
    real = torch.tensor([measured(frozenset({a})) - base for a in actions])
    found = {}
    for name, rise in rises.items():
        for part, values in (("first order", rise.first), ("both orders", rise.total)):
            chosen = [float(values[(*a.target, *(a.source or ()))]) for a in actions]
            found[f"{name}, {part}"] = round(spearman(torch.tensor(chosen), real), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=250)
    options = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    layout = HeadLayout.from_config(model.config)
    ids = blocks(options.model, options.text, options.blocks, options.length)
    batches = [{"input_ids": part} for part in ids.split(4)]
    started = time.process_time()
    estimated = estimate_sensitivity(model, batches, SHARES)
    print(f"estimates of all: {time.process_time() - started:.1f} CPU seconds", flush=True)
    measured = MeasuredLoss(model, batches)
    units = [(layer, unit) for layer in range(layout.layers) for unit in range(layout.units)]
    removals = [Action(unit) for unit in units]
    print(
        f"{len(removals)} removals", correlate(measured, removals, {"outputs": estimated.removal})
    )
    pairs = [(t, s) for t in units for s in units if s[0] < t[0]]
    drawn = random.Random(0).sample(pairs, min(options.pairs, len(pairs)))
    for share in SHARES:
        rises = {
            "outputs": estimated.ties[share],
            "weights": weight_estimates(model, ids, share),
        }
        ties = [Action(target, source, share) for target, source in drawn]
        print(f"{len(ties)} ties of {''.join(share)}", correlate(measured, ties, rises), flush=True)
    print(f"{measured.passes:.0f} forward passes, {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
