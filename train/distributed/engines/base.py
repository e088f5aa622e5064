"""The engine: backward and step on one process, DDP, ZeRO or FSDP2, behind one small interface.

The launcher decides which one starts. The training loop asks which it is once, because 8-bit
AdamW needs whole parameters:

- :class:`train.distributed.engines.ddp.PlainEngine`: one process, or DDP through Accelerate;
- :class:`train.distributed.engines.zero.ZeroEngine`: DeepSpeed ZeRO-1, 2 and 3, driven explicitly,
  ZeRO-3 perhaps with offload; :class:`train.distributed.engines.zero0.WholeEngine`: DeepSpeed
  without partitioning (ZeRO-0);
- :class:`train.distributed.engines.fsdp2.FsdpEngine`: torch's own FSDP2.

The gradient's contract, the same on every backend: between two steps the gradients of all
`backward` calls of all ranks are **added**, never averaged. A loss of (sum of token losses of this
micro-batch) / (tokens of the whole accumulation window over all ranks) therefore gives the gradient
of the mean over all tokens, whatever the micro-batch, the accumulation and the world size.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from sa_models.errors import PostshareError
from train.distributed.ranks import Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    from train.models.sharded_source import Source


@dataclass
class Shard:
    """This rank's contiguous flat range [start, stop) of one parameter, in fp32.

    Between the last `backward` of an accumulation window and `step`, read the gradient, change it
    in place and write it back: clipping, its norm and the optimizer then see the change.

    Between two steps, `values` and `read_state()` are all that training knows of the range, and
    `restore` replaces them: what a checkpoint holds, whatever wrote it and whoever reads it.

    Attributes:
        shape: of the whole parameter.
        values: fp32 [stop - start], the live master weights of the range; read only, but for an
            edit between two steps that ends with `Engine.refresh`. They lie where they are updated:
            on the CPU under offload, and else on the engine's device.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    values: torch.Tensor

    @property
    def whole(self) -> bool:
        """Whether the range is the whole parameter."""
        return self.stop - self.start == self.shape.numel()

    def read_gradient(self) -> torch.Tensor:
        """The summed gradient, flat fp32: the live tensor or a copy of it.

        It covers the range, or the whole parameter where every rank keeps the whole gradient (each
        rank then has to add the same).
        """
        raise NotImplementedError

    def write_gradient(self, gradient: torch.Tensor) -> None:
        """Hand back what `read_gradient` gave, changed in place."""

    def read_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's live state of the range, by key; empty before the first step.

        Flat [stop - start] tensors (AdamW's `exp_avg` and `exp_avg_sq`) and scalars (its `step`);
        of a whole parameter also such as have another size (those of 8-bit AdamW).
        """
        raise NotImplementedError

    def restore(self, values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the master weights and the optimizer's state by copies of these.

        Args:
            values: fp32 [stop - start].
            state: as `read_state` gives it; empty for a range that was never updated.

        Call `Engine.restored` after the last one.
        """
        raise NotImplementedError


class Engine(ABC):
    """One training's backend: made by :func:`start`, ended by :meth:`close`.

    Attributes:
        rank, world: this process and how many there are.
        device: where batches belong.
        backend: "plain", "deepspeed" or "fsdp"; `stage` is the ZeRO stage, 0 on the others.
        sharded: whether the values and gradients of one parameter are spread over the ranks.
        whole_gradients: whether every rank keeps the whole gradient where it is sharded otherwise:
            ranks must then change all of it, all alike.
        streams: whether `build` makes a model that is whole on no rank.
        resolved: the resolved backend configuration, JSON-ready, for the run folder.
        model: callable like the prepared model; also `.train()` and `.eval()`. bf16 logits may
            come back as bf16: compute the loss in fp32.
        optimizer: the optimizer given to `prepare` (on ZeRO it holds this rank's partitions).
    """

    backend: str
    stage: int = 0
    sharded: bool = False
    whole_gradients: bool = False
    streams: bool = False
    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, resolved: dict[str, Any]) -> None:
        self.accelerator = accelerator
        self.resolved = resolved
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # --- one training -----------------------------------------------------------------------------

    def build(self, source: Source) -> LlamaForCausalLM:
        """Make a model for `prepare` without it being whole on any rank; where `streams`.

        A collective.
        """
        raise NotImplementedError

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Place and wrap the model (fp32 parameters) and its optimizer; call once.

        Raises:
            PostshareError: the model was not wrapped as the launch asked.
        """

    @abstractmethod
    def micro_step(self, boundary: bool) -> contextlib.AbstractContextManager[None]:
        """Around one forward and its `backward`; `boundary`: the last one before `step`.

        DDP decides in the forward whether the backward will communicate, so the forward belongs
        inside: `with engine.micro_step(last): engine.backward(loss_of(engine.model(**batch)))`.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (a scalar); see the gradient's contract above."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update, and drop the gradients.

        Returns:
            the total gradient norm before clipping, penalty included; inf or nan when it is not
            finite (the update may then have been applied: stop without saving).
        """

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients without a step."""

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def shards(self, names: list[str] | None = None) -> dict[str, Shard]:
        """This rank's range of each trainable parameter (or of those named), by name.

        Names are those of the unwrapped model. On ZeRO the order is the same on all ranks and a
        range may be empty; frozen parameters are left out.
        """

    # --- weights and state ------------------------------------------------------------------------

    @abstractmethod
    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter once, as (name, whole fp32 CPU tensor), from the master weights.

        A collective: every rank must run it to its end, and gets the same tensors. One parameter
        is in memory at a time; tied embeddings come once, under their first name.
        """

    @abstractmethod
    def restored(self) -> None:
        """Let the model compute with the master weights that `Shard.restore` has put in place.

        A collective, to be called between steps.
        """

    def refresh(self, names: list[str]) -> int:
        """Let the model compute with master weights of these parameters that were edited in place.

        A collective, to be called between steps, with the same names on all ranks; it moves these
        parameters alone. Nothing to do where the model's parameters are the masters.

        Returns:
            bytes that this rank sends to others.
        """
        return 0

    @abstractmethod
    def close(self) -> None:
        """Free the wrapped model and the optimizer. The process group stays for the next engine.

        After a plain engine the model holds its trained fp32 weights; after ZeRO and FSDP2 it is
        unusable (take the weights from `full_weights` before).
        """

    # --- between ranks ----------------------------------------------------------------------------

    def reduce_sum(self, value: Any) -> Any:
        """Sum over ranks: a float for a number (in float64), a new tensor for a tensor."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def reduce_max(self, value: Any) -> Any:
        """Maximum over ranks; types as in `reduce_sum`."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def check_replicas(self) -> None:
        """Compare a bitwise checksum of the parameters over ranks (none on ZeRO-3 and FSDP2).

        Call it after the first steps: ranks that train different models fail nowhere else.

        Raises:
            PostshareError: the ranks hold different weights.
        """
        if self.stage != 3 and self.differs(self.model.parameters()):
            raise PostshareError(
                "the ranks hold different weights after the first steps, so they train different "
                "models; start with `accelerate launch --config_file launch/accelerate/ddp.yaml`"
            )

    def differs(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether the ranks' copies of these differ in a bit."""
        if self.world == 1:
            return False
        checksum = torch.zeros((), dtype=torch.int64, device=self.device)
        for index, parameter in enumerate(parameters):
            # A compact o is stored transposed; weights in 4 bits are a column of bytes.
            values = parameter.detach().contiguous().view(-1)
            # Integer sums wrap and do not depend on their order: equal bits, equal checksum.
            part = (index + 1) * values.view(torch.int16).sum(dtype=torch.int64)
            part += (index + 7) * values.view(torch.uint8).sum(dtype=torch.int64)
            checksum += part.to(self.device)
        return int(self.reduce_max(checksum)) != -int(self.reduce_max(-checksum))

    def _reduce(self, value: Any, op: Any) -> Any:
        number = not isinstance(value, torch.Tensor)
        if number and self.world == 1:
            return float(value)  # no round trip to the device
        result = (
            torch.tensor(value, dtype=torch.float64, device=self.device)
            if number
            else value.detach().clone()
        )
        if self.world > 1:
            dist.all_reduce(result, op=op)
        return result.item() if number else result


def require_fp32(model: nn.Module, frozen: bool = True) -> None:
    """Refuse parameters in another dtype: bf16 training computes in bf16, and updates fp32.

    Args:
        frozen: whether that goes for those too that are not updated.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 and (frozen or parameter.requires_grad):
            raise PostshareError(
                f"{name} is {parameter.dtype}; load the model with dtype=torch.float32 "
                "(train.precision=bf16 computes in bf16 and still updates fp32 weights)"
            )


def chosen(parameters: dict[str, nn.Parameter], names: list[str] | None) -> dict[str, nn.Parameter]:
    """The named trainable parameters, all of them for None."""
    if names is None:
        return parameters
    for name in names:
        if name not in parameters:
            raise PostshareError(
                f"{name} is frozen or absent, so nothing can pull it; let train.trainable cover "
                "it or leave its projection out of penalty.projections"
            )
    return {name: parameters[name] for name in names}


def gather_ranges(ranks: Ranks, shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    """Every rank's (start, stop) of every parameter, int64 [world, 2] on the CPU."""
    own = torch.tensor([[shard.start, shard.stop] for shard in shards.values()])
    everyone = own.new_zeros(ranks.world, *own.shape).to(ranks.device)
    everyone[ranks.rank] = own.to(ranks.device)
    ranks.all_reduce_(everyone)
    return dict(zip(shards, everyone.cpu().unbind(1), strict=True))
