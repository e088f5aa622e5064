"""The base model of a recipe: found, checked, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.registry import Merge
from sa_models.materialize.ties import materialize_
from sa_models.plan import SharingPlan
from sa_models.weights.companion_files import FETCHED
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert
from sa_models.weights.whole_model import load_whole, open_stored
from train.common.progress import bar, note
from train.models.gguf_folder import named_base

if TYPE_CHECKING:
    from train.recipe.recipe import ModelSection, Recipe


def base_folder(model: ModelSection, key: str = "model.path") -> Path:
    """The local folder of ``model.path``; a hub model comes from the cache or is downloaded, a
    GGUF file is made into one.

    Args:
        key: the recipe's name for the path, for messages.

    Raises:
        PostshareError: it exists neither here nor on the hub, is gated, or cannot be reached; a
            revision of what lies here; or see :func:`named_base`.
    """
    local = named_base(model.path) or Path(model.path).expanduser()
    if local.is_dir():
        if model.revision is not None:
            raise PostshareError(
                f"model.revision {model.revision}: {model.path} lies here, and the hub has "
                "revisions; remove it"
            )
        return local
    if model.path.startswith(("/", ".", "~")) or model.path.count("/") != 1:
        raise PostshareError(
            f"{key} {model.path!r} is no folder here and no hub name (owner/name); correct it"
        )
    return _snapshot(model, key)


def _snapshot(model: ModelSection, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = model.path
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=list(FETCHED)))
    except GatedRepoError:
        cure = "it is gated: accept its licence on its hub page, then run `hf auth login`"
    except RevisionNotFoundError:
        cure = f"it has no revision {model.revision!r}; correct model.revision"
    except RepositoryNotFoundError:
        cure = "the hub has no such model (or it is private: run `hf auth login`); correct the name"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        cure = (
            "it is not in the cache and the hub cannot be reached; run `postshare prepare RECIPE` "
            "once on this node with network, or give a local folder"
        )
    raise PostshareError(f"{key} {name!r} cannot be had: {cure}")


def load_base(recipe: Recipe) -> LlamaForCausalLM:
    """The model that training starts from, with fp32 parameters, on the CPU.

    Raises:
        PostshareError: see :func:`base_folder` and :class:`WeightsFolder`.
    """
    if recipe.model.config is not None:
        torch.manual_seed(recipe.seed)
        config = fresh_config(recipe.model)
        config._attn_implementation = recipe.model.attention
        return LlamaForCausalLM(config)
    return load_dense(base_folder(recipe.model), recipe.model.attention)


def fresh_config(model: ModelSection) -> LlamaConfig:
    """The config of a model that is trained from random weights.

    Raises:
        PostshareError: ``model.config`` has a field that LlamaConfig does not know, or a value
            that it refuses.
    """
    assert model.config is not None
    known = set(LlamaConfig().to_dict())
    for key in model.config:
        if key not in known:
            raise PostshareError(f"model.config.{key} is no field of LlamaConfig; correct its name")
    try:
        return LlamaConfig(**model.config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(f"model.config is no valid LlamaConfig: {reason}") from None


def load_dense(
    folder: Path, attention: str, through: torch.dtype | None = None
) -> LlamaForCausalLM:
    """A dense Llama folder as an fp32 model; see :func:`load_whole`."""
    return load_whole(WeightsFolder(folder), attention, through=through)


def read_through(weights: WeightsFolder, rank: int = 0, world: int = 1) -> None:
    """Say what in a folder is not read, and read every weight once: each rank its share of them.

    Raises:
        PostshareError: a value that is no number.
    """
    for line in weights.notes() if rank == 0 else ():
        note(line)
    share = weights.names()[rank::world]
    with bar(f"checking {weights.path.name}", shown=rank == 0) as advance:
        for done, name in enumerate(share, start=1):
            weights.read(name)
            advance(done, len(share))


def load_model(folder: Path, attention: str) -> LlamaForCausalLM:
    """A dense or a compact folder as an fp32 model; see :func:`load_whole`."""
    return load_whole(open_stored(folder), attention)


def tie_model(
    model: LlamaForCausalLM, plan: SharingPlan, recipe: Recipe, merge: Merge
) -> LlamaForCausalLM:
    """The model with the plan's structure, where it lacks it, and the plan materialized.

    Of a plan with a basis it is made of factors already.
    """
    if plan.basis is not None:
        return model
    model = convert(model, plan, recipe.leaders)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)
    return model
