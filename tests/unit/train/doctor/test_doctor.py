"""Each check with facts that are made up: the finding, its level and its numbers."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from sa_models.errors import PostshareError
from sa_models.savings import llama_parameters
from tests.support import REPOSITORY
from train.cli import launched
from train.distributed.launch_env import Offload
from train.doctor import cost, devices, inputs, network, ranks
from train.doctor.builds import find_locks, release_own
from train.doctor.diagnosis import _Visit, diagnose, merged, show
from train.doctor.facts import (
    Facts,
    Gpu,
    TooLate,
    disk_free,
    find_compiler,
    infiniband,
    limited,
    memory,
)
from train.doctor.findings import LEFT_WAITING, Finding, Level, Situation, from_error
from train.doctor.probes import (
    BrokenLink,
    Channel,
    Clock,
    FolderProbe,
    Reduction,
    clock_from,
    probe_clocks,
    probe_folder,
    probe_links,
)
from train.estimate import parameters as estimate
from train.estimate.gpu_memory import ZERO_STAGES, memory_per_gpu
from train.estimate.llama_shapes import KNOWN, LlamaShape
from train.estimate.throughput import Assumed
from train.recipe.recipe import Recipe, validate

GB = 10**9
SEVEN_B = KNOWN["meta-llama/Llama-2-7b-hf"]
PARAMETERS = 6_738_415_616


def recipe(**train: Any) -> Recipe:
    section = {"steps": 10, "batch_size": 64, "micro_batch_size": 1, "learning_rate": 1e-4}
    return validate(
        {
            "name": "seven",
            "model": {"path": "meta-llama/Llama-2-7b-hf"},
            "data": {"train": "a", "validation": "b", "sequence_length": 4096},
            "plan": {"budget": {"ratio": 0.3}},
            "train": {**section, "precision": "bf16", "gradient_checkpointing": True, **train},
        }
    )


def fact(rank: int = 0, host: str = "a", **fields: Any) -> Facts:
    values: dict[str, Any] = {
        "local_rank": rank,
        "host": host,
        "network": host,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cu130"},
        "ram": 20 * GB,
        "ram_total": 25 * GB,
        "interfaces": ["lo", "eth0"],
    }
    return Facts(rank=rank, **{**values, **fields})


def gpu(index: int = 0, free: int = 80 * GB, total: int = 85 * GB, name: str = "H100") -> Gpu:
    return Gpu(name, f"GPU-{index}", free, total)


def situation(*facts: Facts, **fields: Any) -> Situation:
    values = {"world": len(facts) or 1, **fields}
    return Situation(list(facts) or [fact()], **values)


def seven(*facts: Facts, stage: int = 3, **fields: Any) -> Situation:
    section = fields.pop("recipe", None) or recipe()
    return situation(*facts, recipe=section, shape=SEVEN_B, stage=stage, **fields)


def only(found: Any, level: Level = Level.BAD) -> Finding:
    (finding,) = [f for f in found if f.level == level]
    assert finding.level == Level.OK or finding.cure, "a problem without a cure"
    return finding


def levels(found: Any) -> set[Level]:
    return {f.level for f in found}


# --- who is there ---------------------------------------------------------------------------------


def test_a_rank_that_does_not_answer_is_named() -> None:
    s = situation(fact(0), fact(1), fact(3, "b"), world=5)
    assert only(ranks.check_world(s)).found == "ranks 2 4 of 5 did not answer"
    assert s.missing == [2, 4]
    s = situation(fact(0), fact(1, "b"))
    assert only(ranks.check_world(s), Level.OK).found == "2 answer, on 2 hosts: a, b"


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_silent_world_of_one_is_found(variable: str) -> None:
    s = situation(fact(environment={variable: "4"}))
    assert (
        f"{variable} is 4, but each process believes in a world of 1"
        in only(ranks.check_world(s)).found
    )
    # One task a node, which starts the launcher: fewer tasks than processes.
    s = situation(fact(0, environment={variable: "1"}), fact(1))
    assert levels(ranks.check_world(s)) == {Level.OK}


def test_readings_that_hang_are_named() -> None:
    s = situation(fact(0), fact(1, "b", late=["the GPU"]))
    assert only(ranks.check_world(s)).found == "rank 1 (b): the GPU did not answer in time"


def test_joining_names_who_is_silent_and_who_failed() -> None:
    s = situation(fact(0), fact(1), fact(2), joined={0: None, 1: "2 were launched; launch well"})
    found = list(ranks.check_join(s))
    assert [f.found for f in found] == [
        "rank 2 did not join in time (gloo)",
        "rank 1: 2 were launched",
    ]
    assert "GLOO_SOCKET_IFNAME" in found[0].cure
    assert found[1].cure == "launch well"
    assert levels(ranks.check_join(replace(s, joined={0: None, 1: None, 2: None}))) == {Level.OK}
    assert not list(ranks.check_join(replace(s, joined=None)))


# --- the same everywhere --------------------------------------------------------------------------


def test_versions_that_differ_are_bad_and_untested_ones_a_warning() -> None:
    other = fact(1, "b", versions={"python": "3.11.7", "torch": "2.12.0"})
    found = list(ranks.check_versions(situation(fact(), other), {"torch": "2.13.0"}))
    assert only(found).found == "torch differs: 2.13.0+cu130 on rank 0 (a), 2.12.0 on rank 1 (b)"
    found = list(ranks.check_versions(situation(fact(), fact(1)), {"torch": "2.13.1"}))
    assert (
        only(found, Level.WARN).found == "not the tested set: torch 2.13.0+cu130 (tested: 2.13.1)"
    )
    assert levels(ranks.check_versions(situation(fact()), {"torch": "2.13.0"})) == {Level.OK}
    # A driver on one host only.
    cpu = fact(1, versions={**fact().versions, "driver": "575.1"})
    assert (
        "driver differs: none on rank 0"
        in only(ranks.check_versions(situation(fact(), cpu), {})).found
    )


def test_the_tested_set_is_constraints_txt() -> None:
    assert ranks.tested_versions()["torch"] == "2.13.0"


def test_recipes_that_differ_are_bad() -> None:
    s = seven(fact(0, recipe="x"), fact(1, recipe="x"), fact(2, recipe="y"))
    assert "ranks 0-1; rank 2 read different ones" in only(ranks.check_recipe(s)).found
    assert levels(ranks.check_recipe(seven(fact(0, recipe="x"), fact(1, recipe="x")))) == {Level.OK}


# --- devices --------------------------------------------------------------------------------------


def test_two_ranks_on_one_gpu_are_bad() -> None:
    s = situation(fact(0, gpu=gpu(0)), fact(1, gpu=gpu(1)), fact(2, gpu=gpu(1)))
    assert only(devices.check_devices(s)).found == "ranks 1-2 on one GPU"
    s = situation(fact(0, gpu=gpu(0)), fact(1, "b", gpu=gpu(0)))
    found = only(devices.check_devices(s), Level.OK).found
    assert found == "a GPU for each rank: H100", "the same identity on another host is another GPU"


def test_a_driver_without_a_gpu_in_torch_and_a_mixture() -> None:
    assert "torch sees no GPU" in only(devices.check_devices(situation(fact(driver="5")))).found
    mixed = situation(fact(0, gpu=gpu()), fact(1, "b"))
    assert only(devices.check_devices(mixed)).found.startswith("rank 1 (b) without a GPU")
    kinds = situation(fact(0, gpu=gpu()), fact(1, gpu=gpu(1, name="A100")))
    assert "1 x H100, 1 x A100" in only(devices.check_devices(kinds), Level.WARN).found


def test_bf16_that_is_emulated_is_a_warning_with_its_factor() -> None:
    slow, quick = fact(1, "b", bf16=False, bf16_factor=16.24), fact(0, "a", gpu=gpu(0))
    finding = only(devices.check_precision(seven(quick, slow)), Level.WARN)
    assert finding.found == (
        "train.precision bf16, and no bf16 instructions on rank 1 (b): a linear layer takes 16.2 "
        "times as long as in fp32"
    )
    assert finding.cure == "set train.precision=fp32, or auto"
    for fine in (seven(quick), seven(slow, recipe=recipe(precision="fp32"))):
        assert only(devices.check_precision(fine), Level.OK).found.startswith("train.precision ")
    assert list(devices.check_precision(seven(slow, recipe=recipe(steps=0)))) == []


def test_compiled_layers_need_a_compiler() -> None:
    has, lacks = fact(0, "a", compiler="/usr/bin/g++"), fact(1, "b")
    finding = only(devices.check_compiler(seven(has, lacks, recipe=recipe(compile=True))))
    assert finding.found == ("train.compile, and rank 1 (b): no compiler (g++, or what CXX names)")
    (fine,) = devices.check_compiler(seven(has, recipe=recipe(compile=True)))
    assert (fine.level, fine.found.endswith("with /usr/bin/g++")) == (Level.OK, True)
    for other in (recipe(), recipe(compile=True, steps=0)):
        assert list(devices.check_compiler(seven(lacks, recipe=other))) == []


def test_the_compiler_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("g++", "clang++", "gcc", "mine"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CC", "mine")
    assert find_compiler(for_gpu=True) == str(tmp_path / "mine")
    assert Path(find_compiler(for_gpu=False) or "").name in ("g++", "clang++")
    monkeypatch.setenv("CXX", "absent")
    assert find_compiler(for_gpu=False) is None


def test_gpu_memory_against_the_estimate() -> None:
    need = memory_per_gpu(
        SEVEN_B, recipe().train, stage=3, gpus=8, sequence_length=4096, checkpointing=True
    ).total
    assert 14 * GB < need < 25 * GB

    def found(free: int, total: int) -> Finding:
        facts = [fact(rank, gpu=gpu(rank)) for rank in range(7)]
        facts.append(fact(7, gpu=gpu(7, free, total)))
        (finding,) = devices.check_gpu_memory(seven(*facts))
        return finding

    assert found(need + 2 * GB, 80 * GB).level == Level.OK
    assert found(need + 2 * GB - 1, 80 * GB).level == Level.WARN
    other = found(need - 1, 80 * GB)
    assert (other.level, "something else" in other.cure) == (Level.BAD, True)
    small = found(need - 2, need - 1)
    assert (small.level, "rank 7 has" in small.found) == (Level.BAD, True)


def test_what_the_job_costs_on_the_gpus_that_are_here() -> None:
    # Llama-2-7B: 6 x (6,738,415,616 - 32,000 x 4,096) + 12 x 32 x 4,096 x 4,096 operations a token.
    flops = 6 * 6_607_343_616 + 12 * 32 * 4096 * 4096
    tokens = 1000 * 64 * 4096
    four = [fact(rank, gpu=gpu(rank, name="NVIDIA A100-SXM4-80GB")) for rank in range(4)]
    s = situation(
        *four, world=4, recipe=recipe(steps=1000), shape=SEVEN_B, assumed=Assumed(mfu=0.5)
    )
    (found,) = cost.check_cost(s)
    hours = tokens / (4 * 0.5 * 312e12 / flops) / 3600
    assert found.level == Level.OK
    lines = found.found.splitlines()
    assert (
        lines[0] == f"speed: {tokens / hours / 3600:,.0f} tokens/s on 4 GPU(s): MFU 50.0% on A100"
    )
    training = f"about {hours:.1f} hours, {4 * hours:.3g} GPU-hours"
    assert lines[3] == f"time: training  {training}, 262,144,000 tokens"
    assert lines[4] == f"control   {training}, as many"
    (found,) = cost.check_cost(replace(s, assumed=Assumed()))
    assert (
        found.found
        == "speed: not known: none was measured on A100; give --mfu 0.3, or --speed TOKENS"
    )
    (found,) = cost.check_cost(replace(s, assumed=Assumed(chip="Z1")))
    assert (found.level, found.cure) == (Level.BAD, "give --speed")
    # Without a GPU an hour is an hour.
    s = situation(fact(), recipe=recipe(steps=1000), shape=SEVEN_B, assumed=Assumed(tokens / 3600))
    (found,) = cost.check_cost(s)
    assert "GPU" not in found.found
    assert "time: training  about 60 minutes, 262,144,000 tokens" in found.found
    assert list(cost.check_cost(situation(fact()))) == []


def test_the_cure_for_too_little_gpu_memory_is_one_that_fits() -> None:
    facts = [fact(rank, gpu=gpu(rank, 80 * GB, 80 * GB)) for rank in range(8)]
    (finding,) = devices.check_gpu_memory(seven(*facts, stage=0))
    assert finding.level == Level.BAD
    assert "zero1.yaml" in finding.cure
    sizes = [
        devices.memory_needed(recipe(), SEVEN_B, z, 8, gradient_checkpointing=True) for z in (0, 1)
    ]
    assert sizes[1] <= 78 * GB < sizes[0]
    (finding,) = devices.check_gpu_memory(seven(facts[0], stage=0))
    gpus = int(finding.cure.split()[1])
    fits = [devices.memory_needed(recipe(), SEVEN_B, 3, n) <= 78 * GB for n in (gpus // 2, gpus)]
    assert fits == [False, True]
    tiny = [fact(gpu=gpu(0, GB, GB))]
    (finding,) = devices.check_gpu_memory(seven(*tiny))
    assert "no number of these GPUs" in finding.cure


def test_whole_models_are_held_however_training_is_spread() -> None:
    """fp32: one to evaluate, and the unshared one beside it to reconstruct."""
    one, section = 4 * PARAMETERS, recipe()
    rebuilding = section.model_copy(
        update={"materialize": section.materialize.model_copy(update={"reconstruct": True})}
    )

    def found(total: int, recipe: Recipe = section, other: int = 80 * GB) -> list[Finding]:
        s = seven(fact(0, gpu=gpu(0, total, total)), fact(1, gpu=gpu(1, other, other)))
        return list(devices.check_whole_models(replace(s, recipe=recipe)))

    assert found(one + 2 * GB) == found(2 * one + 2 * GB, rebuilding) == []
    (finding,) = found(one + 2 * GB - 1)
    assert (finding.level, "larger GPU" in finding.cure) == (Level.BAD, True)
    assert "evaluate holds 1 fp32 model whole on rank 0: 27.0 GB" in finding.found
    (finding,) = found(2 * one + 2 * GB - 1, rebuilding)
    assert finding.cure == "set materialize.reconstruct=false"
    assert "materialize holds 2 fp32 models whole on rank 0: 53.9 GB" in finding.found
    assert found(80 * GB, rebuilding, other=GB) == []  # rank 1 holds none of them
    assert list(devices.check_whole_models(seven(fact()))) == []


def test_without_a_gpu_nothing_is_claimed() -> None:
    (finding,) = devices.check_gpu_memory(seven(fact()))
    assert (finding.level, finding.found) == (Level.OK, "no GPU here: nothing was checked")


def test_main_memory_counts_the_processes_of_a_host() -> None:
    load = 4 * PARAMETERS  # 27 GB
    two = [fact(r, gpu=gpu(r), ram=2 * load, ram_total=2 * load) for r in range(2)]
    assert levels(devices.check_ram(seven(*two, stage=0))) == {Level.OK}
    short = [replace(f, ram=2 * load - 1) for f in two]
    assert (
        "loading in 2 processes needs about 53.9 GB"
        in only(devices.check_ram(seven(*short, stage=0)), Level.WARN).found
    )
    never = [replace(f, ram=load, ram_total=2 * load - 1) for f in two]
    assert levels(devices.check_ram(seven(*never, stage=0))) == {Level.BAD}
    apart = [never[0], replace(never[1], host="b", network="b")]
    assert levels(devices.check_ram(seven(*apart, stage=0))) == {Level.OK}
    assert "training in 1 process needs" in only(devices.check_ram(seven(fact(), stage=0))).found


def test_main_memory_where_the_model_is_spread_or_offloaded() -> None:
    two = [fact(r, gpu=gpu(r)) for r in range(2)]
    largest = 4 * 32_000 * 4096
    for spread in ({"stage": 3}, {"stage": None, "fsdp": True}):
        assert devices.host_memory(seven(*two, **spread)) == 2 * PARAMETERS + largest
    # Masters, two moments and gradients in fp32; and the weights, counted in fp32.
    assert devices.host_memory(seven(*two, offload=Offload(optimizer=True))) == 8 * PARAMETERS
    both = Offload(optimizer=True, parameters=True)
    assert devices.host_memory(seven(*two, offload=both)) == 10 * PARAMETERS


def test_gpu_memory_of_fsdp_and_offload() -> None:
    def needed(**launch: Any) -> str:
        facts = [fact(rank, gpu=gpu(rank)) for rank in range(8)]
        (finding,) = devices.check_gpu_memory(seven(*facts, **launch))
        return finding.found

    assert needed(stage=None, fsdp=True) == needed(stage=3) != needed(stage=0)
    one = devices.memory_needed(recipe(), SEVEN_B, 3, 8)
    offloaded = devices.memory_needed(recipe(), SEVEN_B, 3, 8, Offload(optimizer=True))
    assert one - offloaded == -(-12 * PARAMETERS // 8)


# --- network --------------------------------------------------------------------------------------


def test_a_loopback_address_cannot_be_reached_from_another_host() -> None:
    local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    s = situation(fact(0, environment=local), fact(1, "b"))
    assert only(network.check_address(s)).found == "MASTER_ADDR is 127.0.0.1, and there are 2 hosts"
    s = situation(fact(0, environment=local), fact(1))
    assert levels(network.check_address(s)) == {Level.OK}
    # Two network namespaces of one host do not share a loopback either.
    s = situation(fact(0, environment=local), fact(1, network="a net:[2]"))
    assert levels(network.check_address(s)) == {Level.BAD}


@pytest.mark.parametrize(
    ("variable", "value", "fine"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "ib", False),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
    ],
)
def test_interfaces_that_are_named_exist(variable: str, value: str, fine: bool) -> None:
    found = list(network.check_settings(situation(fact(environment={variable: value}))))
    assert levels(found) == {Level.OK if fine else Level.BAD}
    if not fine:
        assert f"{variable}={value}, and a has only lo, eth0" in only(found).found


def test_gloo_would_listen_on_a_loopback() -> None:
    pair = [fact(0, host_address="127.0.1.1"), fact(1, "b", host_address="10.0.0.2")]
    assert (
        "a resolves its own name to 127.0.1.1"
        in only(network.check_settings(situation(*pair))).found
    )
    told = [replace(f, environment={"GLOO_SOCKET_IFNAME": "eth0"}) for f in pair]
    assert levels(network.check_settings(situation(*told))) == {Level.OK}


def test_settings_that_differ_or_waste_the_fabric() -> None:
    pair = [fact(0, environment={"NCCL_DEBUG": "INFO"}), fact(1)]
    found = only(network.check_settings(situation(*pair)), Level.WARN).found
    assert found == "NCCL_DEBUG differs: INFO on rank 0, (unset) on rank 1"
    fabric = {"gpu": gpu(), "infiniband": ["mlx5_0 ACTIVE"]}
    off = fact(environment={"NCCL_IB_DISABLE": "1"}, **fabric)
    assert "mlx5_0" in only(network.check_settings(situation(off)), Level.WARN).found
    locked = situation(fact(locked_memory=65536, **fabric))
    assert "65.5 kB" in only(network.check_settings(locked), Level.WARN).found
    docker = [fact(r, gpu=gpu(r), shared_memory=64 * 2**20) for r in range(2)]
    assert "67.1 MB" in only(network.check_settings(situation(*docker)), Level.WARN).found


def test_bandwidth_tells_what_a_step_costs() -> None:
    # Four ranks: an all-reduce of 64 MiB in 0.1 s moves 1.5 x 64 MiB a link: about 1 GB/s.
    reductions = [Reduction(2**20, 0.01), Reduction(2**26, 0.1)]
    assert reductions[1].rate(4) == pytest.approx(1.5 * 2**26 / 0.1)
    facts = [fact(rank) for rank in range(4)]
    found = only(network.check_bandwidth(seven(*facts, stage=0, reductions=reductions)), Level.OK)
    assert "1 MiB in 10.0 ms, 64 MiB in 100.0 ms: 1.0 GB/s over each link" in found.found
    # 1.5 x 4 bytes x 6.74 B = 40.4 GB.
    assert "gradients of a step: 40.4 GB, 40.2 s" in found.found
    slow = seven(*facts, reductions=[Reduction(2**26, 0.2)], backend="nccl")
    assert "NCCL_SOCKET_IFNAME" in only(network.check_bandwidth(slow), Level.WARN).cure


def test_links_between_hosts() -> None:
    pair = [fact(0), fact(1, "b")]
    broken = [BrokenLink(1, 0, "10.0.0.1:4711", "timed out")]
    assert only(network.check_links(situation(*pair, links=broken))).found == (
        "rank 1 (b) cannot connect to rank 0 (a) at 10.0.0.1:4711: timed out"
    )
    assert levels(network.check_links(situation(*pair, links=[]))) == {Level.OK}


def test_clocks() -> None:
    # The fastest exchange decides: its middle against the answer, half of it as uncertainty.
    clock = clock_from([(100.0, 90.0, 104.0), (110.0, 98.0, 110.2)])
    assert (clock.ahead, clock.uncertainty) == (pytest.approx(12.1), pytest.approx(0.1))
    pair = [fact(0), fact(1, "b")]
    found = only(network.check_clocks(situation(*pair, clocks={1: clock})), Level.WARN)
    assert "the clock of rank 1 (b) is 12.1 s ahead of that of rank 0" in found.found
    unsure = {1: Clock(-1.5, 0.6)}
    assert levels(network.check_clocks(situation(*pair, clocks=unsure))) == {Level.OK}
    behind = {1: Clock(-1.5, 0.4)}
    assert (
        "1.5 s behind"
        in only(network.check_clocks(situation(*pair, clocks=behind)), Level.WARN).found
    )


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert network.free_port(port).level == Level.WARN
    assert network.free_port(port).level == Level.OK


# --- folder and disk ------------------------------------------------------------------------------


def test_the_run_folder() -> None:
    pair = [fact(0, folder="/runs/x"), fact(1, "b", folder="/runs/x")]

    def found(**fields: Any) -> Finding:
        (finding,) = ranks.check_folder(situation(*pair, folder=FolderProbe("/runs/x", **fields)))
        return finding

    assert found().found == "/runs/x: writable, the same folder on all ranks"
    local = found(unseen=(1,))
    assert (local.level, "not the same folder on rank 1 (b)" in local.found) == (Level.BAD, True)
    assert found(problem="Permission denied").level == Level.BAD
    assert "rank 1 (b) cannot write" in found(unwritable=((1, "Read-only file system"),)).found


def test_disk_space_against_what_a_run_writes() -> None:
    section = recipe(checkpoint_every=5)
    need = estimate.disk_space(section, SEVEN_B)
    # fp32 masters and two moments; fp32 weights of both trainings; fp16 exports.
    assert need.checkpoint == 12 * PARAMETERS
    assert need.weights == 2 * 4 * PARAMETERS
    assert need.kept == 5 * need.checkpoint + need.weights + need.exports
    assert 2 * 2 * PARAMETERS * 0.93 < need.exports < 2 * 2 * PARAMETERS
    for free, level in (
        (need.least - 1, Level.BAD),
        (need.least, Level.WARN),
        (need.kept - 1, Level.WARN),
        (need.kept, Level.OK),
    ):
        s = seven(fact(disk=free), recipe=section)
        assert levels(ranks.check_disk(s)) == {level}
    assert "80.9 GB" in only(ranks.check_disk(seven(fact(disk=1)))).found


def test_traffic_of_a_step() -> None:
    shape = LlamaShape(100, 8, 16, 2, 2, 2, None, 64)
    size = llama_parameters(shape)
    section = recipe(batch_size=8).train  # two forwards on each of four ranks, bf16
    traffic = {z: estimate.step_traffic(shape, section, z, 4) for z in ZERO_STAGES}
    assert traffic[0] == estimate.Traffic(int(1.5 * 4 * size), 0)
    assert traffic[1] == estimate.Traffic(int(0.75 * 4 * size), int(0.75 * 2 * size))
    assert traffic[2] == estimate.Traffic(int(0.75 * 4 * size * 2), int(0.75 * 2 * size))
    assert traffic[3] == estimate.Traffic(int(0.75 * 4 * size * 2), int(0.75 * 2 * 4 * size))


# --- what a rank reads ----------------------------------------------------------------------------


def test_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 2000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n"
    )
    assert memory(tmp_path) == (900 * 1024, 2000 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert memory(tmp_path) == (900 * 1024, 2000 * 1024)
    (group / "memory.max").write_text("1000\n")
    assert memory(tmp_path) == (995, 1000)


def test_infiniband_ports(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    assert infiniband(tmp_path) == ["mlx5_0 ACTIVE"]


def test_locks_that_nobody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    assert find_locks() == []
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert find_locks() == [], "this process is building"
        os.utime(lock, (time.time() - 1000,) * 2)
        release_own()
        assert not lock.exists()
        assert child.wait(10) == -signal.SIGTERM, "the build ends with it"
    finally:
        os.close(descriptor)
        child.kill()
    lock.touch()
    release_own()
    ((path, age),) = find_locks()
    assert (path, age < 60) == (str(lock), True)
    old, young = (fact(locks=[(path, seconds)]) for seconds in (901.0, 10.0))
    assert "15 minutes old" in only(ranks.check_builds(seven(old))).found
    assert levels(ranks.check_builds(seven(young))) == {Level.WARN}
    assert levels(ranks.check_builds(situation(old))) == {Level.WARN}


def test_what_hangs_is_left_behind() -> None:
    start = time.monotonic()
    with pytest.raises(TooLate):
        limited(lambda: time.sleep(5), 0.05)
    assert time.monotonic() - start < 2
    with pytest.raises(ValueError, match="own"):
        limited(lambda: int("own"), 5)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.1)
    assert not (tmp_path / "a").exists()


# --- ranks as threads on one store ----------------------------------------------------------------


class Shared(Channel):
    """A channel on a store in memory."""

    def __init__(self, rank: int, world: int, store: dist.Store, patience: float = 10.0) -> None:
        self.rank, self.world, self.patience, self._store = rank, world, patience, store


def on_threads(world: int, work: Any) -> list[Any]:
    store, results = dist.HashStore(), [None] * world

    def one(rank: int) -> None:
        results[rank] = work(Shared(rank, world, store))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_a_shared_folder_is_shared_and_left_clean(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    probe, *others = on_threads(3, lambda channel: probe_folder(channel, folder))
    assert probe == FolderProbe(str(folder))
    assert others == [None, None]
    assert list(tmp_path.iterdir()) == [], "the parents that it made are gone too"
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    on_threads(2, lambda channel: probe_folder(channel, folder))
    assert [p.name for p in folder.iterdir()] == ["mine"]


def test_node_local_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.doctor.probes.VISIBLE_SECONDS", 0.3)
    (tmp_path / "1").mkdir()
    probe, *_ = on_threads(
        3, lambda channel: probe_folder(channel, tmp_path / str(channel.rank % 2))
    )
    assert probe.unseen == (1,)
    assert list((tmp_path / "1").iterdir()) == []
    assert not (tmp_path / "0").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    probe, _ = on_threads(2, lambda channel: probe_folder(channel, tmp_path / "file" / "x"))
    assert probe.problem == "Not a directory"


def test_clocks_of_other_hosts_are_measured() -> None:
    skew = {0: 0.0, 2: -5.0}
    clocks, *_ = on_threads(
        3, lambda c: probe_clocks(c, [2], lambda: time.time() + skew.get(c.rank, 0.0))
    )
    assert list(clocks) == [2]
    assert clocks[2].ahead == pytest.approx(-5.0, abs=0.5)
    assert clocks[2].uncertainty < 0.5


def test_links_are_tried_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert on_threads(4, lambda channel: probe_links(channel, [0, 1, 3])) == [[], [], [], []]
    connect = socket.create_connection

    def firewall(address: Any, timeout: float) -> socket.socket:
        if threading.current_thread() is closed[0]:
            raise TimeoutError("timed out")
        return connect(address, timeout)

    closed: list[Any] = []
    monkeypatch.setattr("socket.create_connection", firewall)

    def work(channel: Channel) -> Any:
        if channel.rank == 1:
            closed.append(threading.current_thread())
        while not closed:
            time.sleep(0.01)
        return probe_links(channel, [0, 1, 2])

    broken, *_ = on_threads(3, work)
    assert [(b.source, b.target, b.reason) for b in broken] == [
        (1, 0, "timed out"),
        (1, 2, "timed out"),
    ]


def test_who_is_silent_does_not_block() -> None:
    store = dist.HashStore()
    channel = Shared(0, 3, store, patience=0.5)
    Shared(2, 3, store).put("key/2", "here")
    start = time.monotonic()
    assert channel.gather("key", "me") == {0: "me", 2: "here"}
    assert time.monotonic() - start < 5
    with pytest.raises(TooLate):
        Shared(1, 3, store, patience=0.2).decide("verdict", lambda: True)


# --- alone, whole ---------------------------------------------------------------------------------


def run_alone(name: str | None, *overrides: str) -> tuple[bool, str]:
    out = io.StringIO()
    verdict = diagnose(name, overrides, console=Console(file=out, width=400))
    return verdict, out.getvalue()


def test_alone_the_demo_may_start(tmp_path: Path) -> None:
    verdict, out = run_alone("demo", f"output_dir={tmp_path / 'x'}")
    assert verdict, out
    assert "go: 0 problems" in out
    assert "a checkpoint takes 22.4 MB" in out  # 12 bytes x 1,869,952
    assert "no GPU here: nothing was checked" in out or torch.cuda.is_available()
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (tmp_path / "stranger").touch()
    verdict, out = run_alone(
        "demo",
        f"output_dir={tmp_path}",
        "model.path=nobody/nothing",
        f"data.train={tmp_path / 'absent.jsonl'}",
    )
    assert not verdict
    assert "no-go: " in out
    for part in (
        "nowhere0",
        "mixed_precision fp16",
        "nobody/nothing",
        "absent.jsonl",
        "no run fol",
    ):
        assert part in out, part
    assert [p.name for p in tmp_path.iterdir()] == ["stranger"]


def test_a_wrong_recipe_is_a_finding_among_others() -> None:
    verdict, out = run_alone("demo", "train.stepz=3")
    assert not verdict
    assert "unknown key train.stepz" in out
    assert "versions" in out


def test_a_train_of_ones_own_is_a_warning_with_the_form_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(inputs.check_working_folder(tmp_path)) == []
    (tmp_path / "train.py").touch()
    found = only(inputs.check_working_folder(tmp_path), Level.WARN)
    assert str(tmp_path / "train.py") in found.found
    assert "--no_python postshare run" in found.cure
    monkeypatch.chdir(tmp_path)
    assert "working folder" in run_alone(None)[1]


def test_what_a_run_warns_about_is_a_finding(tmp_path: Path) -> None:
    changes = ("data.sequence_length=1024", "train.warmup_steps=9999")
    verdict, out = run_alone("demo_postshare", f"output_dir={tmp_path / 'x'}", *changes)
    assert verdict, out
    assert "data.sequence_length 1024 exceeds the 512 positions" in out
    assert "the learning rate never reaches its peak" in out
    assert "2 warnings" in out


def test_a_folder_in_use_is_a_problem(tmp_path: Path) -> None:
    holding = f"""
from pathlib import Path
from train.stages.lock import announce, lock
lock(Path({str(tmp_path)!r}))
announce(Path({str(tmp_path)!r}))
input()
"""
    ask = {"cwd": REPOSITORY, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holding + "#"], **ask) as holder:
        while not (tmp_path / ".lock").is_file() or not (tmp_path / ".lock").stat().st_size:
            assert holder.poll() is None
            time.sleep(0.05)
        verdict, out = run_alone("demo", f"output_dir={tmp_path}")
        holder.communicate("\n")
    assert not verdict
    assert f"is in use by process {holder.pid} on" in out


def test_each_fault_of_a_recipe_is_a_finding_with_its_cure() -> None:
    none, findings = inputs.resolve("demo", ["train.stepz=3", "train.batch_size=0"])
    assert none is None
    assert [(f.topic, f.found, f.cure) for f in findings] == [
        ("recipe", "demo: unknown key train.stepz", "did you mean train.steps?"),
        ("recipe", "demo: train.batch_size is 0", "allowed: a whole number >= 1"),
    ]


def test_data_is_looked_up_without_fetching(tmp_path: Path) -> None:
    from train.recipe.sections.inputs import DataSource

    (tmp_path / "a.jsonl").touch()
    assert inputs.find_data(DataSource(path=str(tmp_path / "a.jsonl"))) == "here"
    assert inputs.find_data(DataSource(path="stdlib")) == "here"
    assert inputs.find_data(DataSource(path="owner/data.v2")) is None
    with pytest.raises(PostshareError, match="does not exist"):
        inputs.find_data(DataSource(path="absent.jsonl"))


def test_a_rank_that_cannot_reach_the_main_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PostshareError, match=f"rank 1 cannot reach 127.0.0.1 port {port}"):
        diagnose(None, patience=1.0)
    assert capsys.readouterr().err.startswith("error: rank 1 cannot reach")


def test_the_main_rank_names_who_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.doctor.diagnosis.READING_EXTRA", 0.0)
    out = io.StringIO()
    start = time.monotonic()
    assert not diagnose(None, patience=1.0, console=Console(file=out, width=400))
    assert time.monotonic() - start < 20
    assert "ranks 1-2 of 3 did not answer" in out.getvalue()


def test_a_process_group_that_hangs_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.doctor.diagnosis.JOIN_EXTRA", 0.0)
    monkeypatch.setattr("train.distributed.engines.start.join", lambda patience: time.sleep(5))

    def visit(channel: Channel) -> tuple[Any, bool]:
        channel.patience = 0.3
        own = _Visit(channel, None, (), None)
        return own._join(), own.stuck

    ((joined, reductions), stuck), ((_, _), other) = on_threads(2, visit)
    assert joined == dict.fromkeys((0, 1), "joining did not end in time")
    assert reductions is None
    assert stuck
    assert other


def test_a_rank_that_fails_to_join_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.doctor.diagnosis.GRACE", 0.0)
    ranks_joining = iter((0, 1))

    def join(patience: Any) -> None:
        if next(ranks_joining) == 0:
            raise RuntimeError("gloo:\n refused")
        time.sleep(20)

    monkeypatch.setattr("train.distributed.engines.start.join", join)
    start = time.monotonic()
    ((joined, _), _), *_ = on_threads(
        2, lambda channel: (_Visit(channel, None, (), None)._join(), None)
    )
    assert time.monotonic() - start < 10
    assert sorted(joined.values()) == ["RuntimeError: gloo: refused", LEFT_WAITING]
    (finding,) = ranks.check_join(situation(fact(0), fact(1), joined=joined))
    assert "gloo: refused" in finding.found


def test_findings_of_several_hosts_say_whose_they_are() -> None:
    missing = from_error("model", PostshareError("it is absent; fetch it"))
    s = situation(fact(0), fact(1, "b"), fact(2, "c"))
    (told,) = merged({0: [], 1: [missing], 2: [missing]}, s)
    assert (told.found, told.cure) == ("ranks 1-2: it is absent", "fetch it")
    out = io.StringIO()
    show([told, Finding(Level.OK, "x", "y")], Console(file=out, width=100))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[-3][:2] == ["NO-GO", "model"], "the worst comes last"
    assert lines[-1] == ["no-go:", "1", "problem,", "0", "warnings"]


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(*arguments: Any, assumed: Assumed) -> bool:
        seen.append((*arguments, assumed))
        return arguments[0] is None

    monkeypatch.setattr("train.doctor.diagnosis.diagnose", fake)
    given = ["doctor", "demo", "seed=1", "--patience", "5", "--chip", "A100", "--mfu", "0.4"]
    for arguments, code in ((["doctor"], 0), (given, 2)):
        with pytest.raises(SystemExit) as caught:
            launched(arguments)
        assert caught.value.code == code
    assert seen == [
        (None, [], 60.0, Assumed()),
        ("demo", ["seed=1"], 5.0, Assumed(None, "A100", 0.4)),
    ]


def test_nothing_of_the_environment_is_read_but_settings() -> None:
    from train.doctor.facts import collect

    os.environ["NCCL_TEST_ONLY"], os.environ["SECRET_TOKEN"] = "1", "hidden"
    try:
        facts = collect(None, None)
    finally:
        del os.environ["NCCL_TEST_ONLY"], os.environ["SECRET_TOKEN"]
    assert facts.environment["NCCL_TEST_ONLY"] == "1"
    assert "hidden" not in str(facts.to_json())
    assert Facts.from_json(facts.to_json()) == facts
    assert facts.ram_total >= facts.ram > 0
