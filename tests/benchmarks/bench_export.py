"""Export of a 2 GB model against copying and hashing as many bytes, and its peak memory.

Run it: ``python tests/benchmarks/bench_export.py``. Needs about 10 GB under TMPDIR.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 200 * 10**6
LAYERS = 18
TIED_RATIO = 0.3
REPEATS = 2


def make_model(folder: Path) -> None:
    """A random bf16 Llama of 2.09 GB (hidden 2048, 18 layers, 32 heads), written shard by shard."""
    import torch
    from transformers import LlamaConfig

    from sa_models.weights.parameter_shapes import llama_shapes
    from sa_models.weights.safetensors_folder import ShardWriter

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    writer = ShardWriter(folder, SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, shape in llama_shapes(config).items():
        writer.add(name, (torch.randn(shape, generator=generator) * 0.02).bfloat16())
    writer.close()


def run_export(source: Path, folder: Path) -> dict[str, Any]:
    """Export once. Seconds, peak resident bytes of this process, and bytes of all files written."""
    bare = resident_peak()
    import random

    import torch

    from sa_models.export.export import export_model
    from sa_models.plan import HeadTie, SharingPlan
    from sa_models.weights.safetensors_folder import WeightsFolder

    weights = WeightsFolder(source)
    imported = resident_peak()
    units = [(layer, unit) for layer in range(1, LAYERS) for unit in range(32)]
    targets = random.Random(0).sample(units, int(TIED_RATIO * LAYERS * 32))
    free = [(0, unit) for unit in range(32)] + [u for u in units if u not in set(targets)]
    rng = random.Random(1)
    ties = [
        HeadTie(target, rng.choice([u for u in free if u[0] < target[0]]), ("q", "k", "v"))
        for target in targets
    ]
    os.sync()  # earlier writes are nobody's account
    start = time.perf_counter()
    result = export_model(
        weights,
        SharingPlan(tuple(ties)),
        folder,
        dtype=torch.bfloat16,
        shard_bytes=SHARD_BYTES,
    )
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_above_interpreter": resident_peak() - bare,
        "peak_above_imports": resident_peak() - imported,
        "bytes": sum(result.bytes.values()),
    }


def resident_peak() -> int:
    """Peak resident bytes of this process, mapped file pages included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def copy_and_hash(files: list[Path], folder: Path, durable: bool) -> float:
    """Seconds to copy files and hash the copies; durable: flushed to the disk, as export does."""
    folder.mkdir()
    os.sync()
    start = time.perf_counter()
    for i, file in enumerate(files):
        copy = folder / f"{i}"
        shutil.copyfile(file, copy)
        with copy.open("rb") as stream:
            hashlib.file_digest(stream, "sha256").hexdigest()
            if durable:
                os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def measure(repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Export and baseline in turn, ``repeats`` times; ratios are those of the summed seconds.

    Returns:
        relative_speed: seconds of copying, hashing and flushing the exported weight files, over the
        seconds of exporting them (both formats, verified, hashed, flushed). Resident peaks are
        those above a bare interpreter, and above one that has imported torch and transformers.
    """
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_model(root / "source")
        for i in range(repeats):
            command = [sys.executable, __file__, str(root / "source"), str(root / f"export{i}")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            files = sorted((root / f"export{i}").rglob("*.safetensors"))
            found["copy_hash_flush_seconds"] = copy_and_hash(files, root / "copy", durable=True)
            found["copy_hash_seconds"] = copy_and_hash(files, root / "copy", durable=False)
            rounds.append(found)
            shutil.rmtree(root / f"export{i}")
    total = {key: sum(found[key] for found in rounds) for key in rounds[0]}
    return {
        "export_2GB": {
            "seconds": total["seconds"] / repeats,
            "seconds_copy_hash_flush": total["copy_hash_flush_seconds"] / repeats,
            "seconds_copy_hash": total["copy_hash_seconds"] / repeats,
            "relative_speed": total["copy_hash_flush_seconds"] / total["seconds"],
            "relative_speed_without_flush": total["copy_hash_seconds"] / total["seconds"],
            "target_relative_speed": 0.5,
            "bytes_written": rounds[0]["bytes"],
            "peak_bytes": max(found["peak_above_interpreter"] for found in rounds),
            "peak_bytes_above_imports": max(found["peak_above_imports"] for found in rounds),
            "target_peak_bytes": 10**9,
        }
    }


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(run_export(Path(sys.argv[1]), Path(sys.argv[2]))))
    else:
        print(json.dumps(measure(), indent=2))
