"""Floating-point operations of a token, peaks of chips, and the tokens per second they lead to.

The operations are those of Megatron-LM, PaLM (appendix B) and torchtitan: 6 N for each token, N the
weights that are multiplied with it, and 12 L H Q T of attention (L layers, H heads of Q numbers, T
tokens in a sequence), which takes the causal mask for full. What checkpointing computes again does
not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.savings import llama_parameters
from train.common.sizes import count
from train.estimate.llama_shapes import KNOWN
from train.estimate.parameters import trainable_parameters

if TYPE_CHECKING:
    from train.estimate.llama_shapes import LlamaShape
    from train.recipe.recipe import Recipe
    from train.recipe.sections.training import Checkpointing


@dataclass(frozen=True)
class Chip:
    """A GPU by the words of its name, and its peaks in FLOP/s, dense, as its data sheet has them.

    Attributes:
        bf16: of the tensor cores, summed up in fp32.
        fp32: without TF32, which torch leaves off.
    """

    name: str
    bf16: float
    fp32: float


CHIPS = (
    Chip("GB200", 2.5e15, 80e12),
    Chip("B200", 2.25e15, 75e12),
    Chip("H200 NVL", 836e12, 60e12),
    Chip("H200", 989e12, 67e12),
    Chip("H100 NVL", 835e12, 60e12),
    Chip("H100 PCIe", 756e12, 51e12),
    Chip("H100", 989e12, 67e12),
    Chip("A100", 312e12, 19.5e12),
    Chip("L40S", 362e12, 91.6e12),
    Chip("L4", 121e12, 30.3e12),
    Chip("RTX 4090", 165.2e12, 82.6e12),
)
"""A name of more words stands before one that is a part of it."""


def find_chip(name: str) -> Chip | None:
    """The chip that a device's name, such as "NVIDIA H100 80GB HBM3", or a person's word names."""
    words = _words(name)
    return next((chip for chip in CHIPS if _words(chip.name) <= words), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def training_flops(shape: LlamaShape, length: int) -> int:
    """Operations of a token in a step that trains every weight: 6 N + 12 L H Q T.

    Args:
        length: tokens of a sequence.
    """
    return 6 * multiplied(shape) + 12 * _attention(shape, length)


def forward_flops(shape: LlamaShape, length: int) -> int:
    """Operations of a token in a forward pass: a third of a step's."""
    return 2 * multiplied(shape) + 4 * _attention(shape, length)


def multiplied(shape: LlamaShape) -> int:
    """Weights that are multiplied with a token: all, without a table that is only looked up."""
    table = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return llama_parameters(shape) - table


def _attention(shape: LlamaShape, length: int) -> int:
    layout = HeadLayout.from_config(shape)
    return layout.layers * layout.heads * layout.head_dim * length


def step_flops(recipe: Recipe, shape: LlamaShape) -> int:
    """Operations of a token in a step of this recipe.

    Frozen weights need no gradient (4 operations instead of 6), adapters are weights of their own,
    and a teacher, which counts as the base, adds a forward pass.
    """
    length, n = recipe.data.sequence_length, multiplied(shape)
    trained = trainable_parameters(shape, recipe.train.trainable, lora=recipe.lora)
    own = 6 * trained if recipe.lora is not None else 2 * min(trained, n)
    taught = 0 if recipe.distill is None else forward_flops(shape, length)
    return 4 * n + own + 12 * _attention(shape, length) + taught


@dataclass(frozen=True)
class Measurement:
    """Tokens per second of one GPU, measured.

    Attributes:
        chip: by its name in :data:`CHIPS`.
        model: by its name in the table of shapes.
        length: tokens of a sequence.
    """

    chip: str
    checkpointing: bool
    tokens_per_second: float
    model: str = "meta-llama/Llama-3.2-1B"
    length: int = 2048

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the share of the chip's dense bf16 peak."""
        chip = find_chip(self.chip)
        assert chip is not None
        flops = training_flops(KNOWN[self.model], self.length)
        return self.tokens_per_second * flops / chip.bf16


MEASURED = (Measurement("H100", True, 33_504), Measurement("H100", False, 40_523))
"""By `make test-gpu` or before it (docs/results.md, One GPU): bf16, no plan, nothing compiled."""
SMALLEST = 4
"""A model of fewer parameters than this part of the measured one's keeps a GPU less busy."""


def measured_on(chip: Chip, checkpointing: Checkpointing) -> Measurement | None:
    """With this checkpointing; any but none counts as that of every layer, the slowest."""
    mode = bool(checkpointing)
    return next((m for m in MEASURED if (m.chip, m.checkpointing) == (chip.name, mode)), None)


@dataclass(frozen=True)
class Assumed:
    """What a person gives for the time of a job; None: what is known counts.

    Attributes:
        tokens_per_second: of all GPUs together.
        chip: name of the GPU.
        mfu: share of its dense bf16 peak, 0 to 1.
    """

    tokens_per_second: float | None = None
    chip: str | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a training on all its GPUs together.

    Attributes:
        origin: where the number is from, for the reader, a line each.
        slower: how many times slower the chip computes in fp32, as a search does, than in what the
            training computes in; None: not known.
    """

    tokens_per_second: float
    origin: tuple[str, ...]
    slower: float | None = None


@dataclass(frozen=True)
class Unknown:
    """Why no speed is known, and what to give."""

    why: str


def speed_of(
    recipe: Recipe,
    shape: LlamaShape,
    gpus: int,
    given: Assumed,
    earlier: tuple[float, str] | None = None,
    device: str = "",
) -> Speed | Unknown:
    """From what is given, else from an earlier run, else from a measured utilization.

    Args:
        earlier: seconds of a step of an earlier run, and the file that says so.
        device: name of the GPU that is here; "" where there is none, or nobody has looked.

    Raises:
        PostshareError: a chip that is not in the table; a utilization without a chip.
    """
    chip = find_chip(given.chip or device)
    if given.chip is not None and chip is None:
        known = ", ".join(one.name for one in CHIPS)
        raise PostshareError(f"--chip {given.chip} is not known ({known}); give --speed")
    if given.mfu is not None and chip is None:
        raise PostshareError("--mfu is a share of a chip's peak; give --chip too, or --speed")
    in_fp32 = recipe.train.precision == "fp32"
    slower = 1.0 if in_fp32 else None if chip is None else chip.bf16 / chip.fp32
    if given.tokens_per_second is not None:
        return Speed(given.tokens_per_second, ("as given",), slower)
    if earlier is not None and given == Assumed():
        seconds, file = earlier
        tokens = recipe.train.batch_size * recipe.data.sequence_length
        return Speed(tokens / seconds, (f"{seconds:.3g} s a step, as in {file}",), slower)
    if chip is None:
        what = f"{device} is not in the table of chips" if device else "no chip is named"
        option = "--speed" if device else "--chip H100, or --speed"
        return Unknown(f"{what}; give {option} TOKENS")
    if in_fp32:
        return Unknown("utilization is that of bf16, this trains in fp32; give --speed TOKENS")
    mfu = given.mfu
    source: tuple[str, ...] = ("as given; GPUs taken as fast together as alone",)
    if mfu is None:
        found = measured_on(chip, recipe.train.gradient_checkpointing)
        if found is None:
            return Unknown(f"none was measured on {chip.name}; give --mfu 0.3, or --speed TOKENS")
        least = llama_parameters(KNOWN[found.model]) // SMALLEST
        if llama_parameters(shape) < least:
            return Unknown(f"none measured below {count(least)} parameters; give --speed TOKENS")
        mfu, source = found.mfu, _source(found)
    peak = chip.bf16
    flops = step_flops(recipe, shape)
    return Speed(
        gpus * mfu * peak / flops,
        (
            f"MFU {mfu:.1%} on {chip.name}",
            f"of {peak / 1e12:,.4g} TFLOP/s (dense bf16), {flops / 1e9:,.3g} GFLOP a token",
            *source,
        ),
        slower,
    )


def _source(found: Measurement) -> tuple[str, ...]:
    mode = "with" if found.checkpointing else "without"
    model = found.model.rpartition("/")[2]
    return (
        f"measured on one {found.chip} at {model}'s shape, {mode} checkpointing",
        "(docs/results.md); GPUs taken as fast together as alone",
    )
