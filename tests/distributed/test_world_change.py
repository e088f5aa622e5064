"""A training that goes on under other backends and other numbers of processes is the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.resume_worker import SETTING, go_on
from tests.support.launcher import run
from tests.support.training import build

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("resume_worker.py")
CHAIN = [
    ("zero3", 2), ("ddp", 3), ("zero1", 2), ("fsdp2", 3), ("zero2", 3), ("zero3-offload", 2),
    ("zero0", 2), ("cpu", 1),
]  # fmt: skip
SHORT = [("zero3-offload", 2), ("ddp", 3), ("fsdp2", 2)]
"""From shards to whole copies and to shards of another kind, each time on another number."""


@pytest.mark.more
@pytest.mark.parametrize("chain", [SHORT, CHAIN])
def test_a_step_on_each_backend(chain: list[tuple[str, int]], tmp_path: Path) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    for folder in (alone, moved):
        folder.mkdir()
    go_on(alone, len(chain))  # one process, which is this one
    for index, (config, processes) in enumerate(chain):
        output = run(config, WORKER, moved, 1, processes=processes)
        assert ("resuming from" in output) == (index > 0)
        if (config, processes) == ("ddp", 3):
            assert "(written by ZeRO-3, 2 processes; here: DDP, 3 processes)" in output
    rows, expected = (json.loads((f / "rows.json").read_text()) for f in (moved, alone))
    for one, other in zip(rows, expected, strict=True):
        for quantity in ("lm", "penalty", "norm"):
            assert one[quantity] == pytest.approx(other[quantity], rel=1e-4), quantity
    own, reference = (load_file(f / "weights.safetensors") for f in (moved, alone))
    before = dict(build(SETTING)[0].named_parameters())
    assert own.keys() == reference.keys()
    for name, weight in reference.items():
        difference = float((own[name] - weight).norm())
        assert difference <= 1e-4 * float(weight.norm()), name
        # A lost moment or step count would show against how far training has moved the weight.
        assert difference <= 1e-2 * float((weight - before[name].detach()).norm()) + 1e-7, name
