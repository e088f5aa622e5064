"""DeepSpeed ZeRO-1, 2 and 3, driven explicitly: its own backward, boundary and step.

ZeRO-3 may keep the optimizer, or the optimizer and the weights, in the host's memory: torch's AdamW
then runs on the CPU, and this is where the shards' masters and moments lie.

Accelerate only starts the process group: `accelerator.backward` would step by itself, before the
penalty could be added. The DeepSpeed configuration is generated from the recipe, without "auto".
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sa_models.errors import PostshareError
from sa_models.projections import SharedLinear
from train.distributed.engines.base import Engine, Shard, chosen, require_fp32
from train.distributed.engines.zero_refresh import Ranges, refresh_copies, refresh_partitions
from train.distributed.launch_env import Offload, launched_offload, launched_stage
from train.models.sharded_source import Source, partitioned, whole_shape

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    from train.recipe.recipe import Recipe


def deepspeed_config(
    recipe: Recipe, stage: int, world: int, on_cpu: bool, offload: Offload | None = None
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a recipe: no "auto", and nothing left to a default
    that changes numbers. This is the one place that states clipping under ZeRO."""
    train, accumulation = recipe.train, recipe.accumulation(world)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": not on_cpu,
        "reduce_scatter": True,
        "round_robin_gradients": False,  # a rank's range of a parameter stays contiguous
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 200_000_000,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            # Small parameters are kept whole where fetching them costs latency. Not on CPU: there
            # it would keep a test's whole model, and ZeRO-3 would not be exercised.
            "stage3_param_persistence_threshold": 0 if on_cpu else 100_000,
            "sub_group_size": 1_000_000_000,
        }
    host = {"device": "cpu", "pin_memory": not on_cpu}
    if offload is not None and offload.optimizer:
        zero["offload_optimizer"] = host
    if offload is not None and offload.parameters:
        zero["offload_param"] = host
    return {
        "train_batch_size": train.micro_batch_size * accumulation * world,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip_norm or 0.0,
        # Without partitioning DeepSpeed adds up bf16 gradients: there autocast computes in bf16.
        "bf16": {"enabled": train.precision == "bf16" and stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW under offload too
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@dataclass
class ZeroShard(Shard):
    """A slice of one of this rank's flat fp32 groups, which are what the optimizer updates.

    Attributes:
        flat: fp32 [n], the group; None where no element of the parameter lies on this rank.
        offset: of the range in `flat`.
        states: the optimizer's, by flat group.
    """

    flat: torch.Tensor | None
    offset: int
    states: dict[torch.Tensor, dict[str, Any]]

    def read_state(self) -> dict[str, torch.Tensor]:
        if self.flat is None:
            return {}
        state = self.states.get(self.flat, {})
        return {key: self._narrow(value) for key, value in state.items()}

    @torch.no_grad()
    def restore(self, values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        if self.flat is None:
            return
        self.values.copy_(values)
        if not state:  # of one range only; the others of the group may have theirs
            for value in self.read_state().values():
                value.zero_()
            return
        whole = self.states.setdefault(self.flat, {})
        for key, value in state.items():
            if key not in whole:
                like = self.flat if value.dim() else value
                whole[key] = torch.zeros_like(like, device=self.flat.device)
            self._narrow(whole[key]).copy_(value)

    def _narrow(self, value: torch.Tensor) -> torch.Tensor:
        return value.narrow(0, self.offset, self.stop - self.start) if value.dim() else value


@dataclass
class FragmentShard(ZeroShard):
    """ZeRO-1 and 2: a slice of this rank's flat fp32 partition, and its live gradient."""

    gradient: torch.Tensor | None

    def read_gradient(self) -> torch.Tensor:
        return self.values.new_zeros(0) if self.gradient is None else self.gradient


@dataclass
class PartitionShard(ZeroShard):
    """ZeRO-3: this rank's partition, whose tail may be padding."""

    parameter: nn.Parameter

    def read_gradient(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_grad

        self._padded = safe_get_local_grad(self.parameter).clone()
        return self._padded.view(-1)[: self.stop - self.start]

    def write_gradient(self, gradient: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        self._padded.view(-1)[: self.stop - self.start].copy_(gradient)
        safe_set_local_grad(self.parameter, self._padded)


class DrivenEngine(Engine):
    """What all stages of DeepSpeed share: its boundary and its backward, driven explicitly."""

    backend = "deepspeed"

    @contextlib.contextmanager
    def micro_step(self, boundary: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(boundary)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over the ranks; the contract is a sum.
        self.model.backward(loss * self.world, scale_wrt_gas=False)


class ZeroEngine(DrivenEngine):
    """DeepSpeed ZeRO-1, 2 or 3; bf16 with fp32 master weights, gradients summed in fp32."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        stage = launched_stage()
        assert stage is not None
        self.stage = stage
        on_cpu = accelerator.device.type == "cpu"
        config = deepspeed_config(
            recipe, self.stage, accelerator.num_processes, on_cpu, launched_offload()
        )
        super().__init__(accelerator, config)
        self.sharded = self.world > 1
        self._bf16 = recipe.train.precision == "bf16"
        self.streams = self.stage == 3
        self._source: Source | None = None
        self._ranges: Ranges = {}
        self.whole_gradients = self.stage == 1 and self._bf16  # DeepSpeed's BF16_Optimizer
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    def build(self, source: Source) -> LlamaForCausalLM:
        self._source = source
        return partitioned(source, self.resolved, self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import deepspeed

        if self._source is None:
            require_fp32(model)
        self._parameters = dict(model.named_parameters())
        self._trainable = {n: p for n, p in self._parameters.items() if p.requires_grad}
        self._shapes = {n: whole_shape(p) for n, p in self._parameters.items()}
        loaded: Mapping[str, torch.Tensor] = {}
        if self._bf16:
            loaded = self._source or {n: p.detach() for n, p in self._parameters.items()}
        _set_empty_aside(model, optimizer, torch.bfloat16 if self._bf16 else torch.float32)
        buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.resolved, dist_init_required=False
        )
        self.optimizer = self.model.optimizer
        if self.model.zero_optimization_stage() != self.stage:
            raise PostshareError(
                f"DeepSpeed prepared ZeRO stage {self.model.zero_optimization_stage()} where the "
                f"launch asks for {self.stage}; use the DeepSpeed version of constraints.txt"
            )
        if self.stage == 3:
            _announce_owners(model)
        if any(buffers[name] != buffer.dtype for name, buffer in model.named_buffers()):
            # A rotary table in bf16 is wrong by radians at position 4,096.
            raise PostshareError(
                "this DeepSpeed casts buffers (the rotary table) to bf16; use the version of "
                "constraints.txt"
            )

        # DeepSpeed makes the masters from weights that it has already rounded to bf16, and keeps no
        # masters of frozen ones.
        for name, shard in self.shards().items() if self._bf16 else ():
            shard.values.copy_(loaded[name].view(-1)[shard.start : shard.stop])
        self._frozen = loaded
        if self._source is None:
            self._frozen = {n: w.cpu() for n, w in loaded.items() if n not in self._trainable}

    def step(self) -> float:
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        return norm if norm >= 0 else float("inf")  # DeepSpeed reports an invalid norm as -1

    def zero_grad(self) -> None:
        self.model.optimizer.zero_grad()

    def shards(self, names: list[str] | None = None) -> dict[str, Shard]:
        make = self._partition if self.stage == 3 else self._fragment
        return {
            name: make(name, p) if self._shapes[name].numel() else self._nothing(name)
            for name, p in chosen(self._trainable, names).items()
        }

    def _nothing(self, name: str) -> Shard:
        values = torch.empty(0, dtype=torch.float32, device=self.device)
        return FragmentShard(name, self._shapes[name], 0, 0, values, None, 0, {}, None)

    def _partition(self, name: str, parameter: Any) -> Shard:
        # DeepSpeed's public calls copy to the device and back, one parameter at a time.
        zero = self.model.optimizer
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        shape = parameter.ds_shape
        start = min(self.rank * length, shape.numel())
        stop = min(start + length, shape.numel())
        values = flat.narrow(0, offset, stop - start).detach()
        return PartitionShard(
            name, shape, start, stop, values, flat, offset, zero.optimizer.state, parameter
        )

    def _fragment(self, name: str, parameter: Any) -> Shard:
        # DeepSpeed's public calls move whole parameters, one collective each; the local range is
        # only in this mapping, which every version since 0.9 has.
        if not hasattr(parameter, "_hp_mapping"):
            raise PostshareError(
                f"DeepSpeed has no fp32 mapping for {name}; use the version of constraints.txt"
            )
        mapping, optimizer = parameter._hp_mapping, self.model.optimizer.optimizer
        start, stop, flat, offset = 0, 0, None, 0
        values = torch.empty(0, dtype=torch.float32, device=self.device)
        if mapping is not None:  # some element of it lies in this rank's partition
            where = mapping.lp_fragment_address
            start, stop = where.start, where.start + where.numel
            flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
            offset = mapping.hp_fragment_address.start
            values = flat.narrow(0, offset, stop - start).detach()
        gradient = self._fragment_gradient(parameter, mapping)
        if gradient is not None and (
            gradient.dtype != torch.float32
            or gradient.numel() not in (stop - start, parameter.numel())
        ):
            raise PostshareError(
                f"DeepSpeed keeps {gradient.numel()} {gradient.dtype} gradients of {name} for "
                f"{stop - start} fp32 weights; use the version of constraints.txt"
            )
        return FragmentShard(
            name, parameter.shape, start, stop, values, flat, offset, optimizer.state, gradient
        )

    @staticmethod
    def _fragment_gradient(parameter: Any, mapping: Any) -> torch.Tensor | None:
        # ZeRO-1 in bf16 keeps the whole fp32 gradient on every rank and takes the norm of its own
        # copy: the ranks would clip differently if only their ranges were changed.
        whole = getattr(parameter, "_hp_grad", None)
        if whole is not None:
            return whole.view(-1)
        if mapping is None:
            return None
        gradients = mapping.gradient_dict.get(mapping.param_group_index)
        return None if gradients is None else gradients[parameter._index_in_param_group].view(-1)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            if self._shapes[name].numel() == 0:
                yield name, torch.empty(self._shapes[name])
                continue
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter).detach().to("cpu", torch.float32)
                continue
            if name in self._frozen:
                yield name, self._frozen[name]
                continue
            with GatheredParameters([parameter], enabled=self.stage == 3):
                whole = parameter.detach().to("cpu", torch.float32, copy=True)
            yield name, whole

    def restored(self) -> None:
        zero = self.model.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        # What DeepSpeed does after a step of its own.
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def refresh(self, names: list[str]) -> int:
        shards = self.shards([name for name in names if self._shapes[name].numel()])
        if self.stage == 3:
            refresh_partitions(self._parameters, shards)
            return 0
        return refresh_copies(self, self._parameters, shards, self._ranges)

    def close(self) -> None:
        if not hasattr(self, "model"):
            return
        deepspeed_engine, module = self.model, self.model.module
        deepspeed_engine.destroy()
        if self.stage == 3:
            _forget(module)
        # Whoever still holds the model must not hold the weights and the groups with it.
        deepspeed_engine.optimizer = deepspeed_engine.basic_optimizer = None
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0)
            vars(parameter).clear()
        del self.model, self.optimizer, self._parameters, self._trainable, self._frozen
        del deepspeed_engine, module
        self.accelerator.free_memory()
        gc.collect()


def _set_empty_aside(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    """Make buffers of weights without elements, which DeepSpeed can neither map nor gather.

    A projection of a compact model has one where all its units are tied.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if whole_shape(parameter).numel() == 0:
                delattr(module, name)
                module.register_buffer(name, parameter.detach().to(dtype), persistent=False)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if whole_shape(p).numel()]


def _announce_owners(model: nn.Module) -> None:
    """Tell ZeRO-3 which parameters of other layers a compact projection reads.

    They are then gathered with its own, before its forward and its backward; unannounced ones it
    finds by itself when they are read, if nothing else holds them at that moment.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for module in model.modules():
        if isinstance(module, SharedLinear):
            for owner in {id(owner): owner for _, owner, _, _ in module.tied}.values():
                register_external_parameter(module, owner.weight)


def _forget(module: nn.Module) -> None:
    """Drop DeepSpeed's global references to a ZeRO-3 model.

    0.19.8 puts every model on a stack that it never leaves, and caches by parameter coordinator:
    a finished training would stay in memory, and its process groups would outlive `shutdown`.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    for cache in gc.get_objects():
        if (
            isinstance(cache, functools._lru_cache_wrapper)
            and cache.__module__ == partitioned_param_coordinator.__name__
        ):
            cache.cache_clear()
