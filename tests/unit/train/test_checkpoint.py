from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import train.checkpoint as checkpoint
import train.outcome as outcome
from sa_models.errors import PostshareError
from train.checkpoint import Checkpoints, Position, incomplete, load_weights, steps_in
from train.loop import train
from train.optimizer import build_optimizer


class OneProcess:
    """What checkpoints use of an engine."""

    backend, stage, world, is_main = "plain", 0, 1, True

    def __init__(self, model: torch.nn.Module, recipe: Any) -> None:
        self.optimizer = build_optimizer(model, recipe.train, 1e-3, torch.device("cpu"))

    def reduce_max(self, value: float) -> float:
        return value

    def barrier(self) -> None:
        pass


class Sharded(OneProcess):
    backend, stage, world = "deepspeed", 3, 2

    def save_state(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "rank0.pt").write_bytes(b"state")

    def load_state(self, folder: Path) -> None:
        self.loaded = (folder / "rank0.pt").read_bytes()


def make(folder: Path, kind: type[OneProcess] = OneProcess, **fields: Any) -> Checkpoints:
    """A model with a moved optimizer, and its checkpoints."""
    model = tiny.model()
    engine = kind(model, tiny.recipe(folder))
    for _ in range(2):
        ids = torch.arange(2 * tiny.LENGTH).view(2, -1) % tiny.VOCABULARY
        model(ids, labels=ids).loss.backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    said: list[str] = []
    values: dict[str, Any] = {"identity": {"seed": 0}, "keep": 2, "say": said.append, **fields}
    made = Checkpoints(folder, engine, model, **values)  # type: ignore[arg-type]
    made.said = said  # type: ignore[attr-defined]
    return made


def position(step: int) -> Position:
    return Position(step, 8 * step, 120 * step, 1.5, "abc")


def state_of(made: Checkpoints) -> dict[str, torch.Tensor]:
    tensors = checkpoint.optimizer_tensors(made.model, made.engine.optimizer)
    return {**tensors, **dict(made.model.named_parameters())}


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    made = make(tmp_path)
    folder = made.save(position(3))
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    other = make(tmp_path)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    other.engine.optimizer.state.clear()
    assert other.resume() == position(3)
    mine, theirs = state_of(made), state_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "model.norm.weight.exp_avg_sq" in mine


def test_frozen_parameters_and_a_fresh_optimizer(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.engine.optimizer.state.pop(made.model.model.norm.weight)
    made.save(position(1))
    assert "model.norm.weight" in load_file(tmp_path / "step-000001/model.safetensors")
    assert make(tmp_path).resume().step == 1


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    made = make(tmp_path)
    for step in (2, 4, 6, 10):
        made.save(position(step))
    assert steps_in(tmp_path) == [6, 10]
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no readable manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda f: flip_a_byte(f / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors is damaged"),
        (lambda f: (f / "state.json").write_text("{}"), "state.json is damaged"),
    ],
)
def test_an_incomplete_checkpoint_is_ignored_and_named(
    tmp_path: Path, harm: Any, reason: str
) -> None:
    made = make(tmp_path)
    made.save(position(2))
    harm(made.save(position(4)))
    (tmp_path / "step-000006.tmp").mkdir()
    other = make(tmp_path)
    assert other.resume().step == 2
    removed, ignored, resumed = other.said  # type: ignore[attr-defined]
    assert removed.startswith("removed")
    assert ignored.startswith(f"ignored {tmp_path / 'step-000004'}: ")
    assert reason in ignored
    assert resumed == f"resuming from {tmp_path / 'step-000002'}"
    other.save(position(4))  # takes the place of the damaged one
    assert incomplete(tmp_path / "step-000004") is None


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert make(tmp_path / "absent").resume() == Position()


def test_another_identity_is_refused(tmp_path: Path) -> None:
    make(tmp_path, identity={"plan": "aa", "train": {"eps": 1e-8}}).save(position(1))
    with pytest.raises(PostshareError, match=r"train.eps was 1e-08, now 1e-06"):
        make(tmp_path, identity={"plan": "aa", "train": {"eps": 1e-6}}).resume()


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path).save(position(1))
    with pytest.raises(PostshareError, match=r"shape \[48, 32\], the model's is \[24, 32\]"):
        load_weights(tiny.model(intermediate_size=24), folder / "model.safetensors")
    with pytest.raises(PostshareError, match=r"differ in lm_head.weight"):
        load_weights(tiny.model(tie_word_embeddings=False), folder / "model.safetensors")


def test_zero_checkpoints_hold_the_engines_files(tmp_path: Path) -> None:
    folder = make(tmp_path, Sharded).save(position(1))
    assert "zero/rank0.pt" in json.loads((folder / "manifest.json").read_text())["files"]
    other = make(tmp_path, Sharded)
    assert other.resume() == position(1)
    assert other.engine.loaded == b"state"  # type: ignore[attr-defined]


def test_zero_state_is_loaded_only_if_its_hash_matches(tmp_path: Path) -> None:
    (make(tmp_path, Sharded).save(position(1)) / "zero/rank0.pt").write_bytes(b"STATE")
    other = make(tmp_path, Sharded)
    assert other.resume() == Position()
    assert not hasattr(other.engine, "loaded")


def test_another_world_or_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, Sharded).save(position(1))
    with pytest.raises(PostshareError, match=r"written by ZeRO-3 and this run uses one process"):
        make(tmp_path).resume()
    monkeypatch.setattr(Sharded, "world", 4)
    with pytest.raises(PostshareError, match=r"written by 2 processes.*this run has 4.*start 2"):
        make(tmp_path, Sharded).resume()


# --- a full disk ----------------------------------------------------------------------------------


def full_disk(*arguments: Any, **options: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def full_disk_of_the_system(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("where", "failure"),
    [("save_file", full_disk), ("write_json", full_disk_of_the_system)],
)
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Any
) -> None:
    made = make(tmp_path)
    made.save(position(2))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, failure)
        with pytest.raises(PostshareError, match=r"No space left.*last good one is .*step-000002"):
            made.save(position(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert make(tmp_path).resume().step == 2


def test_a_full_disk_under_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sharded, folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("inline_container.cc: unexpected pos 576 vs 534")  # of torch.save

    monkeypatch.setattr(Sharded, "save_state", fail)
    with pytest.raises(PostshareError, match=r"could not be written.*free disk space"):
        make(tmp_path, Sharded).save(position(4))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A training on a file system with room for one checkpoint keeps the first and says so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        recipe = tiny.recipe(disk / "run", checkpoint_every=2)
        with pytest.raises(PostshareError, match=r"No space left.*last good one is .*step-000002"):
            train(tiny.job(recipe), recipe)
        folder = recipe.folder / "checkpoints"
        assert [path.name for path in folder.iterdir()] == ["step-000002"]
        assert incomplete(folder / "step-000002") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(outcome.ShardWriter, "close", full_disk)
        with pytest.raises(PostshareError, match=r"weights could not be written.*No space left"):
            train(tiny.job(recipe), recipe)
    assert not list(tmp_path.glob("weights*"))
    assert not (tmp_path / "result.json").exists()
    train(tiny.job(recipe), recipe)
    assert (tmp_path / "weights/model.safetensors").is_file()
    assert [row["step"] for row in tiny.curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
