"""The stages of a run of Basis Sharing: factorize on calibration text, then train the factors.

The main process makes the first factors once, into a folder that all ranks read; they are trained
as any other model, whole on every rank until an engine splits it up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sa_models.basis import BasisFolder, factorized, load_basis, stored_parameters
from sa_models.plan import SharingPlan
from train.base_model import load_dense
from train.basis_section import ranks_of
from train.loop import TrainJob, train
from train.loss_planning import calibration_batches
from train.materializing import write_model
from train.run_folder import BASIS, Run, base_of
from train.span_planning import bar

if TYPE_CHECKING:
    from pathlib import Path

    from sa_models.basis import BasisLlamaForCausalLM
    from sa_models.savings import PlanSavings


def factorize_base(current: Run) -> None:
    """Write the first factors, unless the run folder has them. A collective."""
    folder, section = current.folder / BASIS, current.recipe.basis
    assert section is not None
    blocks = current.blocks[0]

    def work() -> None:
        if folder.is_dir():  # asked of one process: the others may come when it is there already
            return
        model = load_dense(base_of(current), current.recipe.model.attention)
        model.to(current.ranks.device)  # type: ignore[arg-type]  # transformers' decorator hides it
        ranks = ranks_of(current.recipe, current.config)
        text = calibration_batches(blocks, section.calibration_blocks, 1, model.device)
        with bar("factorizing") as advance:
            made = factorized(model, section.layers, ranks, text, advance)
        write_model(folder, made, current.recipe.export.shard_bytes)

    current.on_main(work)


def train_basis(current: Run) -> None:
    """Train the factors; with no steps they stay the first ones."""
    factorize_base(current)
    if current.steps == 0:
        return
    training, validation = current.blocks
    job = TrainJob(
        name="basis",
        load=lambda: load_first(current),
        plan=None,
        train_blocks=training,
        validation_blocks=validation,
        folder=current.folder,
        steps=current.steps,
        learning_rate=current.recipe.train.learning_rate,
        group=current.group,
    )
    train(job, current.recipe)


def load_first(current: Run) -> BasisLlamaForCausalLM:
    """The factors before training."""
    return load_basis(current.folder / BASIS, current.recipe.model.attention)


def basis_weights(current: Run) -> BasisFolder:
    """The trained factors, as dense weights."""
    return BasisFolder(factors_folder(current))


def factors_folder(current: Run) -> Path:
    return current.folder / ("weights" if current.steps > 0 else BASIS)


def basis_savings(current: Run) -> PlanSavings:
    """What the factors save on the base."""
    config = basis_weights(current).files.config
    none = SharingPlan().savings(current.config)
    return replace(none, basis_parameters=none.base_parameters - stored_parameters(config))
