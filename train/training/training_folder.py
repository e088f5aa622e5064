"""The folder of one training: whose it is, whether it is finished, and the weights it leaves.

run.json      identity and backend configuration, written at the start
weights/      Hugging Face folder, fp32 safetensors, renamed into place at the end; residuals are a
              PEFT adapter in adapter/
result.json   written last: a finished training is not run again
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from sa_models.atomic_files import new_folder, write_json
from sa_models.errors import PostshareError
from sa_models.export.peft_adapter import file_name, plain_name, write_adapter
from sa_models.weights.config_keys import write_config
from sa_models.weights.safetensors_folder import ShardWriter
from train.common.identity import refuse_other_run
from train.common.run_files import ADAPTER_FOLDER
from train.distributed.shared_folder import require_shared
from train.models.lora import merged
from train.recipe.identity import FREE_TRAIN
from train.training.checkpoint import steps_in

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine
    from train.recipe.recipe import Recipe
    from train.training.job import TrainJob


@dataclass(frozen=True)
class TrainResult:
    """What a finished training leaves.

    Attributes:
        tokens: predicted tokens, over all ranks.
        seconds: of training, over all its segments.
        weights: Hugging Face folder with fp32 values.
    """

    steps: int
    tokens: int
    seconds: float
    weights: Path


def identity(job: TrainJob, recipe: Recipe) -> dict[str, Any]:
    """All that decides a training's numbers, JSON-ready."""
    return {
        "job": job.name,
        "steps": job.steps,
        "learning_rate": job.learning_rate,
        "seed": recipe.seed,
        "plan": job.plan.hash() if job.plan else None,
        "leaders": recipe.spans.leaders if job.plan and recipe.spans else None,
        "penalty": recipe.penalty.model_dump(mode="json") if job.plan else None,
        "model": recipe.model.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json", exclude={"processes"}),
        "train": _train_section(recipe),
        "distill": recipe.distill and recipe.distill.model_dump(mode="json"),
        **(_adapters(recipe) if job.trainable is not None else {}),
    }


def _train_section(recipe: Recipe) -> dict[str, Any]:
    """Without kernels that are those of trainings from before there were any others."""
    value = recipe.train.model_dump(mode="json", exclude=FREE_TRAIN)
    if value["kernels"] == "torch":
        del value["kernels"]
    return value


def _adapters(recipe: Recipe) -> dict[str, Any]:
    """Of a training with residuals or LoRA: that of another one is what it was before there were
    any. No training has both."""
    if recipe.lora is not None:
        return {"lora": recipe.lora.model_dump(mode="json")}
    return {"residual": recipe.residual and recipe.residual.model_dump(mode="json")}


def finished(folder: Path, ours: dict[str, Any], resume: str) -> TrainResult | None:
    """The result of an earlier, finished run of this very training.

    Raises:
        PostshareError: the folder holds another run; or it holds this one and `resume` is never.
    """
    if (folder / "run.json").is_file():
        refuse_other_run(folder, _read(folder / "run.json")["identity"], ours)
    result = folder / "result.json"
    if resume == "never" and (result.is_file() or steps_in(folder / "checkpoints")):
        raise PostshareError(
            f"{folder} holds this run already and resume is never; set resume=auto, choose another "
            "output_dir, or delete the folder"
        )
    return read_result(folder)


def read_result(folder: Path) -> TrainResult | None:
    """What a finished training left in its folder; None when there is none, or it goes on."""
    result = folder / "result.json"
    if not result.is_file() or not (folder / "weights").is_dir():
        return None
    return TrainResult(**_read(result), weights=folder / "weights")


def begin(folder: Path, ours: dict[str, Any], engine: Engine) -> None:
    """Mark the folder as this run's. A collective.

    Raises:
        PostshareError: it cannot be written, or it is not one folder for all ranks: checkpoints
            would be lost with a node.
    """
    require_shared(folder, engine)
    problem = None
    if engine.is_main:
        try:
            write_json(folder / "run.json", {"identity": ours, "backend": engine.resolved})
        except OSError as error:
            problem = " ".join(str(error).split())
    if engine.reduce_max(float(problem is not None)):
        raise PostshareError(
            f"{folder} cannot be written to ({problem or 'see the main process'}); set output_dir "
            "to a folder with room that you may write to"
        )


def finish(
    folder: Path, engine: Engine, model: Any, recipe: Recipe, result: TrainResult
) -> TrainResult:
    """Write the weights, then the result. A collective.

    Raises:
        PostshareError: the weights could not be written; nothing half written stays.
    """
    write_weights(result.weights, engine, model, recipe)
    if engine.is_main:
        counts = asdict(result)
        del counts["weights"]
        write_json(folder / "result.json", counts)
    engine.barrier()
    return result


def write_weights(folder: Path, engine: Engine, model: Any, recipe: Recipe) -> None:
    """Write an HF folder from the fp32 master weights, parameter by parameter; LoRA is merged."""
    weights = engine.full_weights()
    if recipe.lora is not None:
        weights = merged(weights, recipe.lora)
    error: Exception | None = None
    if engine.is_main:
        try:
            with new_folder(folder) as beside:
                _write_model(beside, weights, model, recipe.export.shard_bytes)
        except (OSError, SafetensorError) as caught:
            error = caught
    # Every rank runs this to its end, whatever happens to the main one's disk: it is a collective.
    for _ in weights:
        pass
    if engine.reduce_max(float(error is not None)):
        reason = " ".join(str(error).split()) if error else "see the main process"
        raise PostshareError(
            f"the weights could not be written to {folder} ({reason}); free disk space and start "
            "again: training continues from its last checkpoint"
        ) from error


def _write_model(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], model: Any, shard_bytes: int
) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    write_config(config, folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    writer = ShardWriter(folder, shard_bytes)
    residual: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if (at := file_name(name)) is not None:
            residual[at] = tensor.clone()  # small; the tensor may be a buffer's
        else:
            writer.add(plain_name(name), tensor)
    writer.close()
    if residual:
        (folder / ADAPTER_FOLDER).mkdir()
        write_adapter(folder / ADAPTER_FOLDER, model.peft_config["default"], residual)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PostshareError(f"{path} is not valid JSON ({error}); delete it") from None
