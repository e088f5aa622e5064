"""Models that are whole on no rank: read tensor by tensor and split up as they are read.

A :class:`Source` says what the model is and where its weights lie; :func:`partitioned` makes it
under ZeRO-3, `FsdpEngine.build` under FSDP2. Between the two a rank holds its own ranges and one
whole tensor at a time (FSDP2: one layer's, or the embeddings).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.configuration import SharedLlamaConfig
from sa_models.export.peft_adapter import Pairs, rank_of, wrap_
from sa_models.heads import HeadLayout
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.registry import Merge
from sa_models.modeling import SharedLlamaForCausalLM, compact_config, select_units
from sa_models.weights.compact_folder import CompactFolder, DenseReader, open_weights
from sa_models.weights.config_file import read_model_type
from sa_models.weights.parameter_shapes import compact_shapes
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import Leaders, converted
from sa_models.weights.whole_model import ParameterReader, require_fitting, skeleton
from train.models.base_model import base_folder

if TYPE_CHECKING:
    from sa_models.plan import SharingPlan
    from train.recipe.recipe import ModelSection


@dataclass(frozen=True)
class Source(Mapping[str, Tensor]):
    """The weights of a model to be trained, by name: each is read anew, as an fp32 CPU tensor.

    Attributes:
        kind, config: of the model.
        folder: where its generation config may lie.
        residual: of the model, whose values the reader has too.
    """

    kind: type[LlamaForCausalLM]
    config: LlamaConfig
    reader: ParameterReader
    folder: Path
    residual: Pairs | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.reader.read(name).detach().to(torch.float32).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.names())

    def __len__(self) -> int:
        return len(self.reader.names())

    def skeleton(self, device: torch.device) -> LlamaForCausalLM:
        """The model without weights: parameters on the meta device, buffers on `device`.

        Raises:
            PostshareError: the files hold other names or shapes than the model.
        """
        model = skeleton(self.kind, self.config, device, self.folder)
        if self.residual is not None:
            with torch.device("meta"):
                wrap_(model, rank_of(self.residual), self.residual)
        require_fitting(self.reader, dict(model.named_parameters()))
        return model


def base_source(
    section: ModelSection, plan: SharingPlan, leaders: Leaders = "mean"
) -> Source | None:
    """The model that training starts from, with the structure of the plan.

    None where it starts from random weights, which lie in no file.

    Raises:
        PostshareError: as `base_folder`, `WeightsFolder` and `converted`.
    """
    if section.config is not None:
        return None
    folder = base_folder(section)
    reader = converted(Fp32Folder(folder), plan.structure(), leaders)
    kind: type[LlamaForCausalLM] = LlamaForCausalLM
    config = copy.deepcopy(reader.config)
    if plan.spans:
        kind, config = SharedLlamaForCausalLM, compact_config(config, plan.structure())
    return Source(kind, _for_training(config, section), reader, folder)


def compact_source(
    folder: Path,
    section: ModelSection,
    plan: SharingPlan,
    leaders: Leaders = "mean",
    merge: Merge = "copy",
) -> Source:
    """The compact model of a dense or compact folder and a plan, its ties written in: for heal.

    Raises:
        PostshareError: as `open_weights` and `converted`.
    """
    dense = dense_weights(folder, plan, leaders)
    reader = CompactReader(MaterializedReader(dense, plan, merge), plan)
    return Source(SharedLlamaForCausalLM, _for_training(reader.config, section), reader, folder)


def factored_source(folder: Path, section: ModelSection) -> Source:
    """The compact model of a folder of factors, as it is: for heal.

    Raises:
        PostshareError: as `CompactFolder`.
    """
    reader = CompactFolder(folder)
    return Source(SharedLlamaForCausalLM, _for_training(reader.config, section), reader, folder)


def dense_weights(folder: Path, plan: SharingPlan, leaders: Leaders) -> DenseReader:
    """The fp32 weights into which a plan's ties are written.

    Raises:
        PostshareError: as `open_weights` and `converted`.
    """
    # What training has written is in fp32; a base that was not trained may be in another dtype.
    spans = read_model_type(folder) == SharedLlamaConfig.model_type
    return converted(open_weights(folder) if spans else Fp32Folder(folder), plan, leaders)


def exported_weights(folder: Path, dtype: torch.dtype) -> DenseReader:
    """The dense weights of which an export of that dtype is made.

    Means of an fp32 export are those of the evaluation, also where the base was not trained and has
    fewer bits.

    Raises:
        PostshareError: as `open_weights`.
    """
    reader = open_weights(folder)
    if dtype != torch.float32 or not isinstance(reader, WeightsFolder):
        return reader
    is_wider = any(reader.dtype(name) != dtype for name in reader.names())
    return Fp32Folder(folder) if is_wider else reader


def _for_training(config: Any, section: ModelSection) -> Any:
    config.dtype = torch.float32
    config._attn_implementation = section.attention
    return config


class Fp32Folder(WeightsFolder):
    """A dense folder whose tensors are read as fp32: means are then taken of what is trained."""

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        return super().read(name).to(torch.float32)

    def slice(self, name: str) -> Tensor:
        return self.read(name)


class CompactReader:
    """The tensors of a compact model, taken from materialized dense weights.

    Attributes:
        config: that of the compact model.
    """

    def __init__(self, source: MaterializedReader, plan: SharingPlan) -> None:
        plan = plan.effective()
        self.path = source.path
        self.config = compact_config(source.config, plan)
        self._source = source
        self._shapes = compact_shapes(self.config, plan)
        self._own = plan.own_units(plan.layout(self.config))

    def names(self) -> list[str]:
        return [name for name in self._source.names() if name in self._shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """The own units of a projection; any other tensor as it is."""
        value, where = self._source.read(name), HeadLayout.parse_name(name)
        if where is None:
            return value
        layer, projection = where
        return select_units(value, self._own[layer][projection], self.config, projection)


def partitioned(source: Source, resolved: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """The model under ZeRO-3, every parameter split over the ranks as soon as it is read.

    A collective. Parameters have the dtype in which DeepSpeed computes.

    Args:
        resolved: the DeepSpeed configuration.
        device: of the buffers; DeepSpeed places the parameters.
    """
    from deepspeed.runtime.zero import Init

    model = source.skeleton(device)
    dtype = torch.bfloat16 if resolved["bf16"]["enabled"] else torch.float32
    first: Any = None
    # The largest first: beside a whole tensor, and the file's mapping of it, lies little else yet.
    largest_first = sorted(parameter_places(model).items(), key=lambda one: -_size(*one[1][0]))
    # All go through one buffer: with a tensor each, the ranges that stay would lie between holes,
    # and the C library's heap keep half as much again.
    buffer = torch.empty(_size(*largest_first[0][1][0]), dtype=dtype)
    for name, places in largest_first:
        if math.prod(source.reader.shape(name)) == 0:
            place(nn.Parameter(source[name]), places)  # there is nothing to split
            continue
        # A copy: DeepSpeed broadcasts rank 0's values, and the file is mapped read-only.
        shape = source.reader.shape(name)
        parameter: Any = nn.Parameter(buffer[: math.prod(shape)].view(shape).copy_(source[name]))
        place(parameter, places)
        if first is None:
            Init(module=places[0][0], config_dict_or_path=resolved)
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    return model


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has split it up."""
    return getattr(parameter, "ds_shape", parameter.shape)


def place(parameter: nn.Parameter, places: list[tuple[nn.Module, str]]) -> None:
    """Put a parameter where :func:`parameter_places` says."""
    for module, leaf in places:
        module._parameters[leaf] = parameter


def parameter_places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """{parameter name: (module, attribute) of all that hold it}; tied ones have several."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, leaf))
    return {name: holders[id(parameter)] for name, parameter in model.named_parameters()}


def _size(module: nn.Module, leaf: str) -> int:
    return module.get_parameter(leaf).numel()
