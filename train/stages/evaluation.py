"""The models of a run that are evaluated, each with what it is made of; and the run's exports."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export.manifest import read_manifest
from sa_models.export.peft_adapter import insert_, load_adapter
from sa_models.plan import SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.run_files import DIRECTSHARE_FILE
from train.data.blocks import blocks_hash
from train.data.calibration import spread_indices
from train.evaluation.figures import Figures
from train.evaluation.models import weight_hashes
from train.evaluation.summary import EvaluatedModel
from train.models.base_model import load_dense, load_model, tie_model
from train.planning.directshare import directshare_plan
from train.stages.materialize import reads_text, tied_base, untrained_folder
from train.stages.run import Run, base_of

if TYPE_CHECKING:
    from sa_models.export.export import Format


def evaluated_models(current: Run) -> dict[str, EvaluatedModel]:
    """Base, *continued*, *direct* and *post*, as far as the run has them."""
    recipe, base, dtype = current.recipe, base_of(current), current.export_dtype
    attention = recipe.model.fp32_attention
    common = {"attention": attention}
    of_base = {**common, "weights": weight_hashes(base)}
    models = {"base": EvaluatedModel(partial(load_dense, base, attention), of_base)}
    weights = current.folder / "continued" / "weights"
    if weights.is_dir():
        models["continued"] = EvaluatedModel(
            partial(load_dense, weights, attention, through=dtype),
            {**common, "weights": weight_hashes(weights), "through": str(dtype)},
        )
    if recipe.evaluate.directshare:
        plan = directshare_of(current)
        models["directshare"] = EvaluatedModel(
            partial(load_directshare, current, plan), {**of_base, "plan": plan.hash()}
        )
    models["direct"] = EvaluatedModel(partial(tied_base, current), {**of_base, **_tied(current)})
    if recipe.steps != 0 or recipe.residual is not None:
        models["post"] = EvaluatedModel(
            partial(load_export, current), {**common, "export": _export_hashes(current)}
        )
    return models


def directshare_of(current: Run) -> SharingPlan:
    """The control of `evaluate.directshare`, found once.

    Raises:
        PostshareError: see :func:`~train.planning.directshare.directshare_plan`.
    """
    file = current.folder / DIRECTSHARE_FILE
    if not file.is_file():
        saved = current.plan.savings(current.config).removed_parameters
        base = WeightsFolder(base_of(current))
        directshare_plan(current.config, base, saved - residual_parameters(current)).save(file)
    return SharingPlan.load(file)


def load_directshare(current: Run, plan: SharingPlan) -> LlamaForCausalLM:
    """The base with the plan of DirectShare as published, untrained."""
    model = load_dense(base_of(current), current.recipe.model.fp32_attention)
    return tie_model(model, plan, current.recipe, "copy")


def _tied(current: Run) -> dict[str, Any]:
    """What makes *direct* of the base."""
    section, made = current.recipe.materialize, untrained_folder(current)
    merged = text = None
    if made != base_of(current):
        merged = weight_hashes(made)
    elif reads_text(current):
        blocks = current.blocks[0]
        read = spread_indices(len(blocks), section.calibration_blocks)
        text = blocks_hash(blocks[index] for index in read)
    return {
        "plan": current.plan.hash(),
        "leaders": current.leaders,
        "merge": section.merge,
        "reconstruct": section.reconstruct,
        "merged": merged,
        "calibration": text,
    }


def residual_parameters(current: Run) -> int:
    """Parameters of the adapter; 0 without residuals."""
    section = current.recipe.residual
    return 0 if section is None else section.parameters(current.plan, current.config)


def planned_figures(current: Run) -> Figures:
    """The four figures before anything is measured."""
    return Figures.of_plan(
        current.plan.savings(current.config),
        current.export_dtype.itemsize,
        current.config.max_position_embeddings,
        residual_parameters(current),
    )


# --- exports --------------------------------------------------------------------------------------


def export_formats(current: Run) -> tuple[Format, ...]:
    """With KV heads alone there is nothing compact to store; with spans, no stock form."""
    plan, formats = current.plan, current.recipe.export.formats
    if plan.structure() == plan and not plan.spans:
        return ("dense", "gguf") if "gguf" in formats else ("dense",)
    return formats if plan.has_stock_form else ("compact",)


def exported(current: Run) -> tuple[str, ...]:
    """The folders of the export."""
    formats = export_formats(current)
    adapter = current.recipe.residual is not None and "compact" in formats
    return (*formats, "adapter") if adapter else formats


def require_exports(current: Run) -> None:
    """Raises PostshareError: an export that the recipe asks for is missing, or is not finished."""
    for kind in exported(current):
        folder = current.folder / "export" / kind
        if not folder.is_dir():
            raise PostshareError(f"{folder} is not there; run `postshare export` first")
        read_manifest(folder, "delete it, and run `postshare export`")


def shipped(current: Run) -> str:
    """The export that is the run's model: compact, where the recipe has it."""
    return "compact" if "compact" in export_formats(current) else "dense"


def load_export(current: Run) -> LlamaForCausalLM:
    """The model that is shipped, with fp32 parameters."""
    kind = shipped(current)
    folder = current.folder / "export" / kind
    model = load_model(folder, current.recipe.model.fp32_attention)
    if kind == "compact" and current.recipe.residual is not None:
        insert_(model, load_adapter(folder.with_name("adapter")))
    return model


def _export_hashes(current: Run) -> dict[str, str]:
    """SHA-256 (hex) of weights and configs of the model that is shipped, as its manifest has it."""
    kind = shipped(current)
    kinds = (kind, "adapter") if kind == "compact" and current.recipe.residual else (kind,)
    return {
        f"{each}/{name}": facts["sha256"]
        for each in kinds
        for name, facts in read_manifest(current.folder / "export" / each)["files"].items()
        if name.endswith((".safetensors", "config.json"))
    }
