"""Memory of a GPU, from the config alone: at the peak of a step, and outside training.

These are estimates of PyTorch's tensors: they leave out the CUDA context, communication buffers and
fragmentation (allow 2 to 4 GB for them).
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from sa_models.calibration.logit_chunks import chunk_elements
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.savings import llama_parameters
from train.estimate.parameters import (
    has_basis,
    parameter_shapes,
    trainable_parameters,
    trains_lm_head,
)

if TYPE_CHECKING:
    from train.estimate.llama_shapes import LlamaShape
    from train.recipe.recipe import Recipe, TrainSection
    from train.recipe.sections.distill import DistillSection
    from train.recipe.sections.lora import LoraSection
    from train.recipe.sections.training import Checkpointing

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(astuple(self))


def layer_activations(
    shape: LlamaShape, tokens: int, length: int, size: int, eager: bool, autocast: bool = False
) -> int:
    """Bytes that one decoder layer keeps for its backward pass, without checkpointing.

    RMSNorm keeps its input in fp32, and the normalized value; a linear layer keeps its input; a
    fused attention keeps q, k, v, its output and one fp32 number per query, and o a copy of that
    output (on a GPU; a CPU's kernel writes it as o reads it); eager attention keeps its map
    instead; SwiGLU keeps gate, its activation, up and their product. Under autocast what layers
    hand on is fp32, and each of q, k, v, gate and up keeps a cast copy of its own.

    Args:
        tokens: tokens of a micro-batch.
        length: tokens of one sequence.
        size: bytes of an activation, 4 or 2.
        eager: whether attention materializes its map.
        autocast: whether weights are fp32 and autocast makes the activations bf16.
    """
    layout = HeadLayout.from_config(shape)
    hidden, middle = shape.hidden_size, shape.intermediate_size
    query, key = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    norms = 16 * hidden + 5 * size * hidden if autocast else 2 * (4 * hidden + 2 * size * hidden)
    if eager:
        # The fp32 softmax, and its copy in the activations' type; keys and values repeated.
        attention = size * 4 * query + layout.heads * length * (4 if size == 4 else 4 + size)
    else:
        attention = size * (3 * query + 2 * key) + 4 * layout.heads
    return tokens * (norms + attention + 4 * size * middle)


def kept_products(shape: LlamaShape, tokens: int, size: int, eager: bool) -> int:
    """Bytes that one layer keeps of its own under selective checkpointing.

    The products q, k, v, o, gate, up and down, and of a fused attention its output and one fp32
    number per query.
    """
    layout = HeadLayout.from_config(shape)
    query, key = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    products = query + 2 * key + 2 * shape.hidden_size + 2 * shape.intermediate_size
    attention = 0 if eager else size * query + 4 * layout.heads
    return tokens * (size * products + attention)


def logits_memory(shape: LlamaShape, tokens: int, size: int, *, trained: bool, taught: bool) -> int:
    """Bytes that the losses take on a GPU: of whole logits, or of a chunk of their rows.

    In fp32, of whole ones the log-probabilities, the gradient of what is picked from them, and
    theirs. Of a chunk the logits and the log-probabilities, with a teacher three more; and the
    gradient of lm_head, whole and in fp32 until the backward, with what a chunk in bf16 adds to it.

    Args:
        tokens: of a micro-batch.
        size: bytes of an activation, 4 or 2.
        trained: whether lm_head, or the embeddings it is tied to, trains.
        taught: whether there is a teacher: it is always asked by chunks.
    """
    vocabulary, most = shape.vocab_size, chunk_elements("cuda")
    if not taught and tokens * vocabulary <= most:
        return 12 * tokens * vocabulary
    rows = min(tokens, max(1, most // vocabulary))
    added = (4 if size == 4 else 4 + size) * vocabulary * shape.hidden_size
    return (20 if taught else 8) * rows * vocabulary + (added if trained else 0)


def memory_per_gpu(
    shape: LlamaShape,
    train: TrainSection,
    *,
    stage: int,
    gpus: int,
    sequence_length: int,
    checkpointing: Checkpointing,
    eager: bool = False,
    distill: DistillSection | None = None,
    lora: LoraSection | None = None,
) -> Memory:
    """Memory of one GPU of `gpus` under a ZeRO stage (0: plain data parallel).

    Without ZeRO, weights, gradients and two moments are fp32, and bf16 autocast adds a bf16 copy
    of the weights (with checkpointing: of one layer's, of those that are not checkpointed and of
    the embeddings). DeepSpeed keeps weights
    in the training precision, sums gradients in fp32, and updates an fp32 master copy (in fp32
    training too): ZeRO-1 divides master copy and moments by the number of GPUs, ZeRO-2 the
    gradients too, ZeRO-3 the weights too. What ZeRO-3 gathers at a time is counted as the larger of
    one layer and one embedding. It is that of the base's own structure, which *continued* trains;
    spans and fewer KV heads need less. With LoRA the weights are as `lora.base` says, and the rest
    is that of the adapters; there is no ZeRO then.
    """
    total = llama_parameters(shape)
    trained = trainable_parameters(shape, train.trainable, lora=lora)
    size = 2 if train.precision == "bf16" else 4
    moments = 2 if train.optimizer == "adamw_8bit" else 8

    def share(amount: int, from_stage: int) -> int:
        return math.ceil(amount / gpus) if stage >= from_stage else amount

    embeddings = shape.vocab_size * shape.hidden_size
    matrices = 1 if shape.tie_word_embeddings else 2
    layer = (total - matrices * embeddings) // shape.num_hidden_layers
    autocast = stage == 0 and size == 2
    layers = shape.num_hidden_layers
    every = 1 if isinstance(checkpointing, bool | str) else checkpointing
    whole_layers = layers - (math.ceil(layers / every) if checkpointing else 0)
    weights = share(size * total, 3)
    if lora is not None:
        plain = 6 if size == 2 else 4
        weights = lora.model_bytes(parameter_shapes(shape, SharingPlan()), size) + plain * trained
    elif autocast:
        copied = embeddings + (1 + whole_layers) * layer
        weights = 4 * total + 2 * (total if checkpointing is False else copied)
    if stage == 3 and gpus > 1:
        weights += size * max(layer, embeddings)
    tokens = train.micro_batch_size * sequence_length
    one_layer = layer_activations(shape, tokens, sequence_length, size, eager, autocast)
    entering = (4 if autocast else size) * tokens * shape.hidden_size
    kept = entering
    if checkpointing == "selective":
        kept += kept_products(shape, tokens, size, eager)
    activations = whole_layers * one_layer + (layers - whole_layers) * kept
    activations += one_layer if whole_layers < layers else 0
    return Memory(
        weights=weights,
        gradients=share(4 * trained, 2),
        optimizer=share((moments + (4 if stage else 0)) * trained, 1),
        activations=activations,
        logits=logits_memory(
            shape,
            tokens,
            size,
            trained=lora is None and trains_lm_head(shape, train.trainable),
            taught=distill is not None,
        ),
        teacher=teacher_memory(shape, distill, tokens, stage=stage, gpus=gpus),
    )


def teacher_memory(
    shape: LlamaShape, section: DistillSection | None, tokens: int, *, stage: int, gpus: int
) -> int:
    """Bytes that the teacher takes on one GPU beside the student; another one counts as the base.

    Whole, or under ZeRO-3 its share and what a forward gathers; with its last hidden states, and
    the outputs that are compared. A cached teacher is gone before the student comes.
    """
    if section is None or section.cache:
        return 0
    total = llama_parameters(shape)
    size = {"fp32": 4, "bf16": 2, "int8": 1}[section.precision]
    held = size * total
    if stage == 3 and gpus > 1:
        embeddings = shape.vocab_size * shape.hidden_size
        matrices = 1 if shape.tie_word_embeddings else 2
        layer = (total - matrices * embeddings) // shape.num_hidden_layers
        # The embeddings throughout, and a layer while the next one is fetched.
        held = math.ceil(held / gpus) + size * (matrices * embeddings + 2 * layer)
    compared = (section.hidden_weight > 0) + (section.attention_weight > 0)
    states = 1 + compared * shape.num_hidden_layers
    return held + tokens * max(2, size) * states * shape.hidden_size


@dataclass(frozen=True)
class WholeModels:
    """What the main process holds on its device outside training, however the training is spread.

    Attributes:
        count: fp32 models held at once.
        stage: of the run, that holds them: "evaluate" or "materialize".
        bytes: of their weights.
    """

    count: int
    stage: str
    bytes: int


def whole_models(recipe: Recipe, shape: LlamaShape) -> WholeModels:
    """The most that any stage of a run holds whole.

    Every run evaluates one model at a time; ``materialize.reconstruct`` has the unshared one
    beside that which it changes, and a factorization the factors. What is measured on one block of
    text at a time is left out.
    """
    two = recipe.materialize.reconstruct or has_basis(recipe.plan)
    count, stage = (2, "materialize") if two else (1, "evaluate")
    return WholeModels(count, stage, 4 * count * llama_parameters(shape))
