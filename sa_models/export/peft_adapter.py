"""Residuals as a standard PEFT adapter: a LoRA on the tied projections of a compact model.

The adapter's ``lora_alpha`` is its rank, so that what it adds is B A itself. PEFT wraps the
projection, whose own features and whose owners stay as they are, and adds (B (A x)) to its output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sa_models.calibration.input_moments import Where
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.low_rank_residual import Pair, kept_features
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import DenseReader, cast
from sa_models.weights.safetensors_folder import save_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
Pairs = Mapping[Where, Pair]

_FILE_PREFIX = "base_model.model."
_PARTS = (".lora_A", ".lora_B")


# --- names ----------------------------------------------------------------------------------------


def module_name(where: Where) -> str:
    """The name of a projection in the model."""
    return HeadLayout.parameter_name(*where).removesuffix(".weight")


def parameter_names(where: Where) -> tuple[str, str]:
    """Names of A and B in a model that PEFT has wrapped."""
    return tuple(f"{module_name(where)}{part}.default.weight" for part in _PARTS)  # type: ignore[return-value]


def file_name(name: str) -> str | None:
    """The name in an adapter's file of a wrapped model's parameter; None for one of the model."""
    if not any(f"{part}.default." in name for part in _PARTS):
        return None
    return _FILE_PREFIX + name.replace(".default.", ".")


def plain_name(name: str) -> str:
    """The name that a parameter has in a model without an adapter."""
    return name.replace(".base_layer.", ".")


def wrapped_name(name: str, wrapped: Iterable[Where]) -> str:
    """The name that a parameter has where PEFT has wrapped these projections."""
    where = HeadLayout.parse_name(name)
    return f"{module_name(where)}.base_layer.weight" if where and where in wrapped else name


# --- models ---------------------------------------------------------------------------------------


def lora_config(rank: int, wheres: Iterable[Where]) -> LoraConfig:
    """PEFT's config of a residual on these projections."""
    from peft import LoraConfig

    names = [module_name(where) for where in wheres]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM")


def wrap_(model: nn.Module, rank: int, wheres: Iterable[Where]) -> None:
    """Let PEFT wrap these projections in place; A and B are what PEFT begins with.

    On the meta device where the model is.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(rank, wheres), model)


@torch.no_grad()
def insert_(model: nn.Module, pairs: Pairs) -> None:
    """Wrap the projections of a compact model in place, with these residuals, in fp32."""
    wrap_(model, rank_of(pairs), pairs)
    for where, pair in pairs.items():
        for name, value in zip(parameter_names(where), pair, strict=True):
            model.get_parameter(name).copy_(value)


def rounded(pairs: Pairs, dtype: torch.dtype) -> dict[Where, Pair]:
    """The residuals in a dtype. Raises PostshareError where float16 cannot hold a value."""
    return {
        where: Pair(*(cast(value, dtype, module_name(where)) for value in pair))
        for where, pair in pairs.items()
    }


def rank_of(pairs: Pairs) -> int:
    return next(iter(pairs.values())).a.shape[0]


# --- files ----------------------------------------------------------------------------------------


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write PEFT's two files into an existing folder.

    Args:
        tensors: by their names in the file, see :func:`file_name`.
    """
    config.save_pretrained(str(folder))
    file = folder / ADAPTER_CONFIG
    value = json.loads(file.read_text(encoding="utf-8"))
    value |= {"inference_mode": True, "target_modules": sorted(value["target_modules"])}
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def save_adapter(folder: Path, pairs: Pairs) -> None:
    """Write residuals as a PEFT adapter into an existing folder."""
    tensors = {}
    for where, pair in pairs.items():
        for name, value in zip(parameter_names(where), pair, strict=True):
            tensors[str(file_name(name))] = value
    write_adapter(folder, lora_config(rank_of(pairs), pairs), tensors)


def load_adapter(
    folder: str | os.PathLike[str], cure: str = "delete it and start again"
) -> dict[Where, Pair]:
    """The residuals of an adapter that :func:`save_adapter` or a training has written.

    Raises:
        PostshareError: it cannot be read (with the cure), or is another kind of adapter.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(
            f"{folder} holds no readable PEFT adapter ({reason}); {cure}"
        ) from None
    pairs = {}
    for name in list(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        where = HeadLayout.parse_name(
            name.removeprefix(_FILE_PREFIX).replace(".lora_A.weight", ".weight")
        )
        other = name.replace(".lora_A.", ".lora_B.")
        if where is not None and other in tensors:
            pairs[where] = Pair(tensors.pop(name), tensors.pop(other))
    ranks = {
        config.get("r"),
        config.get("lora_alpha"),
        *(pair.a.shape[0] for pair in pairs.values()),
    }
    if tensors or len(ranks) != 1 or config.get("use_rslora") or config.get("use_dora"):
        raise PostshareError(
            f"{folder} is no residual (a LoRA of one rank, equal to lora_alpha, on q, k, v, o "
            "alone); use the adapter that postshare has written"
        )
    return dict(sorted(pairs.items(), key=lambda item: (item[0][0], "qkvo".index(item[0][1]))))


# --- the dense form -------------------------------------------------------------------------------


class AdaptedReader:
    """Dense weights with residuals added: each W' + B A, added in fp32 and rounded once.

    Args:
        source: dense weights with the ties written in.
        plan: with which the residuals' features are those of the compact model.
    """

    def __init__(self, source: DenseReader, pairs: Pairs, plan: SharingPlan) -> None:
        self.path, self.config = source.path, source.config
        self._source, self._pairs, self._plan = source, pairs, plan
        self._layout = plan.layout(source.config)

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def shards(self) -> list[Path]:
        return self._source.shards()

    def slice(self, name: str) -> Any:
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its dtype. Raises PostshareError when float16 cannot hold it."""
        value, where = self._source.read(name), HeadLayout.parse_name(name)
        if where is None or where not in self._pairs:
            return value
        index = kept_features(self._plan, self._layout, *where)
        added = self._pairs[where].product()
        whole = value.float()
        whole = whole.index_add(self._layout.axis(where[1]), index, added)
        return cast(whole, value.dtype, name)
