"""A folder in vLLM against transformers: log probabilities of prompts, and greedy tokens.

Where vLLM and postshare are installed: ``python tests/benchmarks/compare_vllm.py FOLDER``. On a CPU
set VLLM_CPU_KVCACHE_SPACE=1. Prompts of several lengths are served together, in fp32.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

import sa_models  # noqa: F401 - registers the compact model

PROMPTS = [list(range(100, 160)), list(range(300, 307)), list(range(40, 81))]
NEW = 12


def main(folder: str) -> None:
    served = LLM(
        folder, dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=0, detokenize=False)
    answers = served.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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
    print(f"{folder}: log probabilities within {worst:.1e}, greedy tokens equal: {equal}")


if __name__ == "__main__":
    main(sys.argv[1])
