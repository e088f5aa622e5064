"""The materialize stage of a run: where the weights of tied units become one, or factors.

Copies and means are taken tensor by tensor, wherever weights are read. What needs calibration text
(some merges, reconstruction, the factors of a shared basis) needs the whole model: the main process
does it once, into a folder that all ranks and the later stages read, whatever the launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sa_models.heads import HeadLayout, unit_view
from sa_models.materialize.registry import Merge
from sa_models.plan import SharingPlan
from train.common.run_files import MERGED, PLAN_FILE
from train.models.base_model import load_dense, load_model, tie_model
from train.models.materialize import on_text, write_model
from train.models.sharded_source import dense_weights
from train.stages.run import Run, base_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

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


def awaits_text(recipe: Recipe) -> bool:
    """Whether what a run has trained is still to be materialized on calibration text."""
    if (recipe.folder / MERGED).is_dir():
        return False
    file = recipe.folder / PLAN_FILE
    factored = file.is_file() and SharingPlan.load(file).basis is not None
    return recipe.materialize.measures or factored


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
        model = load_model(trained_folder(current), current.recipe.model.fp32_attention)
        made = on_text(current.recipe, current.plan, model, blocks, current.ranks.device)
        write_model(folder, made, current.recipe.export.shard_bytes)

    current.on_main(work)


def untrained_folder(current: Run) -> Path:
    """Folder of the weights that `tied_base` starts from: the base's, or what was merged of it."""
    if reads_text(current) and current.steps == 0 and merged_folder(current).is_dir():
        return merged_folder(current)
    return base_of(current)


def tied_base(current: Run) -> LlamaForCausalLM:
    """The base with the plan materialized, untrained; with text to read, `blocks` must be there."""
    attention, folder = current.recipe.model.fp32_attention, untrained_folder(current)
    if folder != base_of(current):
        return tied(current, load_model(folder, attention))
    model = load_dense(folder, attention)
    if reads_text(current):
        blocks, device = current.blocks[0], current.ranks.device
        model = on_text(current.recipe, current.plan, model, blocks, device)
    return tied(current, model)


def tied(current: Run, model: LlamaForCausalLM, merge: Merge | None = None) -> LlamaForCausalLM:
    """The model with the plan's structure, where it lacks it, and the plan materialized.

    Args:
        merge: by default what remains, see `MaterializeSection.remaining_merge`.
    """
    return tie_model(
        model, current.plan, current.recipe, merge or current.recipe.materialize.remaining_merge
    )


# --- adapters -------------------------------------------------------------------------------------


def report_merged(current: Run, before: Path, after: Path) -> None:
    """Say how far apart tied units are in the merged weights, which are to be made one."""
    section, plan = current.recipe.lora, current.plan
    if section is None or not plan.ties:
        return

    def work() -> None:
        found = [distances(current, folder) for folder in (before, after)]
        (first, _), (mean, worst) = ((sum(d) / len(d), max(d)) for d in found)
        current.say(
            f"lora      rank {section.rank} of {', '.join(section.targets)} merged: tied units are "
            f"{mean:.1%} of their norm apart on average, {worst:.1%} at most ({first:.1%} before)"
        )

    current.on_main(work)


def distances(current: Run, folder: Path) -> list[float]:
    """||target - source|| / ||source|| of every projection of every tie in a folder's weights."""
    weights = dense_weights(folder, current.plan, current.leaders)
    layout = HeadLayout.from_config(weights.config)

    def unit(place: tuple[int, int], projection: str) -> Tensor:
        whole = weights.read(layout.parameter_name(place[0], projection)).float()
        return unit_view(whole, layout, projection)[place[1]]

    found = []
    for tie in current.plan.ties:
        for projection in tie.projections:
            source = unit(tie.source, projection)
            target = unit(tie.target, projection)
            apart = float((target - source).norm())
            found.append(apart / float(source.norm() or target.norm() or 1))
    return found
