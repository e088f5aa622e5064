"""The materialize stage of a run: where the weights of tied units become one, or factors.

Copies and means are taken tensor by tensor, wherever weights are read. What needs calibration text
(some merges, reconstruction, the factors of a shared basis) needs the whole model: the main process
does it once, into a folder that all ranks and the later stages read, whatever the launch.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from sa_models.errors import PostshareError
from sa_models.materialize.merge import MEASURED, Merge
from sa_models.materialize.merge_calibrated import merge_on_text_
from sa_models.materialize.reconstruct_o import reconstruct_
from sa_models.materialize.shared_basis import factorized
from sa_models.plan import SharingPlan
from sa_models.weights.atomic_files import new_folder
from sa_models.weights.safetensors_folder import ShardWriter
from sa_models.weights.structure import convert
from train.models.base_model import load_dense, load_model, tie_model
from train.planning.loss_search import calibration_batches
from train.planning.spans import bar
from train.stages.run import MERGED, Run, base_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.data.blocks import Blocks
    from train.recipe.recipe import Recipe


def trained_folder(current: Run) -> Path:
    """Folder of the weights that are materialized: trained, or with no steps those of the base."""
    return current.folder / "weights" if current.steps > 0 else base_of(current)


def merged_folder(current: Run) -> Path:
    """As `trained_folder`; of a merge on text, what :func:`materialize_on_text` has written."""
    return current.folder / MERGED if reads_text(current) else trained_folder(current)


def reads_text(current: Run) -> bool:
    """Whether the plan is materialized on calibration text."""
    return current.recipe.materialize.measures or current.plan.basis is not None


def materialize_on_text(current: Run) -> None:
    """Materialize the trained weights on calibration text, if the recipe asks. A collective.

    Raises:
        PostshareError: as :func:`on_text`; or the folder cannot be written.
    """
    folder = current.folder / MERGED
    if not reads_text(current):
        return
    blocks = current.blocks[0]

    def work() -> None:
        if folder.is_dir():  # asked of one process: the others may come when it is there already
            return
        model = load_model(trained_folder(current), current.recipe.model.attention)
        made = on_text(current.recipe, current.plan, model, blocks, current.ranks.device)
        write_model(folder, made, current.recipe.export.shard_bytes)

    current.on_main(work)


def tied_base(current: Run) -> LlamaForCausalLM:
    """The base with the plan materialized, untrained; with text to read, `blocks` must be there."""
    attention, measures = current.recipe.model.attention, reads_text(current)
    if measures and current.steps == 0 and merged_folder(current).is_dir():
        return tied(current, load_model(merged_folder(current), attention))  # it is of the base
    model = load_dense(base_of(current), attention)
    if measures:
        blocks, device = current.blocks[0], current.ranks.device
        model = on_text(current.recipe, current.plan, model, blocks, device)
    return tied(current, model)


def remaining_merge(recipe: Recipe) -> Merge:
    """How the weights of :func:`merged_folder` are still to be merged."""
    section = recipe.materialize
    return "copy" if section.reconstruct else section.merge


def tied(current: Run, model: LlamaForCausalLM, merge: Merge | None = None) -> LlamaForCausalLM:
    """The model with the plan's structure, where it lacks it, and the plan materialized.

    Args:
        merge: by default what remains, see :func:`remaining_merge`.
    """
    return tie_model(model, current.plan, current.recipe, merge or remaining_merge(current.recipe))


def on_text(
    recipe: Recipe,
    plan: SharingPlan,
    trained: LlamaForCausalLM,
    blocks: Blocks,
    device: torch.device,
) -> LlamaForCausalLM:
    """The plan materialized as calibration text says, on the CPU; `trained` may be changed.

    Raises:
        PostshareError: as `merge_on_text_`, `reconstruct_` and `factorized`.
    """
    section = recipe.materialize
    if plan.basis is not None:
        trained.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
        batches = calibration_batches(blocks, section.calibration_blocks, 1, device)
        with bar("factorizing") as advance:
            made = factorized(trained.eval(), plan, batches, advance)
        return made.to("cpu")  # type: ignore[arg-type]
    reference = copy.deepcopy(trained).eval() if section.reconstruct else None
    model = convert(trained, plan, recipe.leaders)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
    batches = calibration_batches(blocks, section.calibration_blocks, 1, device)
    if section.merge in MEASURED:
        with bar("merging") as advance:
            merge_on_text_(model, plan, section.merge, batches, advance)
    if reference is not None:
        reference.to(device)
        model = tie_model(model, plan, recipe, section.merge).eval()
        with bar("reconstructing") as advance:
            reconstruct_(model, reference, plan, batches, progress=advance)
    model.to("cpu")  # type: ignore[arg-type]
    return model


def write_model(folder: Path, model: LlamaForCausalLM, shard_bytes: int) -> None:
    """Write an HF folder with fp32 weights, renamed into place when it is whole.

    Raises:
        PostshareError: it cannot be written; nothing half written stays.
    """
    try:
        with new_folder(folder) as beside:
            config = copy.deepcopy(model.config)
            config.dtype = torch.float32
            config.save_pretrained(beside)
            writer = ShardWriter(beside, shard_bytes)
            for name, parameter in model.named_parameters():
                writer.add(name, parameter.detach())
            writer.close()
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(
            f"the merged weights could not be written to {folder} ({reason}); free disk space and "
            "start again"
        ) from error
