"""The provenance of a run: each start's command, versions and machine, and the base's shape.

Kept in the run folder, because nothing else there says it afterwards.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from train.common.run_files import PROVENANCE_FILE
from train.common.versions import versions

SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Fields of a LlamaConfig that a plan's picture needs, when nothing has been exported yet."""


def record_start(folder: Path, config: Any, processes: int, device: torch.device) -> None:
    """Add this start to ``provenance.json`` of a run folder.

    Args:
        config: of the base model.
        processes: of all machines together.
        device: of this process.

    Raises:
        PostshareError: the file of an earlier start cannot be read.
    """
    file = folder / PROVENANCE_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"starts": []}
        starts = list(known["starts"])
    except (ValueError, KeyError, TypeError) as error:
        raise PostshareError(
            f"{file} is no list of starts ({type(error).__name__}); delete it"
        ) from None
    start = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "processes": processes,
        "device": _device(device),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
    shape = {name: getattr(config, name, None) for name in SHAPE}
    write_json(file, {"base": shape, "starts": [*starts, start]})


def command(arguments: list[str]) -> str:
    """What was typed, from ``sys.argv``: `postshare run ...`, or `python -m train ...`."""
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
    return " ".join([name, *map(shlex.quote, arguments[1:])])


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
