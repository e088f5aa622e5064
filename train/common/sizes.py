"""Sizes in words: bytes in decimal units, as disks count them, and large numbers."""

from __future__ import annotations


def byte_unit(number: float) -> tuple[str, float]:
    """The unit that a size is stated in, and its bytes: GB, MB, kB or B."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return unit, factor
    return "B", 1.0


def size(number: float, form: str = ",.1f") -> str:
    """Bytes as `3.5 MB`.

    Args:
        form: of the number, where it is one of kB or more.
    """
    unit, factor = byte_unit(number)
    return f"{number / factor:{'.0f' if factor == 1 else form}} {unit}"


def count(number: int) -> str:
    """`6,738,415,616` as `6,738,415,616 (6.74 B)`."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number:,} ({number / factor:.3g} {unit})"
    return f"{number:,}"
