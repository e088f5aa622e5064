"""Rules between the sections of a recipe, each with its cause and its cure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.registry import IN_GAUGE
from sa_models.plan import SharingPlan
from train.recipe.fields import RecipeFields
from train.recipe.sections.lora import LoraSection
from train.recipe.sections.materialize import MaterializeSection
from train.recipe.sections.penalty import PenaltySection


def something_is_shared(recipe: RecipeFields) -> Iterator[str]:
    """The first rule: what all others take for granted."""
    if "plan" not in recipe.model_fields_set and not recipe.plans:
        yield (
            "nothing is shared; set plan, spans or heads (to train without sharing: "
            "plan.strategy=none)"
        )


def _one_plan(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.strategy == "file" and recipe.changes_structure:
        yield (
            "plan: the plan file says which spans and KV heads there are; remove spans and "
            "heads, or write them into the file"
        )


def _stored_once(recipe: RecipeFields) -> Iterator[str]:
    compact_only = recipe.export.formats == ("compact",)
    if compact_only and recipe.plan.strategy == "none" and recipe.spans is None:
        yield (
            "export: without ties and spans nothing is stored once instead of often; set "
            "export.formats=[dense]"
        )


def _gguf_beside_a_folder(recipe: RecipeFields) -> Iterator[str]:
    if recipe.export.formats == ("gguf",):
        yield (
            "export: a GGUF file alone cannot be evaluated here; set export.formats=[compact, gguf]"
        )
    if recipe.export.gguf is not None and "gguf" not in recipe.export.formats:
        yield (
            f"export.gguf: is {recipe.export.gguf}, and export.formats names no gguf; remove it, "
            "or set export.formats=[compact, dense, gguf]"
        )


def _nothing_to_pull(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.strategy == "none" and recipe.penalty != PenaltySection():
        yield "penalty: plan.strategy is none, nothing to pull; remove penalty"


def _nothing_to_materialize(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.strategy != "none":
        return
    if not recipe.changes_structure:
        if recipe.materialize != MaterializeSection():
            yield "materialize: plan.strategy is none, nothing is tied; remove materialize"
        return
    if recipe.materialize.merge != "copy":
        yield "materialize.merge: plan.strategy is none, nothing is merged; remove it"
    if recipe.materialize.reconstruct and recipe.train.steps != 0:
        yield (
            "materialize.reconstruct: spans and KV heads are there before train.steps, nothing "
            "changes after it; set train.steps=0 and materialize.heal_steps"
        )


def _nothing_is_tied(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.removes:
        why = f"plan.action is {recipe.plan.action}"
    elif recipe.plan.strategy == "basis":
        why = "plan.strategy is basis"
    elif recipe.plan.strategy == "auto" and not recipe.plan.may_tie:
        why = "plan.strategy auto ties units with plan.objective=bytes alone"
    else:
        return
    if recipe.penalty != PenaltySection():
        yield f"penalty: {why}, nothing to pull; remove penalty"
    if recipe.materialize.merge != "copy":
        yield f"materialize.merge: {why}, nothing is merged; remove it"


def _only_factors(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.strategy != "basis":
        return
    if recipe.changes_structure:
        yield (
            "plan.strategy basis goes with no spans and no other KV heads yet; remove spans "
            "and heads"
        )
    if recipe.materialize.reconstruct:
        yield (
            "materialize.reconstruct: plan.strategy is basis, whose factors are fitted to the "
            "text themselves; remove it"
        )


def _same_layers(recipe: RecipeFields) -> Iterator[str]:
    if recipe.plan.uniform and recipe.spans is not None:
        yield (
            "plan.uniform makes a stock Llama, and no stock Llama computes spans; remove spans, or "
            "set plan.uniform=false"
        )


def _text_is_read(recipe: RecipeFields) -> Iterator[str]:
    section = recipe.materialize
    if section.is_set("calibration_blocks") and not recipe.may_read_text:
        yield (
            f"materialize: merge {section.merge} reads no text; remove calibration_blocks, set "
            "reconstruct, or set merge to weighted_mean or least_squares"
        )


def _stream_length(recipe: RecipeFields) -> Iterator[str]:
    if recipe.data.streaming and recipe.train.steps is None:
        yield "train.epochs: a stream has no known length; set train.steps instead"


def _one_row_for_flash_attention(recipe: RecipeFields) -> Iterator[str]:
    if not recipe.data.document_mask or recipe.model.attention != "flash_attention_2":
        return
    # transformers passes it no mask; it finds the borders in the positions, of one row only.
    if recipe.train.micro_batch_size > 1:
        yield (
            "train.micro_batch_size: flash_attention_2 sees the borders of documents only in a "
            "batch of one; set train.micro_batch_size=1, or model.attention=sdpa or flex_attention"
        )


def _flash_attention_in_bf16(recipe: RecipeFields) -> Iterator[str]:
    flash = recipe.model.attention == "flash_attention_2"
    if flash and recipe.steps != 0 and recipe.train.precision != "bf16":
        yield (
            "train.precision: flash_attention_2 computes in bf16 only; set train.precision=bf16, "
            "or model.attention=sdpa"
        )


def _distill(recipe: RecipeFields) -> Iterator[str]:
    section = recipe.distill
    if section is None:
        return
    if recipe.steps == 0:
        yield "distill: nothing is trained (train.steps is 0); remove distill"
    if recipe.model.config is not None and section.teacher is None:
        yield ("distill: the base is random weights, which teach nothing; set distill.teacher")
    if recipe.model.attention == "flash_attention_2" and section.precision != "bf16":
        yield (
            "distill.precision: flash_attention_2 computes in bf16 only, the teacher too; set "
            "distill.precision=bf16, or model.attention=sdpa"
        )


def _lora(recipe: RecipeFields) -> Iterator[str]:
    section, train = recipe.lora, recipe.train
    if section is None:
        return
    if train.steps == 0:
        yield "lora: train.steps is 0, nothing trains; remove lora"
    if recipe.model.config is not None:
        yield (
            "lora: model.config starts from random weights, of which an adapter changes little; "
            "remove lora"
        )
    if recipe.materialize.heal_steps:
        yield (
            "lora: materialize.heal_steps trains units that several layers read, and an adapter "
            "changes one layer; set materialize.heal_steps=0, or remove lora and heal with "
            "residual.train=residual"
        )
    if train.is_set("trainable"):
        yield ("train.trainable names weights, and with lora none train; set lora.targets instead")
    if section.base != "fp32" and train.precision != "bf16":
        yield (
            f"lora.base {section.base} holds weights that the model computes with in bf16; set "
            "train.precision=bf16"
        )
    if recipe.penalized:
        yield from _lora_penalty(recipe, section)


def _lora_penalty(recipe: RecipeFields, section: LoraSection) -> Iterator[str]:
    if recipe.penalty.mode != "coupled":
        yield (
            f"penalty: mode {recipe.penalty.mode} moves weights where no adapter of a rank can "
            "follow; set penalty.mode=coupled, or remove lora"
        )
    if recipe.plan.strategy in ("file", "auto"):  # only the plan itself knows
        return
    pulled = recipe.penalty.projections or recipe.plan.share
    fixed = [p for p in pulled if p not in section.targets]
    if fixed:
        yield (
            f"lora: the penalty pulls {', '.join(fixed)}, which lora.targets leaves as it is; add "
            "it there, or leave it out of penalty.projections"
        )


def _residual(recipe: RecipeFields) -> Iterator[str]:
    section, plan = recipe.residual, recipe.plan
    if section is None:
        return
    if plan.strategy in ("none", "basis") or plan.removes:
        yield "residual: nothing is tied, so nothing is lost to ties; remove residual"
    if plan.strategy == "auto":
        yield (
            "residual: strategy auto compares plans by what they store, without residuals; set "
            "plan.strategy=loss or cosine"
        )
    if plan.budget is not None and plan.budget.counted in ("parameters", "bytes"):
        yield (
            "plan.budget: what residuals take depends on the layers that are tied, which a budget "
            "of parameters or bytes does not know; set plan.budget.ratio or plan.budget.heads"
        )
    merge = recipe.materialize.merge
    if merge in IN_GAUGE:
        yield (
            f"residual: materialize.merge {merge} writes heads in another gauge, in which what "
            "they lost has no meaning; set materialize.merge to copy or mean"
        )
    if recipe.materialize.reconstruct:
        yield (
            "residual: materialize.reconstruct makes up in o for what residuals bring back; keep "
            "one of the two"
        )
    if recipe.materialize.heal_steps == 0:
        if section.init == "zero":
            yield (
                "residual.init: zero adds nothing until it is trained; set materialize.heal_steps, "
                "or residual.init=svd"
            )
        if section.train != "both":
            yield "residual.train is about healing; set materialize.heal_steps"


def _compiled(recipe: RecipeFields) -> Iterator[str]:
    if not recipe.train.compile:
        return
    if recipe.train.kernels != "torch":
        yield (
            "train.compile: compiled layers fuse what train.kernels liger has fused; set "
            "train.kernels=torch, or train.compile=false"
        )
    if recipe.lora is not None and recipe.lora.base == "nf4":
        yield (
            "train.compile: layers in 4 bits cannot be compiled; set train.compile=false, or "
            "lora.base=bf16"
        )
    if recipe.distill is not None and recipe.distill.attention_weight:
        yield (
            "train.compile: distill.attention_weight compares what lies inside of a layer, which "
            "is compiled as a whole; set one of them to 0 or false"
        )


def _penalty_mode(recipe: RecipeFields) -> Iterator[str]:
    section, steps = recipe.penalty, recipe.train.steps
    if section.mode != "coupled" and recipe.plan.strategy == "released":
        yield (
            f"penalty: mode {section.mode} makes units equal, which the chains of plan.strategy "
            "released undo; set plan.strategy=cosine, or penalty.mode=coupled"
        )
    if steps and (problem := unfinished(section, steps)) is not None:
        yield problem


RULES = (
    something_is_shared,
    _one_plan,
    _stored_once,
    _gguf_beside_a_folder,
    _nothing_to_pull,
    _nothing_to_materialize,
    _nothing_is_tied,
    _only_factors,
    _same_layers,
    _text_is_read,
    _penalty_mode,
    _stream_length,
    _one_row_for_flash_attention,
    _flash_attention_in_bf16,
    _distill,
    _residual,
    _lora,
    _compiled,
)
"""What sections of a recipe say against one another, or ask for in vain."""


def unfinished(section: PenaltySection, steps: int) -> str | None:
    """Why a training of `steps` steps would not see the end of the replacement; None: it does."""
    if section.mode != "progressive" or section.ramp_steps <= steps:
        return None
    return (
        f"penalty: mode progressive takes ramp_steps {section.ramp_steps} of {steps} steps, so no "
        f"target reaches its source; set penalty.ramp_steps={steps} or less"
    )


def check_structure(recipe: RecipeFields, structure: SharingPlan, config: Any) -> None:
    """Refuse KV heads and spans that do not fit the model, or the formats that are asked for.

    Args:
        structure: of the recipe or of its plan file, as far as it is known.
        config: of the base model.

    Raises:
        PostshareError: see :meth:`SharingPlan.validate`; or as many KV heads as the base has; or
            spans with no export but a dense one, or with GGUF.
    """
    structure.validate(config)
    before = HeadLayout.from_config(config).kv_heads
    if recipe.heads.kv_heads == before:
        raise PostshareError(
            f"heads.kv_heads is {before}, as many as the model has; lower it, or remove heads"
        )
    spans = recipe.spans is not None or not structure.has_stock_form
    if spans and not recipe.export.allows_spans:
        form = "GGUF" if "gguf" in recipe.export.formats else "dense"
        raise PostshareError(
            f"export.formats is [{', '.join(recipe.export.formats)}], and spans have no {form} "
            "form: no stock Llama computes them; set export.formats=[compact]"
        )
