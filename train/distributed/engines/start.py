"""Start of the engine that the launch asks for, and the end of what ranks had in common."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sa_models.errors import PostshareError
from train.distributed.engines.base import Engine
from train.distributed.launch_env import check_launch, launched_fsdp, launched_stage
from train.distributed.launcher_store import init_method
from train.distributed.rendezvous import meeting
from train.distributed.watchdog import FIRST_STEP

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.recipe.recipe import Recipe

PATIENCE = timedelta(hours=4)
"""How long ranks wait for one another: as long as the main process may export and evaluate."""


def start(recipe: Recipe) -> Engine:
    """Make the engine that the launch asks for; several may follow one another in a process.

    Raises:
        PostshareError: several processes were launched but this one is alone; the launch file sets
            something that the recipe decides or that is not supported; the batch size does not
            divide over the processes.
        RankLostError: a rank has not started within three times `train.hang_timeout`.
    """
    stage = launched_stage()
    check_launch(recipe, stage)
    patience = recipe.train.hang_timeout
    with meeting(None if patience is None else FIRST_STEP * patience):
        accelerator = join()
    recipe.accumulation(accelerator.num_processes)
    if stage == 0:
        from train.distributed.engines.zero0 import WholeEngine

        return WholeEngine(accelerator, recipe)
    if stage is not None:
        from train.distributed.engines.zero import ZeroEngine

        return ZeroEngine(accelerator, recipe)
    if launched_fsdp():
        from train.distributed.engines.fsdp2 import FsdpEngine

        return FsdpEngine(accelerator, recipe)
    from train.distributed.engines.ddp import PlainEngine

    return PlainEngine(accelerator, recipe)


def join(patience: timedelta = PATIENCE) -> Accelerator:
    """Meet the other ranks. A collective, which one process runs alone.

    Args:
        patience: how long collectives wait for a rank.

    Raises:
        PostshareError: several processes were launched but this one is alone.
    """
    accelerator = _accelerator(launched_stage() is not None, patience)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise PostshareError(
            f"{launched} processes were launched but each sees a world of "
            f"{accelerator.num_processes}; launch with a file of launch/accelerate/ that fits the "
            "machine (ddp.yaml, zero0..3.yaml or fsdp2.yaml)"
        )
    atexit.register(_leave)
    return accelerator


def _accelerator(zero: bool, patience: timedelta) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    on_cpu = not torch.accelerator.is_available()
    if on_cpu:  # else DeepSpeed, which Accelerate imports, warns that it has found no other
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if zero:
        # On a CPU Accelerate finds no backend by itself, and each rank would be alone.
        group = InitProcessGroupKwargs(
            backend="gloo" if on_cpu else "nccl", init_method=init_method(), timeout=patience
        )
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[group])
        # Accelerate tells transformers about ZeRO-3, which would then partition every model made in
        # this process, by collectives: also those that the main process makes alone.
        unset_hf_deepspeed_config()
        return accelerator
    # Accelerate tells transformers to load weights on the first rank alone, and to share them out
    # later; it would be Accelerate's FSDP that does so, and ours expects them on every rank.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Without cpu=True Accelerate leaves the model unwrapped on a machine without accelerator.
    cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    group = InitProcessGroupKwargs(init_method=init_method(), timeout=patience)
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[group])


def shutdown() -> None:
    """Destroy the process group and end its threads; call once, after the last `close`.

    Without it a run on gloo aborts now and then while Python exits: a worker thread that still
    holds a tensor needs the interpreter to release it (docs/zero-on-cpu.md). Destroying is not
    enough while somebody holds a group, so DeepSpeed's references go too.
    """
    if not dist.is_initialized():
        return
    zero = sys.modules.get("deepspeed")
    if zero is not None and zero.comm.is_initialized():
        zero.comm.destroy_process_group()
    else:
        dist.destroy_process_group()
    gc.collect()


def _leave() -> None:
    # A run that ends without `shutdown`, by an error say: gloo can always be torn down; with NCCL a
    # rank that failed would wait here for work that never ends.
    if dist.is_initialized() and dist.get_backend() == "gloo":
        shutdown()
    gc.collect()  # what the frames of the run have held until now
