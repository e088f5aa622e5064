"""Versions of what a run depends on: Python, packages, CUDA, the driver, our own sources."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Version by name; what is not there is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if (installed := driver()) is not None:
        found["driver"] = installed
    found["postshare"] = source_hash()
    return found


def source_hash() -> str:
    """Eight digits over postshare's own sources: two checkouts that differ are two versions."""
    import sa_models

    digest = hashlib.blake2b(digest_size=4)
    for package in (Path(__file__).parents[1], Path(sa_models.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def driver() -> str | None:
    """Version of the NVIDIA driver that is loaded."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return None
    words = file.read_text().split()
    return next((w for w in words if w[0].isdigit() and "." in w), "unknown")
