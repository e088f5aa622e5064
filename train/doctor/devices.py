"""Checks: one GPU for each rank, and memory enough for a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from sa_models.savings import llama_parameters
from train.common.sizes import size
from train.distributed.launch_env import Offload
from train.doctor.findings import Finding, Level, Situation, bad, ok, warn
from train.estimate import gpu_memory
from train.estimate.llama_shapes import LlamaShape
from train.recipe.precision import precisions
from train.recipe.recipe import Recipe

GPU_ALLOWANCE = 2 * 10**9
"""Bytes on a GPU for CUDA and communication buffers, which no estimate counts."""


def check_devices(s: Situation) -> Iterator[Finding]:
    """One GPU for each rank, and torch sees those that there are."""
    topic = "devices"
    without = [f.rank for f in s.facts if f.gpu is None]
    unused = [f.rank for f in s.facts if f.gpu is None and f.driver and not f.gpus]
    if unused:
        yield bad(
            topic,
            f"{s.who(unused)}: a GPU driver is loaded, but torch sees no GPU",
            "is CUDA_VISIBLE_DEVICES empty, torch a CPU build (`python -c 'import torch; "
            "print(torch.version.cuda)'`), or the driver too old for it?",
        )
    if without and len(without) < len(s.facts):
        yield bad(
            topic,
            f"{s.who(without)} without a GPU, the others with one",
            "give every rank one: --num_processes counts the GPUs of all hosts",
        )
    shared = defaultdict(list)
    for f in s.facts:
        if f.gpu is not None:
            shared[f.network, f.gpu.uuid].append(f.rank)
    double = [ranks for ranks in shared.values() if len(ranks) > 1]
    for ranks in double:
        yield bad(
            topic,
            f"{s.who(ranks)} on one GPU",
            "lower --num_processes to the number of GPUs, or set CUDA_VISIBLE_DEVICES",
        )
    kinds = Counter(f.gpu.name for f in s.facts if f.gpu is not None)
    if len(kinds) > 1:
        listed = ", ".join(f"{n} x {name}" for name, n in kinds.items())
        yield warn(
            topic,
            f"different GPUs: {listed}; the slowest sets the pace",
            "ask the cluster for one kind of node",
        )
    elif kinds and not double and not without:
        (name,) = kinds
        yield ok(topic, f"a GPU for each rank: {name}")
    if len(without) == len(s.facts) and not unused:
        yield ok(topic, f"no GPU: CPU, {s.facts[0].cpus} core(s) for a process")


def check_precision(s: Situation) -> Iterator[Finding]:
    """What is computed in bf16, and who has to emulate it; `auto` has been resolved."""
    topic = "precision"
    if s.recipe is None or s.recipe.steps == 0:
        return
    chosen = precisions(s.recipe)
    keys = [key for key, value in chosen.items() if value == "bf16"]
    lacking = [f.rank for f in s.facts if not f.bf16]
    if not keys or not lacking:
        yield ok(topic, ", ".join(f"{key} {value}" for key, value in chosen.items()))
        return
    factor = max((f.bf16_factor for f in s.facts if f.bf16_factor is not None), default=None)
    slow = "" if factor is None else f": a linear layer takes {factor:.3g} times as long as in fp32"
    said = f"{' and '.join(keys)} bf16, and no bf16 instructions on {s.who(lacking)}{slow}"
    yield warn(topic, said, f"set {' '.join(f'{key}=fp32' for key in keys)}, or auto")


def check_compiler(s: Situation) -> Iterator[Finding]:
    """What `train.compile` compiles with."""
    topic = "compiler"
    if s.recipe is None or not s.recipe.train.compile or s.recipe.steps == 0:
        return
    lacking = [f for f in s.facts if f.compiler is None]
    if lacking:
        names = "gcc, or what CC names" if lacking[0].gpu else "g++, or what CXX names"
        yield bad(
            topic,
            f"train.compile, and {s.who(f.rank for f in lacking)}: no compiler ({names})",
            "install it, or set train.compile=false",
        )
    else:
        yield ok(topic, f"train.compile: layers are compiled with {s.facts[0].compiler}")


def check_gpu_memory(s: Situation) -> Iterator[Finding]:
    """What a step needs at its peak against what the GPUs have."""
    topic, gpus = "GPU memory", [(f.rank, f.gpu) for f in s.facts if f.gpu is not None]
    if not gpus:
        yield ok(topic, "no GPU here: nothing was checked")
        return
    rank, least = min(gpus, key=lambda pair: pair[1].free)
    if s.recipe is None or s.shape is None or s.recipe.train.steps == 0:
        free = f"{size(least.free)} of {size(least.total)} free on {s.who([rank])}"
        yield ok(topic, f"{free}; no training to compare it with")
        return
    need = memory_needed(s.recipe, s.shape, s.sharding, s.world, s.offload)
    said = f"a step needs about {size(need)}; {s.who([rank])} has {size(least.free)} free of "
    said += size(least.total)
    if need > least.total:
        yield bad(topic, said, what_fits(s, least.total - GPU_ALLOWANCE))
    elif need > least.free:
        cure = "something else holds the rest: see nvidia-smi, end it or take another GPU"
        yield bad(topic, said, cure)
    elif need + GPU_ALLOWANCE > least.free:
        cure = "CUDA and communication want 2 GB more: " + what_fits(s, least.free - GPU_ALLOWANCE)
        yield warn(topic, said, cure)
    else:
        yield ok(topic, said)


def check_whole_models(s: Situation) -> Iterator[Finding]:
    """The stages that hold whole fp32 models on the main process's GPU, against what it has."""
    gpu = next((f.gpu for f in s.facts if f.rank == 0), None)
    if gpu is None or s.recipe is None or s.shape is None:
        return
    whole = gpu_memory.whole_models(s.recipe, s.shape)
    if whole.bytes + GPU_ALLOWANCE <= gpu.total:
        return
    models = f"{whole.count} fp32 model{'s' * (whole.count > 1)}"
    alone = whole.bytes // whole.count + GPU_ALLOWANCE <= gpu.total
    yield bad(
        "GPU memory",
        f"however training is spread, {whole.stage} holds {models} whole on {s.who([0])}: "
        f"{size(whole.bytes)} of weights, and it has {size(gpu.total)}",
        "set materialize.reconstruct=false"
        if whole.count == 2 and alone
        else "give rank 0 a larger GPU; plan, export and evaluate also run on a CPU: "
        "CUDA_VISIBLE_DEVICES= postshare plan RECIPE",
    )


def memory_needed(
    recipe: Recipe,
    shape: LlamaShape,
    stage: int,
    world: int,
    offload: Offload = Offload(),  # noqa: B008 - it cannot be changed
    **other: Any,
) -> int:
    """Bytes on the device of one process at the peak of a step.

    Args:
        offload: only the optimizer's part is left out, so that the weights' is an upper bound.
        other: replaces fields of `train`.
    """
    section = recipe.train.model_copy(update=other)
    needed = gpu_memory.memory_per_gpu(
        shape,
        section,
        stage=stage,
        gpus=world,
        sequence_length=recipe.data.sequence_length,
        checkpointing=section.gradient_checkpointing,
        eager=recipe.model.attention == "eager",
        distill=recipe.distill,
        lora=recipe.lora,
    )
    return needed.total - (needed.optimizer if offload.optimizer else 0)


def what_fits(s: Situation, limit: int) -> str:
    """The smallest change that brings a step below `limit` bytes."""
    assert s.recipe is not None
    assert s.shape is not None
    stage = s.sharding
    spreads = s.world > 1 and s.recipe.lora is None  # adapters are whole on every GPU
    small: dict[str, Any] = {"gradient_checkpointing": True}
    steps: list[tuple[str, int, dict[str, Any]]] = [
        ("set train.gradient_checkpointing=true", stage, small),
        *(
            (f"launch/accelerate/zero{z}.yaml and train.gradient_checkpointing=true", z, small)
            for z in (1, 2, 3)
            if z > stage and spreads
        ),
        (
            "train.micro_batch_size=1, train.gradient_checkpointing=true"
            + (" and launch/accelerate/zero3.yaml" if spreads else ""),
            3 if spreads else stage,
            {**small, "micro_batch_size": 1},
        ),
    ]
    for cure, z, changes in steps:
        if memory_needed(s.recipe, s.shape, z, s.world, **changes) <= limit:
            return cure if cure.startswith("set") else f"set or use {cure}"
    for gpus in (2**n for n in range(1, 11) if s.recipe.lora is None):
        if (
            gpus > s.world
            and memory_needed(s.recipe, s.shape, 3, gpus, **small, micro_batch_size=1) <= limit
        ):
            return (
                f"use {gpus} GPUs, launch/accelerate/zero3.yaml, train.micro_batch_size=1 and "
                "train.gradient_checkpointing=true"
            )
    return "it fits on no number of these GPUs; take a smaller model or shorter sequences"


def host_memory(s: Situation) -> int:
    """Bytes of main memory that one process with a GPU needs.

    The model in fp32 as it is loaded: whole, or this rank's share and the largest tensor where it
    is spread. Later what is offloaded: the optimizer's masters, moments and gradients, 16 bytes a
    parameter, and the weights.
    """
    assert s.shape is not None
    whole = 4 * llama_parameters(s.shape)
    if s.sharding < 3:
        return whole
    share = whole // s.world
    loading = share + 4 * s.shape.vocab_size * s.shape.hidden_size
    return max(loading, 4 * share * s.offload.optimizer + share * s.offload.parameters)


def check_ram(s: Situation) -> Iterator[Finding]:
    """Main memory: what loading takes, and what is offloaded; on a CPU the training itself."""
    topic = "memory"
    if s.recipe is None or s.shape is None or s.recipe.train.steps == 0:
        least = min(s.facts, key=lambda f: f.ram)
        yield ok(topic, f"{size(least.ram)} available on {least.host}")
        return
    fine = []
    for ranks in s.hosts.values():
        f = min(ranks, key=lambda f: f.ram)
        on_cpu = f.gpu is None
        one = memory_needed(s.recipe, s.shape, s.sharding, s.world) if on_cpu else host_memory(s)
        need = one * len(ranks)
        what = "training" if on_cpu else "loading"
        processes = f"{len(ranks)} process{'es' * (len(ranks) > 1)}"
        said = f"{what} in {processes} needs about {size(need)} on {f.host}, which "
        said += f"has {size(f.ram)} available of {size(f.ram_total)}"
        if need > f.ram:
            level = Level.BAD if need > f.ram_total or on_cpu else Level.WARN
            yield Finding(
                level,
                topic,
                said,
                "ask for more memory (sbatch --mem=0, or resources.limits.memory), or start fewer "
                "processes on a host",
            )
        else:
            fine.append(said)
    if len(fine) == len(s.hosts):
        yield ok(topic, fine[0])
