"""`postshare pack` and `unpack`: a residual's adapter in few bits, and a PEFT adapter again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sa_models.atomic_files import new_folder
from sa_models.errors import PostshareError
from sa_models.export.packed_adapter import PACKED_FILE, pack, unpack
from sa_models.export.peft_adapter import ADAPTER_WEIGHTS, Pairs, load_adapter, save_adapter
from sa_models.weights.companion_files import copy_terms


def pack_folder(adapter: Path, output: Path, size: str) -> str:
    """Pack an adapter into a folder that is not there yet; a line that says what came of it.

    Args:
        size: bytes of the file at most: a number, or a percentage of the adapter's.

    Raises:
        PostshareError: a size that is none or too small; an adapter or a folder that will not do.
    """
    pairs = load_adapter(adapter, "give the folder of one, such as RUN/export/adapter")
    whole = (adapter / ADAPTER_WEIGHTS).stat().st_size
    budget = _bytes(size, whole)
    _write(adapter, output, lambda folder: pack(pairs, folder, budget))
    taken = (output / PACKED_FILE).stat().st_size
    return (
        f"packed    {output / PACKED_FILE}: {taken:,} bytes, {taken / whole:.1%} of the adapter's; "
        f"{_lost(pairs, unpack(output)):.2%} of its squared norm is lost"
    )


def unpack_folder(packed: Path, output: Path) -> str:
    """Write a packed adapter as PEFT reads it, fp32, into a folder that is not there yet.

    Raises:
        PostshareError: the packed adapter cannot be read, or the folder is there.
    """
    pairs = unpack(packed)
    _write(packed, output, lambda folder: save_adapter(folder, pairs))
    return f"unpacked  {output}: a PEFT adapter of {len(pairs)} projections"


def _bytes(size: str, whole: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", size)
    if not match or float(match[1]) <= 0 or (not match[2] and "." in size):
        raise PostshareError(f"--bytes {size!r} is no size; write for example 60000 or 25%")
    return int(float(match[1]) * whole / 100) if match[2] else int(size)


def _write(source: Path, output: Path, work: Callable[[Path], object]) -> None:
    """Make the folder; the licence files of the source go with what is made of it."""
    if output.exists():
        raise PostshareError(f"{output} is there already; name a folder that is not")
    try:
        with new_folder(output) as folder:
            work(folder)
            copy_terms(source, None, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise PostshareError(
            f"{output} cannot be written ({reason}); choose another folder"
        ) from error


def _lost(before: Pairs, after: Pairs) -> float:
    lost = whole = 0.0
    for where, pair in before.items():
        product = pair.product()
        stored = after[where].product() if where in after else 0 * product
        lost += float((product - stored).square().sum())
        whole += float(product.square().sum())
    return lost / whole if whole else 0.0
