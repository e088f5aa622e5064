"""Short runs as users start them: every engine and option against one process on the CPU; resume.

The model is the shipped one. Every run has the same global batch, so that its losses are those of
the CPU, up to the rounding of another device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.gpu.rows import Machine, Refused, Row, Values, within
from tests.support import REPOSITORY, tiny
from tests.support.interruption import at_step, stop
from train.common.signals import TrainingStopped
from train.tracking.metrics_log import read_rows
from train.training import loop

STEPS, BATCH, MICRO = 4, 16, 2
MOST = BATCH // MICRO
"""Processes that divide the batch."""
Curve = list[dict[str, Any]]


def recipe(machine: Machine) -> Path:
    """The recipe of every run, and its text: pages of docs/."""
    text = machine.folder / "text.txt"
    if not text.is_file():
        pages = sorted((REPOSITORY / "docs").glob("*.md"))[:12]
        text.write_text("\n\n".join(page.read_text(encoding="utf-8") for page in pages))
    file = machine.folder / "recipe.yaml"
    values = {
        "name": "gpu",
        "model": {"path": "demo-base"},
        "data": {"train": str(text), "validation_fraction": 0.1, "sequence_length": 64},
        "plan": {"budget": {"ratio": 0.3}},
        "train": {
            "steps": STEPS, "batch_size": BATCH, "micro_batch_size": MICRO, "learning_rate": 1e-3,
            "warmup_steps": 1,
        },
        "export": {"formats": ["compact"]},
        "evaluate": {"continued": False, "blocks": 4, "batch_size": 4},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def run(
    machine: Machine, name: str, *overrides: str, launch: str | None = None, on_cpu: bool = False
) -> Curve:
    """The metrics of a run, in a folder of this name.

    Args:
        launch: of launch/accelerate/, on as many processes as there are GPUs; None: one process.

    Raises:
        Refused: an error that postshare says itself.
        RuntimeError: it failed otherwise; with the last line of its output.
    """
    folder = machine.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m"]
    if launch is not None:
        config = REPOSITORY / "launch" / "accelerate" / f"{launch}.yaml"
        command += ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command += ["--main_process_port", "0"]
        command += ["--num_processes", str(min(max(machine.gpus, 1), MOST)), "-m"]
    command += ["train", str(recipe(machine)), f"output_dir={folder}", *overrides]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    if on_cpu or machine.is_toy:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command,
        cwd=machine.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout, flush=True)  # into the log
        if said := re.search(r"^error: (.*)", done.stdout, re.MULTILINE):
            raise Refused(said[1])
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1]}")
    return read_rows(folder / "metrics.jsonl")


def reference(machine: Machine) -> Curve:
    """Of one process on the CPU; computed once."""
    file = machine.folder / "reference.json"
    if not file.is_file():
        file.write_text(json.dumps(run(machine, "reference", on_cpu=True)), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def farthest(curve: Curve, expected: Curve, *names: str) -> float:
    """The largest relative difference of any step."""
    assert len(curve) == len(expected) == STEPS
    return max(
        abs(one[name] - other[name]) / abs(other[name])
        for one, other in zip(curve, expected, strict=True)
        for name in names
    )


def like_the_cpu(
    name: str, tolerance: float, overrides: tuple[str, ...], launch: str | None, machine: Machine
) -> Values:
    """Loss and penalty of every step."""
    expected = reference(machine)
    curve = run(machine, name, *overrides, launch=launch)
    return within(farthest(curve, expected, "lm_loss", "penalty"), tolerance)


def four_bits(machine: Machine) -> Values:
    """LoRA on a base in nf4: the first loss is near that of the base, and it falls."""
    only = ("plan={strategy: none}", "export.formats=[dense]", "train.precision=bf16")
    curve = run(machine, "nf4", "lora={rank: 8, base: nf4}", "train.learning_rate=1e-2", *only)
    first, last = curve[0]["lm_loss"], curve[-1]["lm_loss"]
    assert last < first, f"the loss does not fall: {first:.4f}, {last:.4f}"
    expected = reference(machine)[0]["lm_loss"]
    return within(abs(first - expected) / expected, 0.1)


def teacher(machine: Machine) -> Values:
    """A teacher in 8 bits: the student, which begins as its fp32 original, is near it."""
    curve = run(machine, "int8", "distill={precision: int8}")
    return within(curve[0]["distill_loss"], 0.05, "divergence at the start, nats")


def resume(machine: Machine) -> Values:
    """Stopped by a signal in its fourth step and started again: bitwise the run that never was."""
    whole, stopped = machine.folder / "whole", machine.folder / "stopped"
    for folder in (whole, stopped):
        shutil.rmtree(folder, ignore_errors=True)

    def job(folder: Path) -> tuple[Any, Any]:
        of = tiny.recipe(folder)
        return tiny.job(of, model=tiny.model(attn_implementation="eager")), of

    torch.use_deterministic_algorithms(True, warn_only=True)
    loop.train(*job(whole))
    try:
        with at_step(4, partial(stop, signal.SIGTERM)):
            loop.train(*job(stopped))
    except TrainingStopped:
        pass
    else:
        raise AssertionError("the signal did not stop the training")
    loop.train(*job(stopped))
    tiny.assert_same_run(whole, stopped)
    return within(0.0, 0.0)


def vllm(machine: Machine) -> Values:
    """The compact export of the plain run in vLLM, as `compare_vllm.py` compares it."""
    run(machine, "served")
    folder = machine.folder / "runs" / "served" / "export" / "compact"
    script = REPOSITORY / "tests" / "benchmarks" / "compare_vllm.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = re.search(r"within (\S+), greedy tokens equal: (\w+)", done.stdout)
    assert said is not None, "the comparison printed no result"
    assert said[2] == "True", "greedy tokens differ from those of transformers"
    return within(float(said[1]), 1e-3, "log probabilities")


def trained(
    name: str,
    tolerance: float,
    *overrides: str,
    launch: str | None = None,
    needs: tuple[str, ...] = (),
    seconds: float = 60,
) -> Row:
    """A row of :func:`like_the_cpu`."""
    measure = partial(like_the_cpu, name.replace(" ", "-"), tolerance, overrides, launch)
    return Row(f"train {name}", measure, seconds, needs)


ROWS = (
    trained("plain", 1e-4, seconds=120),  # with the reference
    Row("resume", resume, 60),
    trained("bf16", 0.02, "train.precision=bf16"),
    trained("ddp", 1e-4, launch="ddp", needs=("2 gpus",)),
    *(
        trained(f"zero{stage}", 1e-4, launch=f"zero{stage}", needs=("deepspeed",), seconds=120)
        for stage in (1, 2, 3)
    ),
    trained("zero3-offload", 1e-4, launch="zero3-offload", needs=("deepspeed",), seconds=180),
    trained("fsdp2", 1e-4, launch="fsdp2"),
    *(
        trained(f"checkpointing {mode}", 1e-4, f"train.gradient_checkpointing={mode}")
        for mode in ("true", "selective", "2")
    ),
    trained("compile", 1e-4, "train.compile=true", seconds=180),
    trained("liger", 1e-4, "train.kernels=liger", needs=("gpu", "liger_kernel"), seconds=120),
    trained("8-bit AdamW", 0.01, "train.optimizer=adamw_8bit", needs=("gpu", "bitsandbytes")),
    Row("train nf4 LoRA", four_bits, 60, ("gpu", "bitsandbytes")),
    Row("train 8-bit teacher", teacher, 60, ("gpu", "bitsandbytes")),
)
SERVED = (Row("vLLM", vllm, 240, ("vllm",)),)
