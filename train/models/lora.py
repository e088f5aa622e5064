"""LoRA in a training: PEFT's adapters on the projections, the weights frozen, merged at the end.

The model computes with W + s B A, with B (out, rank), A (rank, in), s = alpha / rank. These
*effective* weights are what the penalty pulls together (:mod:`train.penalty.lora`), and what a
training leaves: `weights/` holds a plain Llama, as without adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.recipe.recipe import Recipe
    from train.recipe.sections.lora import LoraSection

Weights = Iterator[tuple[str, Tensor]]
TRAINABLE = ("*.lora_A.*", "*.lora_B.*")
"""Patterns of what trains."""


# --- before ---------------------------------------------------------------------------------------


def adapt(model: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """Let PEFT wrap the model's projections in place, if the recipe asks; B A begins as zero.

    A is drawn from the recipe's seed. The frozen weights get the dtype of `lora.base`.

    Raises:
        PostshareError: a rank that a projection does not have.
    """
    section = recipe.lora
    if section is None:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    parameters = dict(model.named_parameters())
    names = [name.removesuffix(".weight") for name in parameters if section.adapts(name)]
    smallest = min(min(parameters[f"{name}.weight"].shape) for name in names)
    if section.rank > smallest:
        raise PostshareError(
            f"lora.rank is {section.rank}, and the smallest of the adapted weights has rank "
            f"{smallest}; set lora.rank to {smallest} or less, or remove lora"
        )
    if section.base == "nf4":
        from train.models.nf4 import quantize_

        quantize_(model)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.scaling * section.rank,  # type: ignore[arg-type]  # it is divided only
        target_modules=names,
        lora_dropout=section.dropout,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # PEFT makes those of 4-bit layers in bf16
        elif section.base != "fp32":
            parameter.data = parameter.data.to(torch.bfloat16)  # nf4's too, until they are moved
    return model


def check_gpu(recipe: Recipe, on_gpu: bool) -> None:
    """Refuse 4 bits where no GPU reads them. Raises PostshareError.

    Args:
        on_gpu: whether the training is one on a CUDA GPU; a launch may leave one idle.
    """
    if recipe.lora is not None and recipe.lora.base == "nf4" and not on_gpu:
        raise PostshareError(
            "lora.base nf4 needs a CUDA GPU; set lora.base=bf16 with train.precision=bf16, or "
            "lora.base=fp32"
        )


# --- after ----------------------------------------------------------------------------------------


def merged(weights: Weights, section: LoraSection) -> Weights:
    """Parameters of an adapted model as those of the model, each W + s B A once, in its place.

    Args:
        weights: as `Engine.full_weights` gives them: W, A, B of a module one after the other.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        module, _, part = name.removesuffix(".weight").partition(".lora_")
        if not part:
            plain = name.replace(".base_layer.", ".")
            if plain == name:
                yield name, tensor
            else:
                held[plain.removesuffix(".weight")] = tensor.clone()  # it may be a buffer's
        elif part.startswith("A"):
            held[f"{module}.A"] = tensor.clone()
        else:
            w, a = held.pop(module), held.pop(f"{module}.A")
            yield f"{module}.weight", torch.addmm(w, tensor, a, alpha=section.scaling)
