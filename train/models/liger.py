"""Liger's fused kernels (2410.10989) in place of the forwards of a Llama's modules.

Replaced on the modules of one model, and nowhere else: RMSNorm, SwiGLU and the rotary embedding of
each layer; :func:`token_sums` takes the place of the losses by chunks. Parameters, their names and
`state_dict` stay as they are. Followers of a span go on with what their leader has rotated.

The kernels save memory by writing over what they are given: rotated queries and keys over the
products that they come from, gradients over activations and other gradients. No product may
therefore be kept for a second forward (`rotates_copies`).
"""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from sa_models.attention import Rotation, SharedAttention
from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.recipe.recipe import Recipe

ROTATION = "apply_rotary_pos_emb"
"""The function that transformers' attention calls."""


def check_kernels(recipe: Recipe, on_gpu: bool) -> None:
    """Refuse kernels that cannot run here. Raises PostshareError: no GPU, or no liger-kernel.

    Args:
        on_gpu: whether the training is one on a CUDA GPU; a launch may leave one idle.
    """
    if recipe.train.kernels != "liger":
        return
    if not on_gpu:
        raise PostshareError(
            "train.kernels liger needs an NVIDIA GPU, for which its kernels are compiled; use "
            "train.kernels=torch"
        )
    _functions()


def _functions() -> Any:
    """The module with Liger's functions, which also imports Triton."""
    try:
        return importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise PostshareError(
            f"train.kernels liger needs liger-kernel ({error}); pip install 'postshare[gpu]' or "
            "use train.kernels=torch"
        ) from None


def use_liger_(model: PreTrainedModel, rotates_copies: bool = False) -> None:
    """Let a Llama, stock or compact, compute with Liger's kernels.

    Args:
        rotates_copies: whether products of q and k are kept for a second forward, as by `selective`
            gradient checkpointing: they are then copied before they are rotated.

    Raises:
        PostshareError: liger-kernel cannot be imported; or the model's activation is not SiLU.
    """
    functions = _functions()
    activation = model.config.hidden_act
    if activation not in ("silu", "swish"):
        raise PostshareError(
            f"train.kernels: liger has SwiGLU, and the model's activation is {activation}; use "
            "train.kernels=torch"
        )

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if rotates_copies:
            query, key = query.clone(), key.clone()
        return functions.liger_rope(query, key, cos, sin)

    def rotated(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(query, key, *rotation)

    def norm(module: LlamaRMSNorm, x: Tensor) -> Tensor:
        return functions.liger_rms_norm(x, module.weight, module.variance_epsilon)

    def mlp(module: LlamaMLP, x: Tensor) -> Tensor:
        return module.down_proj(functions.liger_swiglu(module.gate_proj(x), module.up_proj(x)))

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            _replace(module, norm)
        elif isinstance(module, LlamaMLP):
            _replace(module, mlp)
        elif isinstance(module, LlamaAttention):
            _replace(module, with_global(type(module).forward, ROTATION, rotate))
        elif isinstance(module, SharedAttention):
            module.rotated = rotated  # type: ignore[method-assign]


def _replace(module: nn.Module, forward: Any) -> None:
    module.forward = MethodType(forward, module)


def with_global(function: Any, name: str, value: Any) -> Any:
    """The same function, to which a global name means another value.

    Raises:
        AssertionError: the function has no such name.
    """
    plain = inspect.unwrap(function)
    assert name in plain.__code__.co_names, f"{plain.__qualname__} does not call {name}"
    other = FunctionType(
        plain.__code__,
        {**plain.__globals__, name: value},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    other.__kwdefaults__ = plain.__kwdefaults__
    return other


def token_sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As :func:`train.training.chunked_loss.token_sums` without a teacher, by Liger's kernel.

    Chunks of the weight's gradient are added up in fp32.

    Args:
        hidden: [..., hidden size], what lm_head is given, in any float dtype.
        weight: [vocabulary, hidden size], of lm_head, which has no bias.
        labels: int64 [...]; IGNORED positions do not count.

    Returns:
        fp32 [3]: the cross-entropy in nats, which has a gradient; the same without one; 0.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        entropy = _functions().liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            labels.flatten().to(hidden.device, non_blocking=True),
            ignore_index=IGNORED,
            reduction="sum",
            accum_dtype=torch.float32,
        )
    return torch.stack([entropy, entropy.detach(), entropy.new_zeros(())])
