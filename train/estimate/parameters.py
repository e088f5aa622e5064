"""Arithmetic of a run, from the config alone: parameters, units, bytes, traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.materialize.residual_shapes import check_rank
from sa_models.plan import SharingPlan
from sa_models.savings import PlanSavings, llama_parameters
from sa_models.spans import AttentionSpan
from sa_models.weights.parameter_shapes import expanded_shapes
from train.estimate.llama_shapes import DTYPE_BYTES
from train.planning.basis import basis_plan
from train.planning.check import check_budget, expected_spans
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import PAPER
from train.recipe.rules import check_structure
from train.recipe.sections.structure import listed_structure

if TYPE_CHECKING:
    from train.estimate.llama_shapes import LlamaShape
    from train.recipe.recipe import PlanSection, Recipe, TrainSection
    from train.recipe.sections.lora import LoraSection
    from train.recipe.sections.residual import ResidualSection


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
        found = expected_spans(section, shape.num_hidden_layers)
        spans = tuple(AttentionSpan(*span, section.share) for span in found)
        structure = replace(structure, spans=spans)
    check_structure(recipe, structure, shape)
    return structure


def requested_units(problem: PlanProblem) -> int:
    """Units that the budget asks for, before they are chosen; with action any, at most.

    Raises:
        PostshareError: see :func:`train.planning.check.check_budget`.
    """
    check_budget(problem)
    section, asked = problem.section, problem.required
    if section.action == "drop":
        return asked.actions("drop") * problem.layout.units
    if section.uniform:
        return problem.in_each_layer * problem.layout.layers
    tied = section.action != "remove" and asked.tie_saves
    return asked.actions("tie" if tied else "remove")


def plan_savings(problem: PlanProblem) -> PlanSavings:
    """What the plan of a recipe will save, before it is known which units it chooses.

    For strategy released this is an upper bound: its chains undo some of the ties.

    Args:
        problem: on the expected structure, see :func:`expected_structure`.

    Raises:
        PostshareError: a budget that cannot be met, or a plan file that does not fit the model.
    """
    section, shape = problem.section, problem.config
    layout, savings = problem.layout, problem.savings
    if section.strategy == "file":
        plan = SharingPlan.load(section.path or "")
        plan.validate(shape)
        return plan.savings(shape)
    if section.strategy == "none":
        return savings
    if section.strategy == "auto":
        return _auto_savings(problem)
    if section.strategy == "basis":
        return basis_plan(problem).savings(shape)
    count = requested_units(problem)
    heads = count * layout.heads_per_unit
    if section.removes:
        dropped = count // layout.units if section.action == "drop" else 0
        return replace(
            _with_removed(savings, count, heads, layout),
            dropped_layers=dropped,
            dropped_norm_parameters=dropped * layout.hidden_size,
            stock_units=layout.units - problem.in_each_layer if section.uniform else None,
        )
    return replace(
        savings,
        tied_units=count,
        tied_heads=heads,
        tied_parameters=count * sum(map(layout.unit_parameters, section.share)),
    )


def residual_parameters(section: ResidualSection | None, problem: PlanProblem) -> int:
    """Most parameters of the residuals, before it is known which layers have tied units.

    Raises:
        PostshareError: a rank larger than the head, and as :func:`plan_savings`.
    """
    if section is None:
        return 0
    plan, shape, layout = problem.section, problem.config, problem.layout
    check_rank(section.rank, HeadLayout.from_config(shape))
    if plan.strategy == "file":
        return section.parameters(SharingPlan.load(plan.path or ""), shape)
    tied = {*range(layout.layers)} - {*problem.skipped_layers("tie")}
    layers = min(len(tied), requested_units(problem))
    return section.rank * layers * sum(sum(layout.shape(p)) for p in plan.share)


def _auto_savings(problem: PlanProblem) -> PlanSavings:
    """What the budget asks for, whatever will save it; of units, as many ties of the paper's q, k
    and v, or removals where nothing is tied."""
    check_budget(problem)
    asked, savings, layout = problem.remaining, problem.savings, problem.layout
    if problem.section.uniform:
        units = problem.in_each_layer * layout.layers
        removed = _with_removed(savings, units, units * layout.heads_per_unit, layout)
        return replace(removed, stock_units=layout.units - problem.in_each_layer)
    if asked.counted == "cache":
        return replace(savings, stored_cache=savings.stored_cache - asked.needed)
    if asked.counted != "units":
        return replace(savings, tied_parameters=asked.needed)
    heads = asked.needed * layout.heads_per_unit
    if not problem.section.may_tie:
        return _with_removed(savings, asked.needed, heads, layout)
    return replace(
        savings,
        tied_units=asked.needed,
        tied_heads=heads,
        tied_parameters=asked.needed * sum(map(layout.unit_parameters, PAPER)),
    )


def _with_removed(savings: PlanSavings, units: int, heads: int, layout: HeadLayout) -> PlanSavings:
    return replace(
        savings,
        removed_units=units,
        removed_heads=heads,
        removed_unit_parameters=units * sum(map(layout.unit_parameters, PROJECTIONS)),
        stored_cache=savings.stored_cache - units * 2 * layout.head_dim,
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
        return lora.parameters(parameter_shapes(shape, structure))
    if "*" in patterns:
        return structure.savings(shape).stored_parameters
    return sum(
        math.prod(size)
        for name, size in parameter_shapes(shape, structure).items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def trains_lm_head(shape: LlamaShape, patterns: tuple[str, ...]) -> bool:
    """Whether it, or the embeddings that it is tied to, matches one of the fnmatch `patterns`."""
    name = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parameter_shapes(shape: LlamaShape, structure: SharingPlan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model with this structure."""
    pooled = replace(shape, num_key_value_heads=structure.layout(shape).kv_heads)
    return expanded_shapes(pooled, structure)


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
    problem = PlanProblem(recipe.plan, shape, structure)
    savings = plan_savings(problem)
    element = DTYPE_BYTES.get(recipe.export.dtype, shape.dtype_bytes)
    exports = 0
    if "compact" in recipe.export.formats or not structure.has_stock_form:
        adapter = residual_parameters(recipe.residual, problem)
        exports += (savings.stored_parameters + adapter) * element
    if "dense" in recipe.export.formats and structure.has_stock_form:
        exports += savings.dense_parameters * element
    if "gguf" in recipe.export.formats:
        exports += savings.dense_parameters * (4 if recipe.export.gguf == "f32" else element)
    own = (train.steps != 0) + (recipe.materialize.heal_steps > 0)
    trainings = own + (own > 0 and recipe.evaluate.continued and recipe.plans)
    checkpoint = checkpoint_bytes(shape, train, recipe.lora) if trainings else 0
    # Without checkpoint_every one is written when the run is stopped, and no other.
    kept = train.keep_checkpoints * trainings + 1 if train.checkpoint_every else 1
    # Of a merge on text, and of the first factors, whole fp32 weights are written as well.
    on_text = recipe.materialize.measures or has_basis(recipe.plan)
    written = trainings + on_text
    weights = 4 * savings.base_parameters * written
    teacher = cached_bytes(recipe)
    everything = kept * checkpoint + weights + exports + teacher
    return Disk(checkpoint, weights, exports, everything, teacher)


def has_basis(section: PlanSection) -> bool:
    """Whether the plan is known to have a basis, which calibration text factorizes.

    Raises:
        PostshareError: a plan file that cannot be read.
    """
    if section.strategy == "file":
        return SharingPlan.load(section.path or "").basis is not None
    return section.strategy == "basis"


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


def most_gpus(train: TrainSection, limit: int = 8) -> int:
    """The largest number of GPUs up to `limit` among which the batch divides evenly."""
    forwards = train.batch_size // train.micro_batch_size
    return max(n for n in range(1, limit + 1) if forwards % n == 0)
