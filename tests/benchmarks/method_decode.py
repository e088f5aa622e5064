"""The decode times in docs/methods.md: each structure of its rows against stock, on one machine.

    python tests/benchmarks/method_decode.py [--context 1024] [--batch 1]

The time of a token depends on the shapes of a plan, not on which units it takes: units are chosen
by their weights, and followers by the published rule, so that nothing is searched. Compact model
and stock Llama take turns, token by token (:mod:`train.evaluation.decode_time`), fp32, all threads.
Prints the table. It needs the machine to itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from sa_models.plan import SharingPlan
from sa_models.search.spans import late_spans
from sa_models.search.structures import span_plan
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.progress import bar
from train.evaluation.decode_time import bytes_read, decode_time
from train.models.base_model import base_folder, load_dense
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.recipe.sections.inputs import ModelSection
from train.recipe.sections.plan import PlanSection

UNITS = {
    "KV groups removed": {"strategy": "magnitude", "action": "remove"},
    "whole layers of attention dropped": {"strategy": "magnitude", "action": "drop"},
    "ties of q, k, v, o": {"strategy": "cosine", "share": ("q", "k", "v", "o")},
    "ties of q, k, v": {"strategy": "cosine", "share": ("q", "k", "v")},
}
BASES = {"low rank": 1, "Basis Sharing of 2 layers": 2, "Basis Sharing of 3 layers": 3}
SIZES = {"10 %": (0.1, "-1.97316%"), "30 %": (0.3, "-5.91950%")}
"""As in methods_smollm2.yaml: of the units, of the parameters."""
SPANS = {"followers of attention (SA)": "attention", "followers of keys and values (CLA)": "kv"}


def plans(base: Path) -> Iterator[tuple[str, SharingPlan]]:
    """The structures by name, stock first."""
    weights = WeightsFolder(base)
    config = weights.config
    yield "stock", SharingPlan()
    for size, (ratio, parameters) in SIZES.items():
        for name, how in UNITS.items():
            section = PlanSection.model_validate(how | {"budget": {"ratio": ratio}})
            yield f"{size}: {name}", find_ties(PlanProblem(section, config), weights)[0]
        for name, layers in BASES.items():
            asked = {"budget": {"parameters": parameters}, "basis_layers": layers}
            section = PlanSection.model_validate({"strategy": "basis"} | asked)
            yield f"{size}: {name}", find_ties(PlanProblem(section, config), weights)[0]
    for name, share in SPANS.items():
        choices = late_spans(config.num_hidden_layers, 6, 4)
        yield f"6 layers: {name}", span_plan(choices, share)
    yield "67 %: one KV head a layer, pooled", SharingPlan(kv_heads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    base = base_folder(ModelSection(path="smollm2-135m"))
    dense = load_dense(base, "sdpa").eval()
    vocabulary = dense.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (arguments.batch, arguments.context), generator=draw)
    rows = []
    found = list(plans(base))
    with bar("decoding") as advance:
        for done, (name, plan) in enumerate(found, start=1):
            time = decode_time(dense, plan, prompt)
            read = bytes_read(plan, dense.config, arguments.context * arguments.batch, 4)
            rows.append((name, time, read))
            advance(done, len(found))
    stock = rows[0][2]
    print(f"fp32, batch {arguments.batch}, {arguments.context:,} tokens before it\n")
    print("| structure | time of a token against stock | bytes read against stock |")
    print("| --- | --- | --- |")
    for name, time, read in rows:
        print(f"| {name} | {time.ratio:.2f} ± {time.spread:.2f} | {read / stock:.3f} |")


if __name__ == "__main__":
    main()
