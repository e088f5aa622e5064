from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.distributed import bf16
from train.distributed.bf16 import bf16_factor, has_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 vaes", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
        ("model name\t: bf16", False),
    ],
    ids=["avx512", "amx", "avx512-without", "arm", "arm-without", "a-name"],
)
def test_a_cpu_has_what_its_flags_say(line: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert has_bf16(CPU, tmp_path / "cpuinfo") is has


def test_what_cannot_be_told_has_none(tmp_path: Path) -> None:
    assert not has_bf16(CPU, tmp_path / "none")
    assert not has_bf16(torch.device("meta"))


def test_the_factor_is_the_quotient_of_the_shortest_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 takes 2 ms and bf16 30; every other time three times that, the first included."""
    now, calls = [0.0], [0]
    linear = torch.nn.functional.linear

    def timed(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = linear(tokens, weight)
        now[0] += (0.030 if out.dtype == torch.bfloat16 else 0.002) * (1 if calls[0] % 2 else 3)
        calls[0] += 1
        return out

    monkeypatch.setattr(bf16.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bf16.torch.nn.functional, "linear", timed)
    before = torch.get_rng_state()
    assert bf16_factor.__wrapped__(CPU, 0.2) == pytest.approx(15)
    assert torch.equal(torch.get_rng_state(), before)
