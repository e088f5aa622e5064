"""Speed of pruned GGUF files in a stock llama.cpp, against the dense model's.

``python tests/benchmarks/compare_llama_cpp.py MODEL --to q8_0 --share 0.25 --share 0.5``

MODEL is a Llama folder with a tokenizer, or `random`: 4 layers, hidden 1024, 16 heads. Needs the
packages gguf and xllamacpp. The files are served side by side, and asked in turn, so that what else
the machine does falls on all of them; printed are medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sa_models.export.gguf.form import KINDS, gguf_form
from sa_models.export.gguf.layout import Kind
from sa_models.heads import HeadLayout
from sa_models.materialize.reader import MaterializedReader
from sa_models.plan import SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.llama_cpp import Timing, llama_cpp


def random_model(folder: Path, tokenizer: str) -> Path:
    torch.manual_seed(0)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(loaded),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


def removals(layout: HeadLayout, share: float) -> dict[str, SharingPlan]:
    """As many units each: the same number of every layer, or whichever come first."""
    choice = random.Random(0)
    each = round(share * layout.units)
    uniform = [
        (layer, unit)
        for layer in range(layout.layers)
        for unit in choice.sample(range(layout.units), each)
    ]
    every = [(layer, unit) for layer in range(layout.layers) for unit in range(layout.units)]
    free = choice.sample(every, len(uniform))
    return {
        f"uniform {share:.0%}": SharingPlan(removed=tuple(sorted(uniform))),
        f"free {share:.0%}": SharingPlan(removed=tuple(sorted(free))),
    }


def write_files(base: Path, shares: list[float], to: Kind, work: Path) -> dict[str, Path]:
    """The dense model, and what is left of it."""
    source, tokenizer = WeightsFolder(base), AutoTokenizer.from_pretrained(base)
    layout = HeadLayout.from_config(source.config)
    plans = {"dense": SharingPlan()}
    for share in shares:
        plans |= removals(layout, share)
    files = {}
    for name, plan in plans.items():
        files[name] = work / f"{name.replace(' ', '-')}.gguf"
        weights = MaterializedReader(source, plan, "copy", source.dtype("model.norm.weight"))
        gguf_form(weights.config, plan, to, tokenizer).write(files[name], weights)
    return files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokenizer", help="of `random`", default="../shared/models/mixed7M")
    parser.add_argument("--to", default="q8_0", choices=KINDS)
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        work = Path(made)
        base = (
            random_model(work / "base", options.tokenizer)
            if options.model == "random"
            else Path(options.model)
        )
        files = write_files(base, options.share or [0.25], options.to, work)
        stocks = {
            name: stack.enter_context(llama_cpp(file, False, options.threads))
            for name, file in files.items()
        }
        prompt = [1 + 7 * place % 500 for place in range(256)]
        times: dict[str, list[Timing]] = {name: [] for name in files}
        for number in range(options.rounds + 1):
            for name, stock in stocks.items():
                time = stock.time(prompt, 64)
                if number:  # the first one reads the file
                    times[name].append(time)
        print(f"{'model':<24}{'bytes':>14}{'prompt':>18}{'decode':>18}   tokens/s, of dense")
        for name, found in times.items():
            line = f"{name:<24}{files[name].stat().st_size:>14,}"
            for field in Timing._fields:
                own = [getattr(each, field) for each in found]
                ratios = [a / getattr(b, field) for a, b in zip(own, times["dense"], strict=True)]
                line += f"{median(own):>10.1f} {median(ratios):>6.3f}x"
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
