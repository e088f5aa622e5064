"""The output of `--dry-run`: the resolved recipe, what the plan saves, what the run needs."""

from __future__ import annotations

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
from train.estimate.llama_shapes import DTYPE_BYTES, LlamaShape, find_shape
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import REBUILT, auto_passes
from train.recipe.precision import is_auto, with_precision
from train.recipe.warnings import recipe_warnings

if TYPE_CHECKING:
    from sa_models.savings import PlanSavings
    from train.recipe.recipe import Recipe
    from train.recipe.sections.lora import LoraSection


def print_dry_run(recipe: Recipe, gpus: int | None = None, console: Console | None = None) -> None:
    """Print the resolved recipe and every estimate, from the config alone; nothing is written.

    Args:
        gpus: GPUs to estimate for (default: the most, up to 8, that divide the batch).

    Raises:
        PostshareError: the model's config is not found, the budget cannot be met, or the batch
            does not divide among `gpus`.
    """
    console = console or plain_console()
    text, auto = recipe.to_yaml(), is_auto(recipe)
    recipe = with_precision(recipe, "bf16")
    shape, origin = find_shape(recipe.model)
    gpus = gpus or parameters.most_gpus(recipe.train)
    accumulation = recipe.accumulation(gpus)
    facts = _facts(recipe, shape, origin, gpus, accumulation)
    if auto:
        facts.add_row(
            "precision", "auto: bf16 where every process has it, which is counted here, else fp32"
        )
    needed = _memory(recipe, shape, gpus) if recipe.steps != 0 else None
    console.print(Syntax(text, "yaml", background_color="default"))
    console.print(facts)
    if needed is not None:
        console.print(needed)
    for line in recipe_warnings(recipe, _shared(recipe), shape.max_position_embeddings):
        console.print(Text.assemble(("warning:", "yellow"), f" {line}"))


def _facts(recipe: Recipe, shape: LlamaShape, origin: str, gpus: int, accumulation: int) -> Table:
    plan, train = recipe.plan, recipe.train
    structure = parameters.expected_structure(recipe, shape)
    problem = PlanProblem(plan, shape, structure)
    savings = parameters.plan_savings(problem)
    element = DTYPE_BYTES.get(recipe.export.dtype, shape.dtype_bytes)
    base, stored = savings.bytes(element)
    residual = parameters.residual_parameters(recipe.residual, problem)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("model", f"{recipe.model.path}, config from {origin}")
    table.add_row("parameters", count(savings.base_parameters))
    trained = parameters.trainable_parameters(shape, train.trainable, structure, recipe.lora)
    table.add_row("trained", count(trained if recipe.steps != 0 else 0))
    if recipe.lora is not None:
        table.add_row("lora", _lora(recipe.lora))
    for row in _plan_rows(recipe, problem, savings):
        table.add_row(*row)
    if recipe.plans:
        bound = "at most " if plan.strategy == "released" else ""
        removed = savings.removed_parameters - residual
        ratio = removed / savings.attention_parameters
        table.add_row(
            "saved",
            f"{bound}{count(removed)} parameters, {ratio:.1%} of "
            f"attention, {removed / savings.base_parameters:.1%} of the model",
        )
        if recipe.residual is not None:
            table.add_row(
                "residual",
                f"rank {recipe.residual.rank}, at most {count(residual)} parameters, which are not "
                "saved",
            )
        forms = []
        if plan.strategy != "none" or structure.spans:
            forms.append(f"compact {size(stored)}")
        if residual:
            forms.append(f"adapter at most {size(residual * element)}")
        dense = f"dense {size(savings.dense_parameters * element)}"
        forms.append(dense if structure.has_stock_form else "no dense form")
        saved = size(base - stored - residual * element)
        table.add_row(
            "export",
            f"{', '.join(forms)} ({saved} saved, {element} bytes per parameter)",
        )
    if savings.stored_cache != savings.base_cache:
        table.add_row(
            "KV cache",
            f"{size(savings.stored_cache * element)} for a token instead of "
            f"{size(savings.base_cache * element)} ({-savings.cache_ratio:.1%})",
        )
    table.add_row("training", _training(recipe))
    if recipe.steps != 0:
        table.add_row(
            "batch",
            f"{train.batch_size} sequences = {gpus} GPU(s) x {train.micro_batch_size} x "
            f"accumulation {accumulation}",
        )
    held = gpu_memory.whole_models(recipe, shape)
    table.add_row(
        "held whole",
        f"{size(held.bytes)}: {held.count} fp32 model{'s' * (held.count > 1)} on the main "
        f"process's device to {held.stage}, however training is spread",
    )
    table.add_row("run folder", str(recipe.folder))
    return table


def _plan_rows(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> list[tuple[str, str]]:
    """What is shared: ties, spans, KV heads."""
    plan, spans = recipe.plan, recipe.spans
    shape, structure = problem.config, problem.structure
    if not recipe.plans:
        return [("plan", "none: nothing is shared")]
    rows = []
    if plan.strategy != "none":
        rows.append(("plan", _units(recipe, problem, savings)))
    shared = {"attention": "attention weights", "kv": "keys and values"}
    if spans is not None and spans.layers is not None:
        rows.append(
            (
                "spans",
                f"{spans.layers} layers will reuse the {shared[spans.share]} of a layer below; "
                f"which ones, strategy {spans.strategy} decides",
            )
        )
    else:
        rows += [
            ("span", f"{span.leader} -> {ranges(span.followers)}: {shared[span.share]}")
            for span in structure.spans
        ]
    if structure.kv_heads is not None:
        kv_heads = shape.num_key_value_heads or shape.num_attention_heads
        rows.append(("KV heads", f"{structure.kv_heads} of {kv_heads} in a layer, mean-pooled"))
    return rows


def _units(recipe: Recipe, problem: PlanProblem, savings: PlanSavings) -> str:
    """How many units are tied or removed."""
    plan = recipe.plan
    if plan.strategy == "auto":
        passes = auto_passes(problem)
        what, rebuilt = "removals, spans and KV groups", ""
        if plan.may_tie:
            what = "ties per projection, removals, spans, KV groups and shared bases"
        if recipe.materialize.reconstruct:
            rebuilt = f", and {REBUILT} reconstructions"
            rebuilt += " and one factorization" if plan.may_tie else ""
        return (
            f"{what}: strategy auto decides, in at most "
            f"{passes.forward:,} forward passes over {plan.calibration_blocks} blocks{rebuilt}"
        )
    if plan.strategy == "basis":
        adjacent = f"{plan.basis_layers} adjacent layers share a basis (Basis Sharing)"
        what = "each layer have low rank" if plan.basis_layers == 1 else adjacent
        return f"q, k and v of {what}, their factors fitted to calibration text"
    unit = "heads" if problem.layout.heads_per_unit == 1 else "KV groups"
    of = f"of {savings.units:,} units ({unit})"
    removed = f"{savings.removed_units:,} {of} removed"
    if plan.action == "drop":
        layers = f"the attention of {savings.dropped_layers} of {problem.layout.layers} layers"
        return f"{layers} dropped, {savings.effective_ratio:.1%} of the units"
    if plan.action == "remove":
        return f"{removed}, {savings.effective_ratio:.1%}"
    bound = "at most " if plan.strategy == "released" else ""
    what = "as the plan file says" if plan.strategy == "file" else ", ".join(plan.share)
    tied = f"{bound}{savings.tied_units:,} {of} tied"
    both = f"{tied}, {removed}" if savings.removed_units else tied
    return f"{both}, {savings.effective_ratio:.1%}; projections: {what}"


def _training(recipe: Recipe) -> str:
    length = parameters.length(recipe)
    per_step = f"{length.tokens_per_step:,} tokens per step"
    if length.steps == 0:
        return "none (train.steps is 0)"
    if length.tokens is None:
        return f"{recipe.train.epochs:g} epoch(s), {per_step}; the data tells how many steps"
    heal = recipe.materialize.heal_steps
    steps = f"{length.steps:,} steps" + (f" ({heal:,} of healing)" if heal else "")
    return f"{steps}, {per_step}, {count(length.tokens)} tokens"


def _lora(section: LoraSection) -> str:
    return (
        f"adapters of rank {section.rank} on {', '.join(section.targets)}, times "
        f"{section.scaling:g}; the weights are frozen, in {section.base}"
    )


def _memory(recipe: Recipe, shape: LlamaShape, gpus: int) -> Table:
    now = recipe.train.gradient_checkpointing
    words = {True: "on", False: "off"}
    names = [field.name for field in fields(gpu_memory.Memory)]
    if recipe.distill is None:
        names.remove("teacher")  # the last one
    rows = []
    stages = gpu_memory.ZERO_STAGES if recipe.lora is None else (0,)
    for stage in stages:
        chosen, other = (
            gpu_memory.memory_per_gpu(
                shape,
                recipe.train,
                stage=stage,
                gpus=gpus,
                sequence_length=recipe.data.sequence_length,
                checkpointing=checkpointing,
                eager=recipe.model.attention == "eager",
                distill=recipe.distill,
                lora=recipe.lora,
            )
            for checkpointing in (now, not now)
        )
        rows.append((*astuple(chosen)[: len(names)], chosen.total, other.total))
    unit, factor = byte_unit(max(rows[-1][-1], 1e6))
    table = Table(
        title=f"{unit} of memory per GPU at the peak of a step, {gpus} GPU(s), gradient "
        f"checkpointing {words[now]}\n(last column: {words[not now]}); "
        "allow 2 to 4 GB more for CUDA and communication buffers",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("ZeRO")
    for name in (*names, "total", f"total {words[not now]}"):
        table.add_column(name, justify="right")
    for stage, row in zip(stages, rows, strict=True):
        table.add_row(str(stage), *(f"{number / factor:,.1f}" for number in row))
    return table


def _shared(recipe: Recipe) -> frozenset[str] | None:
    """Projections that a plan file ties; None where the plan is still to be found."""
    if recipe.plan.strategy != "file":
        return None
    return SharingPlan.load(recipe.plan.path or "").shared_projections()
