"""A training step whose losses are computed by chunks against one that has all logits.

Llamas of random weights with tied embeddings, hidden 576, 4 layers, 2 x 512 tokens, fp32, gradient
checkpointing, with SmolLM2's vocabulary of 49,152 and Llama-3's of 128,256; and the demo's shape,
where a micro-batch is one chunk and nothing changes. Peaks are above the weights, gradients
included, in a process of its own: with losses of the text, and with a teacher of the same shape.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timing import PeakMemory, interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.calibration import logit_chunks
from sa_models.calibration.logit_chunks import in_place_of
from train.models.checkpointing import enable_checkpointing
from train.training.chunked_loss import token_sums
from train.training.distill_loss import Projection

SHAPES = {
    "49152": (49_152, 576, 4, 2, 512),
    "128256": (128_256, 576, 4, 2, 512),
    "demo": (2048, 128, 8, 4, 256),
}
"""Vocabulary, hidden size, layers, sequences, and tokens of each."""
Step = Callable[[], None]


def random_llama(vocabulary: int, hidden: int, layers: int, heads: int = 8) -> LlamaForCausalLM:
    """A Llama of random weights in training mode, its embeddings tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def llama(name: str) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """A model, and a micro-batch of random tokens."""
    vocabulary, hidden, layers, rows, length = SHAPES[name]
    model = random_llama(vocabulary, hidden, layers)
    if name != "demo":
        enable_checkpointing(model, True)
    return model, torch.randint(vocabulary, (rows, length))


def steps(model: LlamaForCausalLM, ids: torch.Tensor, teacher: LlamaForCausalLM | None) -> dict:
    """The same forward and backward with all logits, as PyTorch has it, and by chunks."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)

    def whole() -> None:
        logits = model(ids, use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten())
        if teacher is not None:
            with torch.no_grad():
                theirs = teacher(ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
            own = logits.log_softmax(-1)
            loss = 0.5 * loss + 0.5 * F.kl_div(own, theirs, log_target=True, reduction="batchmean")
        loss.backward()
        model.zero_grad(set_to_none=True)

    def by_chunks() -> None:
        taught: tuple = ()
        if teacher is not None:
            with torch.no_grad(), in_place_of(teacher.lm_head, lambda hidden: hidden):
                hidden = teacher(ids, use_cache=False).logits
            taught = (Projection(hidden, teacher.lm_head.weight), 1.0, (0.5, 0.5))

        def losses(hidden: torch.Tensor) -> torch.Tensor:
            return token_sums(hidden, model.lm_head.weight, labels, *taught)

        with in_place_of(model.lm_head, losses):
            sums = model(ids, use_cache=False).logits
        (sums[0] / ids.numel()).backward()
        model.zero_grad(set_to_none=True)

    return {"whole": whole, "chunked": by_chunks}


def peak_bytes(name: str, which: str, taught: bool) -> int:
    """Anonymous memory of a step above that of the models; in a process of its own, as the C
    library keeps what a step before has freed."""
    model, ids = llama(name)
    teacher = llama(name)[0].eval() if taught else None
    step = steps(model, ids, teacher)[which]
    gc.collect()
    with PeakMemory() as memory:
        step()
    return memory.peak


def measure_shape(name: str, rounds: int) -> dict[str, float]:
    result: dict[str, float] = {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for key, taught in (("", False), ("_taught", True)):
            peaks = {
                which: fresh.submit(peak_bytes, name, which, taught).result()
                for which in ("whole", "chunked")
            }
            result |= {f"peak_bytes_{which}{key}": peak for which, peak in peaks.items()}
            result[f"peak_chunked_over_whole{key}"] = peaks["chunked"] / peaks["whole"]
    model, ids = llama(name)
    times = interleaved(rounds, **steps(model, ids, None))
    result |= {f"seconds_{which}": seconds for which, seconds in times.items()}
    return result | {"chunked_over_whole": times["chunked"] / times["whole"]}


def measure(rounds: int = 3) -> dict[str, dict[str, float]]:
    results = {f"losses_{n}": measure_shape(n, rounds) for n in SHAPES if n != "demo"}
    return results | {"losses_demo": measure_demo(20 * rounds)}


def measure_demo(rounds: int) -> dict[str, float]:
    """What is chosen there, and what chunks would take where they were forced."""
    model, ids = llama("demo")
    both = steps(model, ids, None)

    def forced() -> None:
        with patch.object(logit_chunks, "CHUNK_ELEMENTS", 2**20):
            both["chunked"]()

    times = interleaved(rounds, **both, forced=forced)
    return {
        "chosen_over_whole": times["chunked"] / times["whole"],
        "forced_over_whole": times["forced"] / times["whole"],
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
