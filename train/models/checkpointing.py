"""Gradient checkpointing: which layers compute again in the backward pass, and what of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from sa_models.projections import SharedOutputLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.recipe.sections.training import Checkpointing

_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""What `selective` keeps: products with weights, and fused attention. Not the products of eager
attention, which are a map each."""


def enable_checkpointing(model: PreTrainedModel, mode: Checkpointing) -> None:
    """As `train.gradient_checkpointing` says; the numbers do not depend on it.

    A compact model with tied columns of o adds to a product in place, which may then not be kept:
    there `selective` is `true`.
    """
    if mode is False:
        return
    options: dict = {"use_reentrant": False}
    adds = any(isinstance(m, SharedOutputLinear) and m.tied for m in model.modules())
    if mode == "selective" and not adds:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # before transformers 5.23
        model.gradient_checkpointing_enable(options)
    every = 1 if mode in (True, "selective") else int(mode)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0
