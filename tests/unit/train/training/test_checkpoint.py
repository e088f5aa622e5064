from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import train.training.checkpoint as checkpoint
import train.training.training_folder as outcome
from sa_models.errors import PostshareError
from tests.support import tiny
from train.distributed.engines.base import Shard
from train.distributed.engines.ddp import PlainShard
from train.training.checkpoint import Checkpoints, Position, incomplete, steps_in
from train.training.loop import train
from train.training.optimizer import build_optimizer
from train.training.sharded_state import take_snapshot

PART = "part-00000-of-00001.safetensors"


class OneProcess:
    """What checkpoints use of an engine."""

    backend, stage, world, rank, is_main, sharded = "plain", 0, 1, 0, True, False

    def __init__(self, model: torch.nn.Module, recipe: Any) -> None:
        self.optimizer = build_optimizer(model, recipe.train, 1e-3)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def shards(self) -> dict[str, Shard]:
        return {
            name: PlainShard(name, p.shape, 0, p.numel(), p.detach().view(-1), p, self.optimizer)
            for name, p in self.parameters.items()
        }

    def restored(self) -> None:
        pass

    def reduce_max(self, value: float) -> float:
        return value


class Made(Checkpoints):
    said: list[str]

    def write(self, at: Position) -> Path:
        folder = self.save(at)
        self.wait()
        return folder


def make(folder: Path, model: torch.nn.Module | None = None, **fields: Any) -> Made:
    """A model with a moved optimizer, and its checkpoints."""
    model = tiny.model() if model is None else model
    engine = OneProcess(model, tiny.recipe(folder))
    for _ in range(2):
        ids = torch.arange(2 * tiny.LENGTH).view(2, -1) % tiny.VOCABULARY
        model(ids, labels=ids).loss.backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    said: list[str] = []
    values: dict[str, Any] = {"identity": {"seed": 0}, "keep": 2, "say": said.append, **fields}
    made = Made(folder, engine, **values)  # type: ignore[arg-type]
    made.said = said
    return made


def position(step: int, validation_loss: float | None = None) -> Position:
    return Position(step, 8 * step, 120 * step, 1.5, "abc", validation_loss)


def state_of(made: Made) -> dict[str, torch.Tensor]:
    return take_snapshot(made.engine.shards()).tensors


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    made = make(tmp_path)
    folder = made.write(position(3, 2.5))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", PART, "state.json"]
    other = make(tmp_path)
    with torch.no_grad():
        for parameter in other.engine.parameters.values():  # type: ignore[attr-defined]
            parameter.add_(1)
    other.engine.optimizer.state.clear()
    assert other.resume() == position(3, 2.5)
    mine, theirs = state_of(made), state_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "model.norm.weight.exp_avg_sq" in mine


def test_tensors_keep_their_shapes_in_the_file(tmp_path: Path) -> None:
    made = make(tmp_path)
    tensors = load_file(made.write(position(1)) / PART)
    for name, parameter in made.engine.parameters.items():  # type: ignore[attr-defined]
        assert torch.equal(tensors[name], parameter)
        assert tensors[f"{name}.exp_avg"].shape == parameter.shape
        assert tensors[f"{name}.step"] == 2


def test_frozen_parameters_are_left_to_the_base(tmp_path: Path) -> None:
    model = tiny.model()
    model.model.norm.weight.requires_grad_(False)
    folder = make(tmp_path, model).write(position(1))
    assert "model.norm.weight" not in load_file(folder / PART)
    assert "lm_head.weight" not in load_file(folder / PART)  # tied: it has one name
    with pytest.raises(PostshareError, match=r"differ in model.norm.weight: only one of them"):
        make(tmp_path).resume()


def test_a_fresh_optimizer(tmp_path: Path) -> None:
    made = make(tmp_path)
    norm = made.engine.parameters["model.norm.weight"]  # type: ignore[attr-defined]
    made.engine.optimizer.state.pop(norm)
    made.write(position(1))
    other = make(tmp_path)
    assert other.resume().step == 1
    parameter = other.engine.parameters["model.norm.weight"]  # type: ignore[attr-defined]
    assert parameter not in other.engine.optimizer.state


def test_what_8_bit_adamw_keeps(tmp_path: Path) -> None:
    """Tensors of other sizes, integers: kept with the whole parameter, and as they are."""
    kept = {
        "step": 7,
        "state1": torch.arange(tiny.model().model.norm.weight.numel(), dtype=torch.uint8),
        "absmax1": torch.tensor([3.0, 4.0]),
    }
    made, other = make(tmp_path), make(tmp_path)
    for one, state in ((made, kept), (other, {})):
        norm = one.engine.parameters["model.norm.weight"]  # type: ignore[attr-defined]
        one.engine.optimizer.state[norm] = dict(state)
    made.write(position(1))
    other.resume()
    back = other.engine.optimizer.state[norm]
    assert back["step"] == 7
    assert isinstance(back["step"], int)
    assert torch.equal(back["state1"], kept["state1"])
    assert torch.equal(back["absmax1"], kept["absmax1"])


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    made = make(tmp_path)
    for step in (2, 4, 6, 10):
        made.write(position(step))
    assert steps_in(tmp_path) == [6, 10]
    assert not list(tmp_path.glob("*.old"))


def test_rotation_keeps_the_best_too(tmp_path: Path) -> None:
    made = make(tmp_path, keep=1, keep_best=True)
    for step, loss in ((2, 3.0), (4, 2.5), (6, None), (8, 2.5), (10, 2.75)):
        made.write(position(step, loss))
    assert steps_in(tmp_path) == [4, 10]
    made.write(position(12, 2.25))
    assert steps_in(tmp_path) == [12]
    assert made.best() == 12


# --- while training goes on -----------------------------------------------------------------------


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written while the weights move on, and is in place when it is complete."""
    made = make(tmp_path)
    before = state_of(made)
    go_on = threading.Event()
    write = checkpoint.Snapshot.write

    def slow(self: checkpoint.Snapshot, path: Path) -> None:
        assert go_on.wait(60)
        write(self, path)

    monkeypatch.setattr(checkpoint.Snapshot, "write", slow)
    folder = made.save(position(1))
    for parameter in made.engine.parameters.values():  # type: ignore[attr-defined]
        parameter.data.add_(1)
    made.poll()
    assert not folder.exists()
    assert made.newest is None
    go_on.set()
    made.wait()
    assert made.newest == folder
    other = make(tmp_path)
    other.resume()
    after = state_of(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_that_is_never_waited_for_is_not_there(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.write(position(1))
    made.save(position(2))
    made.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002.tmp"]
    other = make(tmp_path)
    assert other.resume().step == 1
    assert not (tmp_path / "step-000002.tmp").exists()


# --- damage ---------------------------------------------------------------------------------------


def older_format(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"version": 1, "files": {}}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no readable manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda f: (f / PART).unlink(), f"{PART} is missing"),
        (lambda f: flip_a_byte(f / PART), f"{PART} is damaged"),
        (lambda f: os.truncate(f / PART, 100), f"{PART} is damaged"),
        (lambda f: (f / "state.json").write_text("{}"), "state.json is damaged"),
        (lambda f: [p.unlink() for p in f.iterdir()], "no readable manifest"),
        (older_format, "it has format 1"),
    ],
)
def test_an_incomplete_checkpoint_is_ignored_and_named(
    tmp_path: Path, harm: Any, reason: str
) -> None:
    made = make(tmp_path)
    made.write(position(2))
    harm(made.write(position(4)))
    (tmp_path / "step-000006.tmp").mkdir()
    other = make(tmp_path)
    assert other.resume().step == 2
    removed, ignored, resumed = other.said
    assert removed.startswith("removed")
    assert ignored.startswith(f"ignored {tmp_path / 'step-000004'}: ")
    assert reason in ignored
    assert resumed == f"resuming from {tmp_path / 'step-000002'}"
    other.write(position(4))  # takes the place of the damaged one
    assert incomplete(tmp_path / "step-000004") is None


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert make(tmp_path / "absent").resume() == Position()
    (tmp_path / "step-000002.tmp").mkdir()  # killed before its first checkpoint was complete
    assert make(tmp_path).resume() == Position()


def test_a_training_never_starts_over_unasked(tmp_path: Path) -> None:
    made = make(tmp_path)
    for step in (2, 4):
        flip_a_byte(made.write(position(step)) / PART)
    with pytest.raises(PostshareError, match=r"holds 2 checkpoint.* none can be used"):
        make(tmp_path).resume()


def test_another_identity_is_refused(tmp_path: Path) -> None:
    make(tmp_path, identity={"plan": "aa", "train": {"eps": 1e-8}}).write(position(1))
    with pytest.raises(PostshareError, match=r"train.eps was 1e-08, now 1e-06"):
        make(tmp_path, identity={"plan": "aa", "train": {"eps": 1e-6}}).resume()


def test_another_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path).write(position(1))
    with pytest.raises(PostshareError, match=r"gate_proj.weight has 1536 elements.* has 768"):
        make(tmp_path, tiny.model(intermediate_size=24)).resume()
    with pytest.raises(PostshareError, match=r"differ in lm_head.weight"):
        make(tmp_path, tiny.model(tie_word_embeddings=False)).resume()


# --- a full disk ----------------------------------------------------------------------------------


def full_disk(*arguments: Any, **options: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def full_disk_of_the_system(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("where", "failure"),
    [("Snapshot.write", full_disk), ("write_json", full_disk_of_the_system)],
)
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Any
) -> None:
    made = make(tmp_path)
    made.write(position(2))
    with monkeypatch.context() as patch:
        patch.setattr(f"train.training.checkpoint.{where}", failure)
        made.save(position(4))
        with pytest.raises(PostshareError, match=r"No space left.*last good one is .*step-000002"):
            made.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert make(tmp_path).resume().step == 2


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
