"""The residuals of a run: fitted when units are tied, trained with them or alone, then exported.

In the run folder:

residual/               what healing starts from, as a PEFT adapter; in fit.json, which share of
                        what was lost each residual leaves, and what they do to the tied model
heal/weights/adapter/   what healing leaves
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa_models.atomic_files import new_folder, write_json
from sa_models.calibration.input_moments import Where, input_moments
from sa_models.errors import PostshareError
from sa_models.export.peft_adapter import (
    Pairs,
    insert_,
    load_adapter,
    parameter_names,
    save_adapter,
    wrapped_name,
)
from sa_models.materialize.low_rank_residual import Pair, lost, low_rank, share_left
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.residual_shapes import residual_shapes
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.weights.structure import convert
from sa_models.weights.whole_model import ParameterReader
from train.common.progress import bar
from train.common.run_files import ADAPTER_FOLDER
from train.data.calibration import calibration_inputs, spread_blocks
from train.evaluation.perplexity import block_losses
from train.models.base_model import load_model
from train.models.sharded_source import Source, dense_weights
from train.stages.materialize import tied

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.data.blocks import Blocks
    from train.recipe.recipe import Recipe
    from train.stages.run import Run

RESIDUAL_FOLDER = "residual"
FIT_FILE = "fit.json"
_PATTERNS = ("*.lora_A.*", "*.lora_B.*")


# --- fitting --------------------------------------------------------------------------------------


def fit_residual(current: Run, weights: Path) -> None:
    """Fit the residuals to what the plan's ties lose, unless the run folder has them.

    Where calibration text is read, what they do to its perplexity is measured too: the outputs of
    single projections come closer to what they were in any case, those of the model need not.

    Args:
        weights: folder of the weights into which the ties will be written.
    """
    section = current.recipe.residual
    if section is None:
        return
    blocks = current.blocks[0] if section.measures else None

    def work() -> None:
        folder = current.folder / RESIDUAL_FOLDER
        if not (folder / FIT_FILE).is_file():
            _fit(current, weights, blocks)
        fit = json.loads((folder / FIT_FILE).read_text(encoding="utf-8"))
        left = fit["left"].values()
        current.say(
            f"residual  rank {section.rank} of {len(left)} projections: of what the ties lose "
            f"{1 - sum(left) / len(left):.1%} is back, on average"
        )
        if found := fit.get("perplexity"):
            current.say(_effect(found["tied"], found["corrected"]))

    current.on_main(work)


def _effect(before: float, after: float) -> str:
    """What residuals do before any training, in a sentence."""
    what = f"perplexity of the calibration text {before:.2f} tied, {after:.2f} with residuals"
    if after <= before:
        return f"residual  {what}, untrained"
    return (
        f"residual  warning: {what}, untrained: they do harm here; compare with a run without "
        "`residual`, which also stores less (docs/residuals.md)"
    )


def _fit(current: Run, weights: Path, blocks: Blocks | None) -> None:
    """Projection by projection, read from the files.

    Args:
        blocks: where text is measured: the model is then held once.
    """
    section, plan = current.recipe.residual, current.plan
    assert section is not None
    model = moments = None
    if blocks is not None:
        model = load_model(weights, current.recipe.model.fp32_attention)
        model = convert(model, plan.structure(), current.leaders)
        model.to(current.ranks.device)  # type: ignore[arg-type]  # transformers' decorator hides it
        moments = _moments(current, model, blocks)
    before = dense_weights(weights, plan, current.leaders)
    after = MaterializedReader(before, plan, current.recipe.materialize.merge)
    generator = torch.Generator().manual_seed(current.recipe.seed)
    pairs: dict[Where, Pair] = {}
    left: dict[str, float] = {}
    for where in residual_shapes(plan, current.config):
        missing = lost(before, after, plan, *where)
        known = None if moments is None else moments[where]
        wanted = missing if section.init == "svd" else torch.zeros_like(missing)
        pairs[where] = low_rank(wanted, section.rank, known, generator)
        left["{}.{}".format(*where)] = share_left(missing, pairs[where], known)
    fit: dict[str, Any] = {"rank": section.rank, "left": left}
    if model is not None and blocks is not None:
        fit["perplexity"] = _measured(current, tied(current, model), pairs, blocks)
    with new_folder(current.folder / RESIDUAL_FOLDER) as folder:
        save_adapter(folder, pairs)
        write_json(folder / FIT_FILE, fit)


def _moments(current: Run, model: LlamaForCausalLM, blocks: Blocks) -> dict[Where, Tensor]:
    """Of the inputs of every projection that has tied units, before they are tied."""
    section = current.recipe.residual
    assert section is not None
    inputs = calibration_inputs(blocks, section.calibration_blocks, current.ranks.device)
    shapes = residual_shapes(current.plan, current.config)
    with bar("inputs of projections") as advance:
        return input_moments(model, inputs, shapes, advance)


def _measured(
    current: Run, model: LlamaForCausalLM, pairs: Pairs, blocks: Blocks
) -> dict[str, float]:
    """Perplexities of the calibration text: of a tied model, and corrected, which it then is."""
    section = current.recipe.residual
    assert section is not None
    text = spread_blocks(blocks, section.calibration_blocks)
    compact = SharedLlamaForCausalLM.from_materialized(model, current.plan)
    size = current.recipe.evaluate.batch_size
    before = block_losses(compact, text, size, name="tied").perplexity
    insert_(compact, pairs)
    after = block_losses(compact, text, size, name="with residuals").perplexity
    return {"tied": before.perplexity, "corrected": after.perplexity}


# --- in a training --------------------------------------------------------------------------------


def residual_of(current: Run) -> Pairs | None:
    """The residuals that are exported: trained where the recipe heals, else as they were fitted."""
    if current.recipe.residual is None:
        return None
    if current.recipe.materialize.heal_steps:
        return load_adapter(current.folder / "heal" / "weights" / ADAPTER_FOLDER)
    return fitted(current)


def fitted(current: Run) -> Pairs:
    """The residuals that :func:`fit_residual` has left in the run folder.

    Raises:
        PostshareError: it has left none.
    """
    folder = current.folder / RESIDUAL_FOLDER
    if not folder.is_dir():
        raise PostshareError(f"{folder} is not there; fit the residuals with `postshare run`")
    return load_adapter(folder)


def trainable(recipe: Recipe) -> tuple[str, ...]:
    """Patterns of the parameters that healing trains."""
    if recipe.residual is None:
        return recipe.train.trainable
    return (
        _PATTERNS if recipe.residual.train == "residual" else (*recipe.train.trainable, *_PATTERNS)
    )


def with_residual(source: Source, pairs: Pairs) -> Source:
    """The model of a source with residuals."""
    return replace(source, residual=pairs, reader=_WithResidual(source.reader, pairs))


class _WithResidual:
    """The tensors of a model and of its residuals, by the names that PEFT gives them."""

    def __init__(self, source: ParameterReader, pairs: Pairs) -> None:
        self.path = source.path
        self._source = source
        self._names = {wrapped_name(name, pairs): name for name in source.names()}
        self._residual = {
            name: value
            for where, pair in pairs.items()
            for name, value in zip(parameter_names(where), pair, strict=True)
        }

    def names(self) -> list[str]:
        return [*self._names, *self._residual]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._residual:
            return tuple(self._residual[name].shape)
        return self._source.shape(self._names[name])

    def read(self, name: str) -> Tensor:
        if name in self._residual:
            return self._residual[name]
        return self._source.read(self._names[name])
