"""FSDP2: torch's own `fully_shard`, on each decoder layer and on the root, on any device.

A compact model that is healed reads weights of one layer in another, which a layer of its own would
have given back by then: those layers belong to the root, which is gathered once for a step.

Accelerate starts the process group alone: it offers FSDP on accelerators only, steps by itself, and
one code path serves both. Parameters, gradients and optimizer state are fp32 DTensors, each rank
holding its rows; layers are gathered for their forward and backward, in bf16 if the recipe asks for
it. Gradients are reduced to the shards by every `backward`, in fp32, so that no rank holds more of
them than one layer's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from sa_models.errors import PostshareError
from sa_models.projections import SharedBasisLinear, SharedLinear
from train.distributed.engines.base import Engine, Shard, chosen, require_fp32
from train.distributed.engines.ddp import PlainShard
from train.models.sharded_source import parameter_places, place

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    from train.models.sharded_source import Source
    from train.recipe.recipe import Recipe


class RowShard(PlainShard):
    """This rank's rows of a parameter that is a DTensor."""

    def _flat(self, value: torch.Tensor) -> torch.Tensor:
        return _rows(value) if isinstance(value, DTensor) else value

    def _like_parameter(self, value: torch.Tensor) -> torch.Tensor:
        if value.dim() == 0:
            return value.detach().to(self.values.device, copy=True)
        made = torch.zeros_like(self.parameter)
        _rows(made).copy_(value)
        return made


def _rows(tensor: Any) -> torch.Tensor:
    """The local rows of a DTensor, flat and live."""
    return tensor.to_local().detach().view(-1)


class FsdpEngine(Engine):
    """FSDP2 over all ranks; bf16 with fp32 master weights, gradients summed in fp32."""

    backend = "fsdp"

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        train = recipe.train
        super().__init__(
            accelerator,
            {
                "backend": self.backend,
                "processes": accelerator.num_processes,
                "device": accelerator.device.type,
                "sharded": "each decoder layer that shares no weights, and the rest",
                "parameters": "fp32",
                "compute": train.precision,
                "reduce": "fp32",
                "gradient_accumulation_steps": recipe.accumulation(accelerator.num_processes),
                "gradient_clipping": train.clip_norm,
            },
        )
        self.sharded = self.world > 1
        self._bf16 = train.precision == "bf16"
        self._clip_norm = math.inf if train.clip_norm is None else train.clip_norm
        self.streams = True
        self._built: nn.Module | None = None

    def build(self, source: Source) -> LlamaForCausalLM:
        model = source.skeleton(self.device)
        load_sharded(model, source, self.device, self._shard_module)
        self._built = model
        return model

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        require_fp32(model)
        if model is not self._built:
            self._shard_whole(model, optimizer)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The contract is a sum, and FSDP2 averages; gloo knows sums alone.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.model, self.optimizer = model, optimizer
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        # A layer whose units are all tied has weights without elements: no rows, nothing to train.
        held = {name: p for name, p in self._parameters.items() if p.numel()}
        self._trainable = {name: p for name, p in held.items() if p.requires_grad}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.numel()]
        for name, parameter in self._parameters.items():
            if name not in held:
                parameter.data = parameter.to(torch.bfloat16 if self._bf16 else torch.float32)
            elif not isinstance(parameter, DTensor):
                raise PostshareError(
                    f"{name} was not sharded by FSDP2; use the torch version of constraints.txt"
                )

    def _shard_whole(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard a model that every rank has whole."""
        if self.differs(model.parameters()):
            raise PostshareError(
                "the ranks have loaded different weights, and each would train its part of its "
                "own; let every rank load the same files"
            )
        places = _places(model, optimizer)
        for parameter in model.parameters():
            if not parameter.numel():
                parameter.data = parameter.to(self.device)
        for _, module in _sharded_modules(model):  # each is moved to the device as it is sharded
            self._shard_module(module)
        # `fully_shard` has put new parameters in the place of those that the optimizer was given.
        parameters = dict(model.named_parameters())
        for group, names in zip(optimizer.param_groups, places, strict=True):
            group["params"] = [parameters[name] for name in names]

    def _shard_module(self, module: nn.Module) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self._bf16 else None, reduce_dtype=torch.float32
        )
        empty = {parameter for parameter in module.parameters() if not parameter.numel()}
        fully_shard(
            module,
            mesh=device_mesh(self.device, self.world),
            mp_policy=policy,
            ignored_params=empty,  # which it cannot reduce
        )

    @contextlib.contextmanager
    def micro_step(self, boundary: bool) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        # The one place that states clipping under FSDP2: by the norm over all ranks.
        gradients = [_rows(p.grad) for p in self._trainable.values() if p.grad is not None]
        square = nn.utils.get_total_norm(gradients).double().square()
        norm = float(self.all_reduce_(square).sqrt())
        coefficient = self._clip_norm / (norm + 1e-6)
        if coefficient < 1:
            torch._foreach_mul_(gradients, coefficient)
        self.optimizer.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def shards(self, names: list[str] | None = None) -> dict[str, Shard]:
        return {name: self._shard(name, p) for name, p in chosen(self._trainable, names).items()}

    def _shard(self, name: str, parameter: Any) -> Shard:
        values, shape = _rows(parameter), parameter.shape
        width = math.prod(shape[1:])
        start = min(self.rank * -(-shape[0] // self.world), shape[0]) * width
        return RowShard(
            name, shape, start, start + values.numel(), values, parameter, self.optimizer
        )

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            whole: Any = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield name, whole.to("cpu", torch.float32)

    def restored(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root may still hold what it gathered for an evaluation

    def refresh(self, names: list[str]) -> int:
        self.restored()  # the next forward gathers the masters anew
        return 0

    def check_replicas(self) -> None:
        """Nothing to compare: each weight is on one rank."""

    def close(self) -> None:
        if not hasattr(self, "model"):
            return
        self.zero_grad()
        self.restored()  # what was gathered goes; the shards go with the model
        self._built = None
        del self.model, self.optimizer, self._parameters, self._trainable
        self.accelerator.free_memory()


def device_mesh(device: torch.device, world: int) -> DeviceMesh:
    """All ranks as one dimension."""
    if not dist.is_initialized():  # one process: Accelerate starts no group
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            rank=0,
            world_size=1,
            store=dist.HashStore(),
        )
    return init_device_mesh(device.type, (world,))


def load_sharded(
    model: nn.Module,
    source: Source,
    device: torch.device,
    shard: Callable[[nn.Module], None],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fill the skeleton of a source layer by layer, each sharded before the next is read.

    A collective.

    Args:
        shard: calls `fully_shard` on a module.
        dtype: of the parameters.
    """
    places = parameter_places(model)
    unread = {name: math.prod(source.reader.shape(name)) for name in places}
    parts = []
    for prefix, module in _sharded_modules(model):
        names = [name for name in unread if name.startswith(prefix)]
        parts.append((module, {name: unread.pop(name) for name in names}))
    # All modules go through one buffer: with one each, the rows that stay would lie between
    # holes, and the C library's heap keep half as much again. FSDP2 copies its rows.
    largest = max(sum(sizes.values()) for _, sizes in parts)
    buffer = torch.empty(largest, dtype=dtype, device=device)
    for module, sizes in parts:
        pieces = buffer[: sum(sizes.values())].split(list(sizes.values()))
        for name, piece in zip(sizes, pieces, strict=True):
            value = piece.view(source.reader.shape(name)).copy_(source[name])
            place(nn.Parameter(value), places[name])
        shard(module)


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of its parameters' names, module) of each decoder layer, and of the root last.

    Layers that read one another's weights are left to the root.
    """
    together = _reading_each_other(model)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in together:
            yield f"{name}.", module
    yield "", model


def _reading_each_other(model: nn.Module) -> set[nn.Module]:
    """The decoder layers with a projection that another layer owns a part, or the basis, of, and
    those owners."""
    layer_of = {
        projection: layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for projection in layer.modules()
        if isinstance(projection, SharedLinear | SharedBasisLinear)
    }
    found: set[nn.Module] = set()
    for projection, layer in layer_of.items():
        if isinstance(projection, SharedBasisLinear):
            owners = {layer_of[projection.owner]}
        else:
            owners = {layer_of[owner] for _, owner, _, _ in projection.tied}
        if owners - {layer}:
            found |= owners | {layer}
    return found


def _places(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of each of the optimizer's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
