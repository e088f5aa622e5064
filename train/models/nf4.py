"""A frozen base in 4 bits, by bitsandbytes: QLoRA's NF4 with doubly quantized scales (2305.14314).

bitsandbytes quantizes a weight when it is moved to the GPU, so that no GPU holds the model whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sa_models.errors import PostshareError
from train.recipe.sections.lora import in_four_bits


def quantize_(model: nn.Module) -> None:
    """Put 4-bit layers in the place of the model's projections; they compute in bf16.

    Raises:
        PostshareError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise PostshareError(
            f"lora.base nf4 needs bitsandbytes ({error}); pip install 'postshare[gpu]' or set "
            "lora.base=bf16"
        ) from None
    for name, module in list(model.named_modules()):
        if not in_four_bits(f"{name}.weight") or not isinstance(module, nn.Linear):
            continue
        small = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        small.weight = Params4bit(
            module.weight.detach(), requires_grad=False, quant_type="nf4", module=small
        )
        small.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks before it wraps them


def numbers(parameter: Any) -> torch.Tensor:
    """A parameter's values, detached; of one in 4 bits those that it stands for, (out, in)."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)
