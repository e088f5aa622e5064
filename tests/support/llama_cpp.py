"""A stock llama.cpp (the wheel xllamacpp) that answers for a GGUF file, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

CONTEXT = 512


class Timing(NamedTuple):
    """Tokens per second of reading a prompt, and of writing."""

    prompt: float
    decode: float


class LlamaCpp:
    """What a server says of its model."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, value: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(value).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        return self.ask("/tokenize", {"content": text, "add_special": add_special})["tokens"]

    def complete(
        self, prompt: Sequence[int], tokens: int, top: int = 0, **options: Any
    ) -> dict[str, Any]:
        return self.ask(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": tokens,
                "n_probs": top,
                "samplers": ["top_k"],
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": False,
                "post_sampling_probs": False,
                "return_tokens": True,
                **options,
            },
        )

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        return self.complete(prompt, tokens)["tokens"]

    def log_probabilities(self, prompt: Sequence[int], top: int) -> dict[int, float]:
        """Of the likeliest tokens that may come next."""
        # Of a token that is part of a letter the server says none: another one is written.
        letter = [[self.tokenize("a")[-1], 1000.0]]
        answer = self.complete(prompt, 1, top, logit_bias=letter)
        first = answer["completion_probabilities"][0]
        return {each["id"]: each["logprob"] for each in first["top_logprobs"]}

    def time(self, prompt: Sequence[int], tokens: int) -> Timing:
        timings = self.complete(prompt, tokens)["timings"]
        return Timing(timings["prompt_per_second"], timings["predicted_per_second"])


@contextmanager
def llama_cpp(file: Path, exact: bool = True, threads: int = 1) -> Iterator[LlamaCpp]:
    """Serve a file.

    Args:
        exact: a cache in fp32, and attention that adds up in fp32; else llama.cpp's defaults.

    Raises:
        RuntimeError: it does not load; with the end of what was said.
    """
    mode = "exact" if exact else "default"
    with TemporaryFile("w+") as said:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            [sys.executable, __file__, str(file), str(threads), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdout is not None
        try:
            lines = (line for line in process.stdout if line.startswith("address "))
            address = next(lines, "").removeprefix("address ").strip()
            if not address:
                said.seek(0)
                raise RuntimeError(said.read()[-2000:])
            yield LlamaCpp(address)
        finally:
            process.kill()
            process.communicate()


def serve(file: str, threads: int, exact: bool) -> None:
    """Print the address, then serve until stdin ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = CONTEXT
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.fit_params = False
    server = xllamacpp.Server(params)
    print(f"address {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "exact")
