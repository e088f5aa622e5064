"""A whole model, materialized as calibration text says, and the folder it is written to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from sa_models.atomic_files import new_folder
from sa_models.errors import PostshareError
from sa_models.materialize.merge_calibrated import merge_on_text_
from sa_models.materialize.reconstruct_o import reconstruct_
from sa_models.materialize.registry import MEASURED
from sa_models.materialize.shared_basis import factorized
from sa_models.plan import SharingPlan
from sa_models.weights.config_keys import write_config
from sa_models.weights.safetensors_folder import ShardWriter
from sa_models.weights.structure import convert
from train.common.progress import bar
from train.data.calibration import calibration_batches
from train.models.base_model import tie_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.data.blocks import Blocks
    from train.recipe.recipe import Recipe


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
            reconstruct_(model, reference, plan, batches, progress=advance, merge=section.merge)
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
            write_config(config, beside)
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
