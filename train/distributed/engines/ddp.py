"""One process, or DDP through Accelerate: whole fp32 parameters on every rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sa_models.errors import PostshareError
from train.distributed.engines.base import Engine, Shard, chosen, require_fp32
from train.models.nf4 import numbers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.recipe.recipe import Recipe


@dataclass
class PlainShard(Shard):
    """The whole parameter, its live gradient and optimizer state."""

    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer

    def read_gradient(self) -> torch.Tensor:
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self._flat(self.parameter.grad)

    def read_state(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(self.parameter, {})
        return {key: self._flat(torch.as_tensor(value)) for key, value in state.items()}

    def _flat(self, value: torch.Tensor) -> torch.Tensor:
        return value.view(-1) if value.shape == self.shape else value

    @torch.no_grad()
    def restore(self, values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        self.values.copy_(values)
        self.optimizer.state.pop(self.parameter, None)
        if state:
            self.optimizer.state[self.parameter] = {
                key: self._like_parameter(value) for key, value in state.items()
            }

    def _like_parameter(self, value: torch.Tensor) -> Any:
        if value.dim() == 0 and not value.is_floating_point():
            return value.item()  # bitsandbytes counts its steps in a Python integer
        value = value.detach().to(self.values.device, copy=True)
        return value.view(self.shape) if value.shape == self.values.shape else value


class PlainEngine(Engine):
    """One process, or DDP: fp32 parameters, bf16 by autocast."""

    backend = "plain"

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        train = recipe.train
        super().__init__(
            accelerator,
            {
                "backend": self.backend,
                "distributed_type": str(accelerator.distributed_type.value),
                "processes": accelerator.num_processes,
                "device": accelerator.device.type,
                "parameters": "fp32",
                "autocast": "bf16" if train.precision == "bf16" else None,
                "gradient_accumulation_steps": recipe.accumulation(accelerator.num_processes),
                "gradient_clipping": train.clip_norm,
            },
        )
        self._autocast = train.precision == "bf16"
        self._lora = recipe.lora is not None  # whose frozen weights are what lora.base says
        self._clip_norm = float("inf") if train.clip_norm is None else train.clip_norm

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        require_fp32(model, frozen=not self._lora)
        if self._autocast:
            autocast_forward(model, self.device)
        self.model = self.accelerator.prepare_model(model)
        self.optimizer = optimizer
        if self.world > 1 and not isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise PostshareError(
                f"{self.world} processes were launched but the model was not wrapped for DDP "
                f"(it is a {type(self.model).__name__}), so each would train its own; "
                "launch with launch/accelerate/ddp.yaml"
            )
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def micro_step(self, boundary: bool) -> Iterator[None]:
        with contextlib.nullcontext() if self.world == 1 or boundary else self.model.no_sync():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.world).backward()  # DDP averages over the ranks; the contract is a sum

    def step(self) -> float:
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm)
        self.optimizer.step()
        self.zero_grad()
        return float(norm)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def shards(self, names: list[str] | None = None) -> dict[str, Shard]:
        return {
            name: PlainShard(name, p.shape, 0, p.numel(), p.detach().view(-1), p, self.optimizer)
            for name, p in chosen(self._parameters, names).items()
        }

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            yield name, numbers(parameter).to("cpu", torch.float32)

    def restored(self) -> None:
        """Nothing to do: the parameters are the masters."""

    def close(self) -> None:
        if not hasattr(self, "model"):
            return
        self.zero_grad()
        if self._autocast:
            del self.accelerator.unwrap_model(self.model).forward
        del self.model, self.optimizer, self._parameters
        self.accelerator.free_memory()


def autocast_forward(model: nn.Module, device: torch.device) -> None:
    """Let the model compute in bf16, from fp32 parameters; undone by `del model.forward`.

    Accelerate's own mixed precision is fixed for the life of the process, and several trainings
    share one process.
    """
    forward = model.forward

    @functools.wraps(forward)
    def in_bf16(*arguments: Any, **options: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*arguments, **options)

    model.forward = in_bf16
