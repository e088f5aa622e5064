"""Checkpoints: written beside while training goes on, hashed, renamed into place, found again.

    folder/checkpoints/step-000123/
      part-00000-of-00002.safetensors   what one process held (train/training/sharded_state.py)
      state.json                        position, what the run is, who wrote it
      manifest.json                     SHA-256 and bytes of every file; written last

A checkpoint belongs to one identity (recipe and plan, as far as they decide the numbers), not to a
backend or a number of processes. Frozen parameters are not in it: they are those of the model that
the training loads. Nor is random state, as the loop seeds every step from (seed, step, rank); nor
the data loader's or the schedule's: both are functions of the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sa_models.atomic_files import beside, flush, rename_into_place, write_json
from sa_models.errors import PostshareError
from train.common.files import damage, file_entry
from train.common.identity import identity_hash, refuse_other_run
from train.training.sharded_state import Snapshot, restore, take_snapshot

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine

VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"
PART = "part-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a training stands.

    Attributes:
        step: optimizer steps done; `samples`, predicted `tokens` and `seconds` likewise.
        validation_loss: nats per token after this very step, where it was measured.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wandb_run_id: str | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is not in place yet; `part` is this rank's share of the work."""

    position: Position
    folder: Path
    final: Path
    part: Future[None]


class Checkpoints:
    """The checkpoints of one training. Every method but `close` is a collective.

    Args:
        folder: `.../checkpoints`, on a file system that all ranks see.
        identity: JSON-ready mapping of all that decides the numbers.
        keep: newest checkpoints to keep.
        keep_best: also keep the one with the lowest validation loss.
        say: prints one line.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        identity: dict[str, Any],
        keep: int,
        keep_best: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.engine, self.identity = folder, engine, identity
        self.keep, self.keep_best, self.say = keep, keep_best, say
        self.newest: Path | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None

    # --- writing ------------------------------------------------------------------------------

    def save(self, position: Position) -> Path:
        """Begin a checkpoint of this moment: copy the state, let a thread write it.

        `poll` or `wait` puts it in place. One that is still being written is waited for.

        Returns:
            the folder that it will be.
        Raises:
            PostshareError: this one or the one before could not be written (a full disk, say).
                Nothing half written stays and the checkpoints in place are untouched.
        """
        self.wait()
        final = self.folder / f"step-{position.step:06d}"
        folder = beside(final)
        self._together(folder, lambda: self._clear(folder), main=True)
        self._together(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
        writer = self.engine.sharded or self.engine.is_main  # else every rank has the same
        snapshot = take_snapshot(self.engine.shards()) if writer else None
        part = self._thread.submit(self._write_part, folder, snapshot)
        self._writing = _Writing(position, folder, final, part)
        return final

    def poll(self) -> None:
        """Put the checkpoint that is being written in place, if every rank has written its part.

        Raises:
            PostshareError: as `save`.
        """
        if self._writing is None:
            return
        if not self.engine.reduce_max(float(not self._writing.part.done())):
            self.wait()

    def wait(self) -> None:
        """Put the checkpoint that is being written in place, once every rank has written its part.

        Raises:
            PostshareError: as `save`.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self._together(writing.folder, writing.part.result)
        self._together(writing.folder, lambda: self._finish(writing), main=True)
        self.newest = writing.final

    def close(self) -> None:
        """End the thread. A checkpoint that was not waited for is not finished."""
        self._thread.shutdown()

    def _clear(self, folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder)

    def _write_part(self, folder: Path, snapshot: Snapshot | None) -> None:
        if snapshot is None:
            return
        rank, world = (self.engine.rank, self.engine.world) if self.engine.sharded else (0, 1)
        path = folder / PART.format(rank, world)
        snapshot.write(path)
        flush(path)
        write_json(path.with_suffix(".json"), file_entry(path))

    def _finish(self, writing: _Writing) -> None:
        folder = writing.folder
        state = {
            "version": VERSION,
            **asdict(writing.position),
            "identity": self.identity,
            "identity_hash": identity_hash(self.identity),
            "written_by": self._written_by(),
        }
        write_json(folder / STATE, state)
        files = {STATE: file_entry(folder / STATE)}
        for part in range(self.engine.world if self.engine.sharded else 1):
            path = folder / PART.format(part, self.engine.world if self.engine.sharded else 1)
            entry = path.with_suffix(".json")
            files[path.name] = json.loads(entry.read_text(encoding="utf-8"))
            entry.unlink()
        write_json(folder / MANIFEST, {"version": VERSION, "files": files})
        rename_into_place(folder, writing.final)
        self._rotate(writing.position.step)

    def _rotate(self, newest: int) -> None:
        complete = [step for step in steps_in(self.folder) if step <= newest]
        kept = set(complete[-self.keep :])
        if self.keep_best and (best := self.best()) is not None:
            kept.add(best)
        for step in complete:
            if step not in kept:
                shutil.rmtree(self.folder / f"step-{step:06d}")

    def best(self) -> int | None:
        """The step of the checkpoint with the lowest validation loss; None when none has one."""
        losses = {}
        for step in steps_in(self.folder):
            try:
                state = json.loads((self.folder / f"step-{step:06d}" / STATE).read_text("utf-8"))
            except (OSError, ValueError):
                continue  # `resume` names what is damaged
            if state.get("validation_loss") is not None:
                losses[step] = state["validation_loss"]
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def _written_by(self) -> str:
        engine = self.engine
        kind = {"plain": "DDP" if engine.world > 1 else "one process", "fsdp": "FSDP2"}
        name = kind.get(engine.backend, f"ZeRO-{engine.stage}")
        return name if engine.world == 1 else f"{name}, {engine.world} processes"

    def _together(self, folder: Path, work: Callable[[], None], main: bool = False) -> None:
        """Do a part of the writing, on the main process only or on all; one's error is all's."""
        error: Exception | None = None
        if self.engine.is_main or not main:
            try:
                work()
            except (OSError, SafetensorError) as caught:
                error = caught
        failed = int(self.engine.reduce_max(float(self.engine.rank if error else -1)))
        if failed < 0:
            return
        if self.engine.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        reason = " ".join(str(error).split()) if error else f"see rank {failed}"
        if error and not self.engine.is_main:
            self.say(f"rank {self.engine.rank}: {reason}")
        last = f"the last good one is {self.newest}" if self.newest else "there is none yet"
        raise PostshareError(
            f"the checkpoint could not be written to {self.folder} ({reason}); free disk space or "
            f"lower train.keep_checkpoints, then start again: {last}"
        ) from error

    # --- reading ------------------------------------------------------------------------------

    def resume(self) -> Position:
        """Load the newest complete checkpoint into model and optimizer; without one, step 0.

        Says which one it took, and which it ignored and why. Leftovers of a killed write go.

        Raises:
            PostshareError: the newest complete checkpoint belongs to another recipe or plan; there
                are checkpoints and none is complete, so that training would start over unasked.
        """
        steps: list[int] = []
        ignored = 0
        if self.engine.is_main:
            for leftover in self.folder.glob("step-*.tmp"):
                self.say(f"removed {leftover}: it was never finished")
                shutil.rmtree(leftover)
            steps = steps_in(self.folder)
        while (step := int(self.engine.reduce_max(float(steps.pop() if steps else -1)))) >= 0:
            folder = self.folder / f"step-{step:06d}"
            if self._complete(folder):
                return self._load(folder)
            ignored += 1
        if ignored:
            raise PostshareError(
                f"{self.folder} holds {ignored} checkpoint(s) and none can be used (see above); "
                "restore the files, or delete the folder to start over from step 0"
            )
        return Position()

    def _complete(self, folder: Path) -> bool:
        """Whether every file is there with its hash; the ranks share the hashing."""
        reason = incomplete(folder, self.engine.rank, self.engine.world)
        speaker = int(self.engine.reduce_max(float(self.engine.rank if reason else -1)))
        if speaker == self.engine.rank:
            self.say(f"ignored {folder}: {reason}")
        return speaker < 0

    def _load(self, folder: Path) -> Position:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        refuse_other_run(folder, state["identity"], self.identity)
        problem: Exception | None = None
        try:
            restore(self.engine.shards(), sorted(folder.glob("part-*.safetensors")))
        except (OSError, SafetensorError, PostshareError) as caught:
            problem = caught
        if self.engine.reduce_max(float(problem is not None)):
            if isinstance(problem, PostshareError):
                raise problem
            reason = " ".join(str(problem).split()) if problem else "see the other processes"
            raise PostshareError(
                f"{folder} cannot be read ({reason}); delete it to start from an earlier one"
            ) from problem
        self.engine.restored()
        self.newest = folder
        if self.engine.is_main:
            here, there = self._written_by(), state["written_by"]
            by = "" if here == there else f" (written by {there}; here: {here})"
            self.say(f"resuming from {folder}{by}")
        return Position(**{key: state[key] for key in asdict(Position())})


# --- files ----------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """The steps of the folders named as checkpoints, ascending; complete or not."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def incomplete(folder: Path, rank: int = 0, world: int = 1) -> str | None:
    """Why a checkpoint cannot be used: None when every file is there with its hash.

    Args:
        rank, world: look at every `world`-th file only, from `rank` on.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    if version != VERSION:
        return f"it has format {version}, this postshare reads {VERSION}"
    for name in sorted(files)[rank::world]:
        if problem := damage(folder / name, files[name]):
            return f"{name} {problem}"
    return None
