from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sa_models.errors import PostshareError
from train.distributed.engines.base import Shard
from train.training.sharded_state import restore, take_snapshot

SHAPES = {"matrix": (5, 7), "cube": (3, 2, 4), "row": (11,), "one": (1,), "none": (0, 4)}
WORLDS = (1, 2, 3, 5, 40)


@dataclass
class Range(Shard):
    """A range in memory."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def read_state(self) -> dict[str, torch.Tensor]:
        return self.state

    def restore(self, values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        self.values.copy_(values)
        self.state = {key: value.clone() for key, value in state.items()}


def whole() -> dict[str, dict[str, torch.Tensor]]:
    """By parameter: its values and optimizer state, flat; one was never updated."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        numel = torch.Size(shape).numel()
        result[name] = {"": torch.randn(numel, generator=generator)}
        if name != "row":
            result[name] |= {
                "exp_avg": torch.randn(numel, generator=generator),
                "exp_avg_sq": torch.rand(numel, generator=generator),
                "step": torch.tensor(3.0 + index),
            }
    return result


def ranges(rank: int, world: int, full: bool) -> dict[str, Range]:
    """What a rank of a sharded backend holds: ceil(numel / world) elements, the last ones fewer."""
    shards = {}
    for name, tensors in whole().items():
        numel = tensors[""].numel()
        size = -(-numel // world)
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        cut = {k: t[start:stop].clone() if t.dim() else t.clone() for k, t in tensors.items()}
        values = cut.pop("")
        if not full:
            values, cut = torch.full_like(values, torch.nan), {}
        shards[name] = Range(name, torch.Size(SHAPES[name]), start, stop, values, cut)
    return shards


def written(folder: Path, world: int) -> list[Path]:
    files = []
    for rank in range(world):
        files.append(folder / f"{rank}.safetensors")
        take_snapshot(ranges(rank, world, full=True)).write(files[-1])
    return files


@pytest.mark.parametrize("writers", WORLDS)
@pytest.mark.parametrize("readers", WORLDS)
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path: Path, writers: int, readers: int
) -> None:
    files = written(tmp_path, writers)
    for rank in range(readers):
        mine, expected = ranges(rank, readers, full=False), ranges(rank, readers, full=True)
        restore(mine, files)
        for name, shard in mine.items():
            if shard.start == shard.stop:
                continue
            assert torch.equal(shard.values, expected[name].values), name
            assert shard.state.keys() == expected[name].state.keys(), name
            for key, value in shard.state.items():
                assert torch.equal(value, expected[name].state[key]), (name, key)


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    files = written(tmp_path, 3)
    with pytest.raises(PostshareError, match=r"no file holds elements 12 to 24 of matrix"):
        restore(ranges(0, 1, full=False) | {"matrix": _some("matrix", 0, 24)}, [files[0], files[2]])


def _some(name: str, start: int, stop: int) -> Range:
    return Range(name, torch.Size(SHAPES[name]), start, stop, torch.zeros(stop - start))


def test_what_belongs_to_a_whole_parameter_is_not_split(tmp_path: Path) -> None:
    shards = ranges(0, 1, full=True)
    shards["matrix"].state["absmax1"] = torch.ones(2)
    path = tmp_path / "0.safetensors"
    take_snapshot(shards).write(path)
    again = ranges(0, 1, full=False)
    restore(again, [path])
    assert torch.equal(again["matrix"].state["absmax1"], torch.ones(2))
    with pytest.raises(PostshareError, match=r"matrix.absmax1 belongs to a whole parameter"):
        restore(ranges(0, 2, full=False), [path])


def test_a_tensor_that_is_not_its_range(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    entry = '{"row": {"start": 0, "stop": 11, "of": 11, "state": []}}'
    save_file({"row": torch.ones(10)}, path, metadata={"ranges": entry})
    with pytest.raises(PostshareError, match="row has another size than its range"):
        restore({"row": _some("row", 0, 11)}, [path])
