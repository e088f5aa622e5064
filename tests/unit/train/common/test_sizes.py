"""Sizes and counts as they are printed."""

from __future__ import annotations

from train.common.sizes import byte_unit, count, size


def test_sizes_read_well() -> None:
    numbers = (12, 34_000, 5_600_000, 13_476_831_232)
    assert [size(n) for n in numbers] == ["12 B", "34.0 kB", "5.6 MB", "13.5 GB"]
    assert [size(n, ".3g") for n in (*numbers[:3], 3_512_345)] == [
        "12 B",
        "34 kB",
        "5.6 MB",
        "3.51 MB",
    ]
    assert [byte_unit(n) for n in (999, 10**6, 10**9)] == [("B", 1), ("MB", 1e6), ("GB", 1e9)]
    assert count(1_235_814_400) == "1,235,814,400 (1.24 B)"
