"""Folders in vLLM against transformers: log probabilities of prompts, and greedy tokens.

Where vLLM and postshare are installed: ``python tests/benchmarks/compare_vllm.py FOLDER ...``. On a
CPU set VLLM_CPU_KVCACHE_SPACE=1. Prompts of several lengths are served together, in fp32.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import sa_models  # noqa: F401 - registers the compact model

PROMPTS = [list(range(100, 160)), list(range(300, 307)), list(range(40, 81))]
NEW = 20


def compare(folder: Path, devices: int, compiled: bool) -> str:
    """What one folder gives, in words."""
    from vllm import LLM, SamplingParams

    served = LLM(
        str(folder),
        dtype="float32",
        max_model_len=256,
        enforce_eager=not compiled,
        tensor_parallel_size=devices,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    answers = served.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    worst, equal = 0.0, True
    for ids, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0]
        for at in range(1, len(ids)):
            found = answer.prompt_logprobs[at][ids[at]].logprob
            worst = max(worst, abs(float(expected[at - 1, ids[at]]) - found))
        tokens = answer.outputs[0].token_ids
        equal &= whole[len(ids) :].tolist() == list(tokens)
    by = served.llm_engine.model_config.architecture
    return f"{folder} by {by}: log probabilities within {worst:.1e}, greedy tokens equal: {equal}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="DEVICES")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does")
    options = parser.parse_args()
    if options.tensor_parallel == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one import for all folders
    for folder in options.folders:
        print(compare(folder, options.tensor_parallel, options.compile), flush=True)


if __name__ == "__main__":
    main()
