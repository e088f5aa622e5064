"""What a run needs and saves, from the config alone: parameters, units, bytes, memory per GPU.

The memory is an estimate of what PyTorch must hold at the peak of a training step: it leaves out
the CUDA context, communication buffers and fragmentation (allow 2 to 4 GB for them).
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan
from sa_models.residual import check_rank
from sa_models.savings import PlanSavings, llama_parameters
from sa_models.span_search import best_spans, late_spans
from sa_models.spans import AttentionSpan
from train.auto_budgets import PAPER, asked_of_units
from train.budgets import amount
from train.known_models import DTYPE_BYTES
from train.planning import check_budget
from train.structure_sections import check_structure, listed_structure

if TYPE_CHECKING:
    from train.distill_section import DistillSection
    from train.known_models import LlamaShape
    from train.lora_section import LoraSection
    from train.recipe import PlanSection, Recipe, TrainSection

ZERO_STAGES = (0, 1, 2, 3)


def expected_structure(recipe: Recipe, shape: LlamaShape) -> SharingPlan:
    """KV heads and spans of a recipe; spans that are still to be found stand in as late layers.

    Every layer has the same sizes, so that only their number counts here.

    Raises:
        PostshareError: spans or KV heads that do not fit the model.
    """
    if recipe.plan.strategy == "file":
        plan = SharingPlan.load(recipe.plan.path or "")
        check_structure(recipe, plan, shape)
        return plan.structure()
    structure = listed_structure(recipe.heads, recipe.spans)
    section = recipe.spans
    if section is not None and section.layers is not None:
        limits = (section.layers, section.max_followers, section.skip_layers)
        if section.strategy == "late":
            found = late_spans(shape.num_hidden_layers, *limits)
        else:
            found = best_spans(lambda leader, followers: 0.0, shape.num_hidden_layers, *limits)
        spans = tuple(AttentionSpan(*span, section.share) for span in found)
        structure = replace(structure, spans=spans)
    check_structure(recipe, structure, shape)
    return structure


def requested_units(section: PlanSection, shape: LlamaShape, structure: SharingPlan) -> int:
    """Units that the budget asks for, before they are chosen; with action any, at most.

    Raises:
        PostshareError: see :func:`train.planning.check_budget`.
    """
    check_budget(section, shape, structure)
    asked = amount(section, shape, structure)
    tied = section.action != "remove" and asked.tie_saves
    return asked.units("tie" if tied else "remove")


def plan_savings(
    section: PlanSection, shape: LlamaShape, structure: SharingPlan | None = None
) -> PlanSavings:
    """What the plan of a recipe will save, before it is known which units it chooses.

    For strategy released this is an upper bound: its chains undo some of the ties.

    Args:
        structure: KV heads and spans, see :func:`expected_structure`.

    Raises:
        PostshareError: a budget that cannot be met, or a plan file that does not fit the model.
    """
    if section.strategy == "file":
        plan = SharingPlan.load(section.path or "")
        plan.validate(shape)
        return plan.savings(shape)
    structure = structure or SharingPlan()
    savings = structure.savings(shape)
    if section.strategy == "none":
        return savings
    layout = structure.layout(shape)
    if section.strategy == "auto":
        return _auto_savings(section, shape, structure)
    count = requested_units(section, shape, structure)
    heads = count * layout.heads_per_unit
    if section.action == "remove":
        return replace(
            savings,
            removed_units=count,
            removed_heads=heads,
            removed_unit_parameters=count * sum(map(layout.unit_parameters, PROJECTIONS)),
            stored_cache=savings.stored_cache - count * 2 * layout.head_dim,
        )
    return replace(
        savings,
        tied_units=count,
        tied_heads=heads,
        tied_parameters=count * sum(map(layout.unit_parameters, section.share)),
    )


def residual_parameters(recipe: Recipe, shape: LlamaShape, structure: SharingPlan) -> int:
    """Most parameters of the residuals, before it is known which layers have tied units.

    Raises:
        PostshareError: a rank larger than the head, and as :func:`plan_savings`.
    """
    section, plan = recipe.residual, recipe.plan
    if section is None:
        return 0
    check_rank(section.rank, HeadLayout.from_config(shape))
    if plan.strategy == "file":
        return section.parameters(SharingPlan.load(plan.path or ""), shape)
    layout = structure.layout(shape)
    tied = {*range(layout.layers)} - {*plan.skip_layers} - structure.leader_of().keys()
    layers = min(len(tied), requested_units(plan, shape, structure))
    return section.rank * layers * sum(sum(layout.shape(p)) for p in plan.share)


def _auto_savings(section: PlanSection, shape: LlamaShape, structure: SharingPlan) -> PlanSavings:
    """What the budget asks for, whatever will save it; of units, as many ties of the paper's q, k
    and v."""
    check_budget(section, shape, structure)
    asked, savings = asked_of_units(section, shape, structure), structure.savings(shape)
    if asked.counted == "cache":
        return replace(savings, stored_cache=savings.stored_cache - asked.needed)
    if asked.counted != "units":
        return replace(savings, tied_parameters=asked.needed)
    layout = structure.layout(shape)
    return replace(
        savings,
        tied_units=asked.needed,
        tied_heads=asked.needed * layout.heads_per_unit,
        tied_parameters=asked.needed * sum(map(layout.unit_parameters, PAPER)),
    )


def trainable_parameters(
    shape: LlamaShape,
    patterns: tuple[str, ...],
    structure: SharingPlan | None = None,
    lora: LoraSection | None = None,
) -> int:
    """Parameters of the model with this structure whose name matches one of the fnmatch `patterns`;
    with LoRA those of the adapters.

    Without ties: those are made after training.
    """
    structure = structure or SharingPlan()
    if lora is not None:
        return lora.parameters(_shapes(shape, structure))
    if "*" in patterns:
        return structure.savings(shape).stored_parameters
    return sum(
        math.prod(size)
        for name, size in _shapes(shape, structure).items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _shapes(shape: LlamaShape, structure: SharingPlan) -> dict[str, tuple[int, ...]]:
    from sa_models.readers import expanded_shapes

    pooled = replace(shape, num_key_value_heads=structure.layout(shape).kv_heads)
    return expanded_shapes(pooled, structure)


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


def layer_activations(shape: LlamaShape, tokens: int, length: int, size: int, eager: bool) -> int:
    """Bytes that one decoder layer keeps for its backward pass, without checkpointing.

    RMSNorm keeps its input in fp32, and the normalized value; a linear layer keeps its input; a
    fused attention keeps q, k, v, its output and one fp32 number per query; eager attention keeps
    its map instead; SwiGLU keeps gate, its activation, up and their product.

    Args:
        tokens: tokens of a micro-batch.
        length: tokens of one sequence.
        size: bytes of an activation, 4 or 2.
        eager: whether attention materializes its map.
    """
    layout = HeadLayout.from_config(shape)
    hidden, middle = shape.hidden_size, shape.intermediate_size
    query, key = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    norms = 2 * (4 * hidden + 2 * size * hidden)
    if eager:
        # The fp32 softmax, and its copy in the activations' type; keys and values repeated.
        attention = size * 4 * query + layout.heads * length * (4 if size == 4 else 4 + size)
    else:
        attention = size * (2 * query + 2 * key) + 4 * layout.heads
    return tokens * (norms + attention + 4 * size * middle)


def memory_per_gpu(
    shape: LlamaShape,
    train: TrainSection,
    *,
    stage: int,
    gpus: int,
    sequence_length: int,
    checkpointing: bool,
    eager: bool = False,
    distill: DistillSection | None = None,
    lora: LoraSection | None = None,
) -> Memory:
    """Memory of one GPU of `gpus` under a ZeRO stage (0: plain data parallel).

    Without ZeRO, weights, gradients and two moments are fp32, and bf16 autocast adds a bf16 copy
    of the weights. DeepSpeed keeps weights in the training precision, sums gradients in fp32, and
    updates an fp32 master copy (in fp32 training too): ZeRO-1 divides master copy and moments by
    the number of GPUs, ZeRO-2 the gradients too, ZeRO-3 the weights too. What ZeRO-3 gathers at a
    time is counted as the larger of one layer and one embedding. It is that of the base's own
    structure, which *continued* trains; spans and fewer KV heads need less. With LoRA the weights
    are as `lora.base` says, and the rest is that of the adapters; there is no ZeRO then.
    """
    total = llama_parameters(shape)
    trained = trainable_parameters(shape, train.trainable, lora=lora)
    size = 2 if train.precision == "bf16" else 4
    moments = 2 if train.optimizer == "adamw_8bit" else 8

    def share(amount: int, from_stage: int) -> int:
        return math.ceil(amount / gpus) if stage >= from_stage else amount

    plain = 6 if size == 2 else 4
    weights = plain * total if stage == 0 else share(size * total, 3)
    if lora is not None:
        weights = lora.model_bytes(_shapes(shape, SharingPlan()), size) + plain * trained
    if stage == 3 and gpus > 1:
        embeddings = shape.vocab_size * shape.hidden_size
        matrices = 1 if shape.tie_word_embeddings else 2
        layer = (total - matrices * embeddings) // shape.num_hidden_layers
        weights += size * max(layer, embeddings)
    tokens = train.micro_batch_size * sequence_length
    one_layer = layer_activations(shape, tokens, sequence_length, size, eager)
    kept = size * tokens * shape.hidden_size if checkpointing else one_layer
    activations = shape.num_hidden_layers * kept + (one_layer if checkpointing else 0)
    return Memory(
        weights=weights,
        gradients=share(4 * trained, 2),
        optimizer=share((moments + (4 if stage else 0)) * trained, 1),
        activations=activations,
        # The logits, their fp32 copy (the same in fp32), the log-probabilities, their gradient.
        logits=tokens * shape.vocab_size * (10 if size == 2 else 12),
        teacher=teacher_memory(shape, distill, tokens, stage=stage, gpus=gpus),
    )


def teacher_memory(
    shape: LlamaShape, section: DistillSection | None, tokens: int, *, stage: int, gpus: int
) -> int:
    """Bytes that the teacher takes on one GPU beside the student; another one counts as the base.

    Whole, or under ZeRO-3 its share and what a forward gathers; with its logits, and the outputs
    that are compared. A cached teacher is gone before the student comes.
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
    features = compared * shape.num_hidden_layers * shape.hidden_size
    return held + tokens * max(2, size) * (shape.vocab_size + features)


def checkpoint_bytes(
    shape: LlamaShape, train: TrainSection, lora: LoraSection | None = None
) -> int:
    """Bytes of one checkpoint, the same on every backend: fp32 weights and moments of what is
    trained. Spans and fewer KV heads need less."""
    trained = trainable_parameters(shape, train.trainable, lora=lora)
    return (6 if train.optimizer == "adamw_8bit" else 12) * trained


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes."""

    checkpoint: int
    weights: int
    exports: int
    kept: int
    """Everything at its fullest: checkpoints kept and one being written, of every training."""
    teacher: int = 0
    """The answers of a teacher that is asked once."""

    @property
    def least(self) -> int:
        """What it takes to finish when only one checkpoint is written."""
        return self.checkpoint + self.weights + self.exports + self.teacher


def disk_space(recipe: Recipe, shape: LlamaShape) -> Disk:
    """What a run folder grows to.

    Raises:
        PostshareError: see :func:`expected_structure` and :func:`plan_savings`.
    """
    train = recipe.train
    structure = expected_structure(recipe, shape)
    savings = plan_savings(recipe.plan, shape, structure)
    element = DTYPE_BYTES.get(recipe.export.dtype, shape.dtype_bytes)
    exports = 0
    if "compact" in recipe.export.formats or not structure.has_stock_form:
        adapter = residual_parameters(recipe, shape, structure)
        exports += (savings.stored_parameters + adapter) * element
    if "dense" in recipe.export.formats and structure.has_stock_form:
        exports += savings.dense_parameters * element
    own = (train.steps != 0) + (recipe.materialize.heal_steps > 0)
    trainings = own + (own > 0 and recipe.evaluate.continued and recipe.shares)
    checkpoint = checkpoint_bytes(shape, train, recipe.lora) if trainings else 0
    # Without checkpoint_every one is written when the run is stopped, and no other.
    kept = train.keep_checkpoints * trainings + 1 if train.checkpoint_every else 1
    # Of a merge on text, and of the first factors, whole fp32 weights are written as well.
    written = trainings + recipe.materialize.measures + (recipe.basis is not None)
    weights = 4 * savings.base_parameters * written
    teacher = cached_bytes(recipe)
    everything = kept * checkpoint + weights + exports + teacher
    return Disk(checkpoint, weights, exports, everything, teacher)


def cached_bytes(recipe: Recipe) -> int:
    """Most bytes of the teacher's answers; 0 where only the data tells (epochs)."""
    section = recipe.distill
    if section is None or not section.cache or section.top_k is None:
        return 0
    samples = (recipe.steps or 0) * recipe.train.batch_size
    return samples * recipe.data.sequence_length * (8 * section.top_k + 4)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process sends in one optimizer step."""

    gradients: int
    weights: int


def step_traffic(
    shape: LlamaShape,
    train: TrainSection,
    stage: int,
    world: int,
    lora: LoraSection | None = None,
) -> Traffic:
    """What gradients and weights cost on the wire; gradients travel in fp32.

    A ring all-reduce sends 2 (n - 1) / n of the size, a reduce-scatter or an all-gather half of
    it. DDP and ZeRO-1 exchange gradients once a step, ZeRO-2 and 3 once a forward; ZeRO-1 and 2
    gather the updated weights, ZeRO-3 gathers them for every forward and every backward.
    """
    total = llama_parameters(shape)
    trained = trainable_parameters(shape, train.trainable, lora=lora)
    size = 2 if train.precision == "bf16" else 4
    half = (world - 1) / world
    passes = train.accumulation(world)
    if stage == 0:
        return Traffic(int(2 * half * 4 * trained), 0)
    gradients = half * 4 * trained * (passes if stage >= 2 else 1)
    weights = half * size * (2 * passes * total if stage == 3 else trained)
    return Traffic(int(gradients), int(weights))


@dataclass(frozen=True)
class Length:
    """How much a run trains on; None where only the data can tell (epochs)."""

    tokens_per_step: int
    steps: int | None

    @property
    def tokens(self) -> int | None:
        """Tokens in all, those of the last position of a block included."""
        return None if self.steps is None else self.steps * self.tokens_per_step


def length(recipe: Recipe) -> Length:
    """Tokens per optimizer step, and steps, healing included."""
    return Length(recipe.train.batch_size * recipe.data.sequence_length, recipe.steps)


def most_gpus(train: TrainSection, limit: int = 8) -> int:
    """The largest number of GPUs up to `limit` among which the batch divides evenly."""
    forwards = train.batch_size // train.micro_batch_size
    return max(n for n in range(1, limit + 1) if forwards % n == 0)
