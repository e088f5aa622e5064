"""``vllm serve`` on this machine: 8 prompts at once, tokens a second and cache blocks, by folder.

``python tests/benchmarks/serve_vllm.py FOLDER [FOLDER ...] [--serve=OPTION ...]``

Where vLLM and postshare are installed; on a CPU set VLLM_CPU_KVCACHE_SPACE=1. The servers run side
by side and are asked in turn, so that what else the machine does falls on all of them. Their greedy
tokens are compared with those of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sa_models  # noqa: F401 - registers the compact model

PROMPTS = [[3 + (7 * at + 31 * row) % 250 for at in range(24 + 5 * row)] for row in range(8)]
COMPARED = 20


class Server:
    """One ``vllm serve``, and what it says of itself."""

    def __init__(self, folder: Path, port: int, log: Path, process: subprocess.Popen) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.log, self.process = log, process

    def wait(self, seconds: float = 1800) -> None:
        """Until it answers. Exits with its log where it ends before that, or takes longer."""
        until = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"{self.folder} is not served:\n{self.log.read_text('utf-8')}")
                time.sleep(1)

    def post(self, prompt: list[int], tokens: int) -> list[int]:
        """The greedy tokens after a prompt."""
        body = {
            "model": str(self.folder),
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    def batch(self, tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds for all prompts at once, and their tokens."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: self.post(prompt, tokens), PROMPTS))
        return time.perf_counter() - start, answers

    @property
    def blocks(self) -> str:
        """Of the KV cache, and the tokens that fit into it."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            found = re.search(r'num_gpu_blocks="(\d+)"', answer.read().decode())
        said = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text("utf-8"))
        return f"{found[1] if found else '?'} ({said[1] if said else '?'} tokens)"


@contextmanager
def served(folder: Path, options: list[str], work: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = work / f"{port}.log"
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield Server(folder, port, log, process)
    finally:
        process.terminate()
        process.wait(120)


def expected(folder: Path) -> list[list[int]]:
    """The greedy tokens of transformers, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, max_new_tokens=COMPARED, do_sample=False)
        found.append(whole[0, len(prompt) :].tolist())
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--serve", action="append", default=[], help="an option of vllm serve")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        servers = [
            stack.enter_context(served(folder, options.serve, Path(work)))
            for folder in options.folders
        ]
        for server in servers:
            server.wait()
        seconds: list[list[float]] = [[] for _ in servers]
        answers: list[Any] = [None for _ in servers]
        for number in range(options.rounds + 1):
            for at, server in enumerate(servers):
                time_taken, answers[at] = server.batch(options.tokens)
                if number:  # the first batch warms up
                    seconds[at].append(time_taken)
        count = len(PROMPTS) * options.tokens
        for at, server in enumerate(servers):
            ratio = median(a / b for a, b in zip(seconds[0], seconds[at], strict=True))
            equal = [answer[:COMPARED] for answer in answers[at]] == expected(server.folder)
            print(
                f"{server.folder}: {count / median(seconds[at]):.0f} tokens/s, {ratio:.2f} times "
                f"the first; cache blocks {server.blocks}; {COMPARED} greedy tokens of each "
                f"prompt equal: {equal}"
            )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
