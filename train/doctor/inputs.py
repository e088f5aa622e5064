"""Checks that a rank makes alone: the recipe, the launch, the model and the data it will read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sa_models.errors import PostshareError
from sa_models.weights.companion_files import FETCHED
from train.common.shadowing import NO_PYTHON, hiding
from train.distributed.engines import start as engine
from train.doctor.facts import TooLate, limited
from train.doctor.findings import Finding, bad, from_error, ok, warn
from train.estimate.llama_shapes import LlamaShape
from train.models.base_model import base_folder
from train.models.gguf_folder import check_named
from train.recipe.faults import FaultyRecipeError
from train.recipe.recipe import DataSource, Recipe, load_recipe
from train.recipe.warnings import recipe_warnings

LIMIT = 30.0
"""Seconds for looking up one model or data set in the cache."""


def resolve(name: str, overrides: Sequence[str]) -> tuple[Recipe | None, list[Finding]]:
    """The recipe, or why there is none."""
    try:
        return load_recipe(name, overrides), []
    except FaultyRecipeError as error:
        return None, [from_error("recipe", PostshareError(line)) for line in error.lines]
    except PostshareError as error:
        return None, [from_error("recipe", error)]


def check_start(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What a run of the recipe refuses before it starts: launch settings, batch, folder, wandb."""
    import torch

    from sa_models.export.gguf.file import require_gguf
    from train.models.liger import check_kernels
    from train.models.lora import check_gpu
    from train.stages.lock import require_free
    from train.stages.start import check_folder
    from train.tracking.wandb_run import check_wandb
    from train.training.optimizer import check_optimizer

    on_gpu = torch.cuda.is_available()
    refusals: tuple[tuple[str, Callable[[], object]], ...] = (
        ("launch", lambda: engine.check_launch(recipe, engine.launched_stage())),
        ("launch", lambda: recipe.accumulation(world)),
        ("lora", lambda: check_gpu(recipe, on_gpu)),
        ("kernels", lambda: check_kernels(recipe, on_gpu)),
        ("optimizer", lambda: check_optimizer(recipe.train, on_gpu)),
        ("run folder", lambda: limited(lambda: check_folder(recipe), LIMIT)),
        ("run folder", lambda: limited(lambda: require_free(recipe.folder), LIMIT)),
        ("wandb", lambda: check_wandb(recipe.wandb)),
        *([("export", require_gguf)] if "gguf" in recipe.export.formats else []),
    )
    for topic, check in refusals:
        try:
            check()
        except PostshareError as error:
            yield from_error(topic, error)
        except TooLate:  # the folder's probe says so
            pass
        except OSError as error:
            yield bad(
                topic,
                f"{recipe.folder}: {error.strerror or error}",
                "choose a folder that can be read",
            )


def check_warnings(recipe: Recipe, shape: LlamaShape | None) -> Iterator[Finding]:
    """What the recipe says and probably does not mean, as a run and a dry run say it."""
    positions = None if shape is None else shape.max_position_embeddings
    for line in recipe_warnings(recipe, positions=positions):
        yield warn("recipe", line, "")


def check_working_folder(folder: Path) -> Iterator[Finding]:
    """Whether a launch from there by `-m train` would start this package."""
    if (own := hiding(folder)) is not None:
        yield warn(
            "working folder",
            f"{own}, which is not postshare's, is what `accelerate launch -m train` runs here",
            f"{NO_PYTHON}, or another folder",
        )


def check_inputs(recipe: Recipe) -> Iterator[Finding]:
    """Model and data, without fetching anything: here, or to be fetched, or out of reach."""
    looks: list[tuple[str, str, Callable[[], str | None]]] = []
    if recipe.model.config is None:
        looks.append(("model", recipe.model.path, lambda: find_model(recipe)))
    sources = {s.path: s for s in (*recipe.data.train, *(recipe.data.validation or ()))}
    for source in sources.values():
        looks.append(("data", source.path, lambda source=source: find_data(source)))  # type: ignore[misc]
    for topic, name, look in looks:
        try:
            where = limited(look, LIMIT)
        except PostshareError as error:
            yield from_error(topic, error)
        except TooLate:
            yield bad(
                topic,
                f"{name}: the cache did not answer in {LIMIT:.0f} s",
                "is HF_HOME on a file system that hangs?",
            )
        else:
            if where is not None:
                yield ok(topic, f"{name}: {where}")
            else:
                yield warn(
                    topic,
                    f"{name} is not in the cache and will be fetched at the start",
                    "`postshare prepare RECIPE` once on each node (or on a shared HF_HOME)",
                )


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def find_model(recipe: Recipe) -> str | None:
    """Where the base model is; None: to be fetched.

    Raises:
        PostshareError: it is not there, not whole, or not to be had without network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from sa_models.weights.safetensors_folder import WeightsFolder

    model = recipe.model
    if (where := check_named(model.path)) is not None:
        return where
    is_local = Path(model.path).expanduser().is_dir()
    if is_local or model.path.count("/") != 1 or offline():
        WeightsFolder(base_folder(model))  # fetches nothing: local, refused, or offline
        return "here" if is_local else "cached"
    try:
        folder = snapshot_download(
            model.path, revision=model.revision, allow_patterns=list(FETCHED), local_files_only=True
        )
        WeightsFolder(folder)
    except (LocalEntryNotFoundError, HFValidationError, PostshareError):
        return None  # perhaps only its config has been fetched
    return "cached"


def find_data(source: DataSource) -> str | None:
    """Where a data source is; None: to be fetched.

    Raises:
        PostshareError: it is not there, or not to be had without network.
    """
    from train.data.local.files import STDLIB, data_files, on_hub
    from train.data.sources import load_records

    if source.path == STDLIB:
        return "here"
    path = Path(source.path).expanduser()
    if path.exists():
        for file in (path, *data_files(source)):
            if not os.access(file, os.R_OK):
                raise PostshareError(f"{file} cannot be read; give the job's user read access")
        return "here"
    if not on_hub(source.path) or offline():
        load_records(source, [])  # raises for what is not here, without asking the network
        return "cached"
    return None
