"""The output of `--dry-run`: what the plan saves, what the run needs, and the resolved recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from sa_models.plan import SharingPlan
from sa_models.spans import ranges
from train.common.console import plain_console
from train.common.sizes import byte_unit, count, size
from train.estimate import gpu_memory, parameters
from train.estimate.duration import Job, cost_rows, earlier_pace, steps_of
from train.estimate.llama_shapes import DTYPE_BYTES, LlamaShape, find_shape
from train.estimate.throughput import Assumed, speed_of
from train.evaluation.figures import Figures, rows_table
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import REBUILT, auto_passes
from train.recipe.precision import is_auto, with_precision
from train.recipe.warnings import recipe_warnings

if TYPE_CHECKING:
    from sa_models.savings import PlanSavings
    from train.recipe.recipe import Recipe
    from train.recipe.sections.lora import LoraSection
    from train.recipe.sections.training import Checkpointing


def print_dry_run(
    recipe: Recipe,
    gpus: int | None = None,
    console: Console | None = None,
    *,
    full: bool = False,
    assumed: Assumed = Assumed(),  # noqa: B008 - it cannot be changed
) -> None:
    """Print what a run saves, needs and takes, from the config alone; nothing is written but, where
    epochs of local text are counted, the cache of its tokens.

    Args:
        gpus: GPUs to estimate for (default: the most, up to 8, that divide the batch).
        full: also print the resolved recipe.
        assumed: for the time (default: as an earlier run in the run folder).

    Raises:
        PostshareError: the model's config is not found, the budget cannot be met, the batch
            does not divide among `gpus`, local text cannot be read, or `assumed` names no known
            chip.
    """
    console = console or plain_console()
    text, auto = recipe.to_yaml(), is_auto(recipe)
    recipe = with_precision(recipe, "bf16")
    shape, origin = find_shape(recipe.model)
    gpus = gpus or parameters.most_gpus(recipe.train)
    accumulation = recipe.accumulation(gpus)
    structure = parameters.expected_structure(recipe, shape)
    problem = PlanProblem(recipe.plan, shape, structure)
    savings = parameters.plan_savings(problem)
    rows = [*_model_rows(recipe, problem, origin), *_plan_rows(recipe, problem, savings)]
    rows += _saved_rows(recipe, problem, savings)
    needed = [*_training_rows(recipe, problem, gpus, accumulation, assumed)]
    if auto:
        needed.append(("precision", "auto: bf16 where every process has it, as here, else fp32"))
    for name, value in rows:
        console.print(f"{name:<12}{value}", soft_wrap=True)
    if recipe.plans:
        console.print()
        console.print(rows_table(_figures(recipe, problem, savings)))
        console.print()
    for name, value in needed:
        console.print(f"{name:<12}{value}", soft_wrap=True)
    if recipe.steps != 0:
        console.print()
        for part in _memory(recipe, shape, gpus):
            console.print(part)
    for line in recipe_warnings(recipe, _shared(recipe), shape.max_position_embeddings):
        console.print(Text.assemble(("warning:", "yellow"), f" {line}"))
    if full:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        console.print("the whole recipe, defaults included: --full")


Rows = Iterator[tuple[str, str]]


def _model_rows(recipe: Recipe, problem: PlanProblem, origin: str) -> Rows:
    shape = problem.config
    yield "model", str(recipe.model.path)
    yield "config", origin
    yield "parameters", count(problem.savings.base_parameters)
    trained = parameters.trainable_parameters(
        shape, recipe.train.trainable, problem.structure, recipe.lora
    )
    yield "trained", count(trained if recipe.steps != 0 else 0)
    if recipe.lora is not None:
        yield "lora", _lora(recipe.lora)


def _saved_rows(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> Rows:
    plan, structure, element = recipe.plan, problem.structure, _element(recipe, problem.config)
    residual = parameters.residual_parameters(recipe.residual, problem)
    if recipe.plans:
        bound = "at most " if plan.strategy == "released" else ""
        removed = savings.removed_parameters - residual
        ratio = removed / savings.attention_parameters
        yield (
            "saved",
            f"{bound}{removed:,} parameters: {ratio:.1%} of attention, "
            f"{removed / savings.base_parameters:.1%} of the model",
        )
    if recipe.plans and recipe.residual is not None:
        yield "residual", f"rank {recipe.residual.rank}, at most {count(residual)} parameters"
    forms = []
    if plan.strategy != "none" or structure.spans:
        forms.append(f"compact {size(savings.bytes(element)[1])}")
    if recipe.plans and residual:
        forms.append(f"adapter at most {size(residual * element)}")
    dense = f"dense {size(savings.dense_parameters * element)}"
    forms.append(dense if structure.has_stock_form else "no dense form")
    yield "export", f"{', '.join(forms)}, {element} bytes per parameter"


def _element(recipe: Recipe, shape: LlamaShape) -> int:
    """Bytes of one exported parameter."""
    return DTYPE_BYTES.get(recipe.export.dtype, shape.dtype_bytes)


def _figures(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> dict[str, str]:
    """The four figures; what strategy auto is free to choose is not foretold."""
    residual = parameters.residual_parameters(recipe.residual, problem)
    shape = problem.config
    positions = shape.max_position_embeddings
    rows = Figures.of_plan(savings, _element(recipe, shape), positions, residual).rows()
    if recipe.plan.strategy == "auto":
        asked_of_cache = problem.remaining.counted == "cache"
        for name in rows:
            if name.startswith("cache" if not asked_of_cache else "weight"):
                rows[name] = "as the search decides"
    return rows


def _training_rows(
    recipe: Recipe, problem: PlanProblem, gpus: int, accumulation: int, assumed: Assumed
) -> Rows:
    train, shape = recipe.train, problem.config
    if recipe.steps != 0:
        steps = steps_of(recipe, shape)
        yield from _length_rows(recipe, steps)
        speed = speed_of(recipe, shape, gpus, assumed, earlier_pace(recipe))
        yield from cost_rows(Job(recipe, problem, steps, gpus), speed)
        yield (
            "batch",
            f"{train.batch_size} sequences = {gpus} GPU(s) x {train.micro_batch_size} x "
            f"accumulation {accumulation}",
        )
        if train.compile:
            yield "layers", "compiled before the first step; the memory is that without"
    else:
        yield "training", "none (train.steps is 0)"
    held = gpu_memory.whole_models(recipe, shape)
    yield (
        "held whole",
        f"{size(held.bytes)}: {held.count} fp32 model{'s' * (held.count > 1)} on the main "
        f"process's device to {held.stage}",
    )
    yield "run folder", str(recipe.folder)


def _length_rows(recipe: Recipe, steps: int | None) -> Rows:
    per_step = recipe.train.batch_size * recipe.data.sequence_length
    epochs, heal = recipe.train.epochs, recipe.materialize.heal_steps
    of_epochs = "" if epochs is None else f"{epochs:g} epoch(s)"
    if steps is None:
        yield "training", f"{of_epochs}; the data tells how many steps"
        yield "tokens", f"{per_step:,} per step"
        return
    healing = f" ({heal:,} of healing)" if heal else ""
    counted = f", {of_epochs} of the local text" if epochs is not None else ""
    yield "training", f"{steps:,} steps{healing}{counted}"
    yield "tokens", f"{per_step:,} per step, {count(steps * per_step)} in all"


def _plan_rows(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> Rows:
    """What is shared: ties, spans, KV heads."""
    plan, spans = recipe.plan, recipe.spans
    shape, structure = problem.config, problem.structure
    if not recipe.plans:
        yield "plan", "none: nothing is shared"
        return
    if plan.strategy == "auto":
        yield from _auto_rows(recipe, problem)
    elif plan.strategy != "none":
        yield "plan", _units(recipe, problem, savings)
        if not (plan.removes or plan.strategy == "basis"):
            named = "as the plan file says" if plan.strategy == "file" else ", ".join(plan.share)
            yield "projections", named
    shared = {"attention": "attention weights", "kv": "keys and values"}
    if spans is not None and spans.layers is not None:
        yield (
            "spans",
            f"{spans.layers} layers reuse the {shared[spans.share]} of a layer below, by "
            f"{spans.strategy}",
        )
    else:
        for span in structure.spans:
            yield "span", f"{span.leader} -> {ranges(span.followers)}: {shared[span.share]}"
    if structure.kv_heads is not None:
        kv_heads = shape.num_key_value_heads or shape.num_attention_heads
        yield "KV heads", f"{structure.kv_heads} of {kv_heads} in a layer, mean-pooled"


def _auto_rows(recipe: Recipe, problem: PlanProblem) -> Rows:
    """What strategy auto may choose from, and what that takes at most."""
    plan, passes = recipe.plan, auto_passes(problem)
    what = "removals, spans and KV groups"
    if plan.may_tie:
        what = "ties, removals, spans, KV groups and shared bases"
    elif plan.uniform:
        what = "as many removals in every layer, and KV groups"
    yield "plan", f"strategy auto: {what}"
    blocks = plan.calibration_blocks
    yield "search", f"at most {passes.forward:,} forward passes over {blocks} blocks"
    if recipe.materialize.reconstruct:
        one = " and one factorization" if plan.may_tie else ""
        yield "", f"then {REBUILT} reconstructions{one}"


def _units(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> str:
    """How many units are tied or removed."""
    plan = recipe.plan
    if plan.strategy == "basis":
        adjacent = f"{plan.basis_layers} adjacent layers share a basis (Basis Sharing)"
        what = "each layer have low rank" if plan.basis_layers == 1 else adjacent
        return f"q, k and v of {what}"
    of = f"of {savings.units:,} units ({problem.layout.unit_name})"
    removed = f"{savings.removed_units:,} {of} removed"
    if plan.action == "drop":
        layers = f"the attention of {savings.dropped_layers} of {problem.layout.layers} layers"
        return f"{layers} dropped, {savings.effective_ratio:.1%} of the units"
    if plan.action == "remove":
        each = f", {problem.in_each_layer} in every layer" if plan.uniform else ""
        return f"{removed}, {savings.effective_ratio:.1%}{each}"
    bound = "at most " if plan.strategy == "released" else ""
    tied = f"{bound}{savings.tied_units:,} {of} tied"
    both = f"{tied}, {removed}" if savings.removed_units else tied
    return f"{both}, {savings.effective_ratio:.1%}"


def _lora(section: LoraSection) -> str:
    targets = ", ".join(section.targets)
    return f"rank {section.rank} on {targets}, times {section.scaling:g}; base in {section.base}"


def _memory(recipe: Recipe, shape: LlamaShape, gpus: int) -> Iterator[str | Table]:
    """The memory of a step as the recipe has it, and its total under every way of checkpointing."""
    now = recipe.train.gradient_checkpointing
    names = [field.name for field in fields(gpu_memory.Memory)]
    if recipe.distill is None:
        names.remove("teacher")  # the last one
    modes: list[Checkpointing] = [False, "selective", True]
    if now not in modes:
        modes.insert(1, now)
    stages = gpu_memory.ZERO_STAGES if recipe.lora is None else (0,)
    needed = {
        (stage, mode): gpu_memory.memory_per_gpu(
            shape,
            recipe.train,
            stage=stage,
            gpus=gpus,
            sequence_length=recipe.data.sequence_length,
            checkpointing=mode,
            eager=recipe.model.attention == "eager",
            distill=recipe.distill,
            lora=recipe.lora,
        )
        for stage in stages
        for mode in modes
    }
    rows = [
        (*astuple(needed[stage, now])[: len(names)], needed[stage, now].total) for stage in stages
    ]
    totals = [[needed[stage, mode].total for mode in modes] for stage in stages]
    largest = max(totals[-1])
    yield (
        f"memory per GPU at the peak of a step, {gpus} GPU(s), gradient checkpointing\n"
        f"{_mode(now)}; allow 2 to 4 GB more for CUDA and communication"
    )
    yield _by_stage(stages, [*names, "total"], rows, largest)
    yield "in all, with gradient checkpointing"
    yield _by_stage(stages, [_mode(mode) for mode in modes], totals, largest)


def _by_stage(
    stages: Sequence[int], names: list[str], rows: Sequence[Sequence[int]], largest: int
) -> Table:
    """A row of bytes for each ZeRO stage, all in the unit of the largest."""
    unit, factor = byte_unit(max(largest, 1e6))
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column(f"ZeRO\n{unit}", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for stage, row in zip(stages, rows, strict=True):
        table.add_row(str(stage), *(f"{number / factor:,.1f}" for number in row))
    return table


def _mode(checkpointing: Checkpointing) -> str:
    """A way of checkpointing as a person says it."""
    if isinstance(checkpointing, bool):
        return "on" if checkpointing else "off"
    return checkpointing if isinstance(checkpointing, str) else f"every {checkpointing}"


def _shared(recipe: Recipe) -> frozenset[str] | None:
    """Projections that a plan file ties; None where the plan is still to be found."""
    if recipe.plan.strategy != "file":
        return None
    return SharingPlan.load(recipe.plan.path or "").shared_projections()
