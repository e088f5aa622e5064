"""Checkpoints: written beside and renamed, hashed, found again, refused when they do not belong.

    folder/checkpoints/step-000123/
      state.json              position, what the run is, backend and world size
      model.safetensors       every parameter, fp32                      (one process and DDP)
      optimizer.safetensors   `<parameter name>.<state key>`: exp_avg, exp_avg_sq, step
      zero/                   DeepSpeed's own files instead of the two   (ZeRO)
      manifest.json           SHA-256 and bytes of every file; written last

A checkpoint belongs to one identity (recipe and plan, as far as they decide the numbers). Random
state is not stored: the loop seeds every step from (seed, step, rank). Nor is the data loader's or
the schedule's: both are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sa_models.errors import PostshareError
from sa_models.manifest import flush

if TYPE_CHECKING:
    from train.engine import Engine

VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a training stands: optimizer steps done, predicted tokens, seconds, the wandb run."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wandb_run_id: str | None = None


class Checkpoints:
    """The checkpoints of one training. Every method is a collective: all ranks call it.

    Args:
        folder: `.../checkpoints`, on a file system that all ranks see.
        model: the unwrapped model that `engine` trains.
        identity: JSON-ready mapping of all that decides the numbers; see `describe_difference`.
        keep: newest checkpoints to keep.
        say: prints one line (on the main process).
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        model: nn.Module,
        identity: dict[str, Any],
        keep: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.engine, self.model = folder, engine, model
        self.identity, self.keep, self.say = identity, keep, say
        self.newest: Path | None = None

    # --- writing ------------------------------------------------------------------------------

    def save(self, position: Position) -> Path:
        """Write a checkpoint, rename it into place, drop the oldest.

        Raises:
            PostshareError: it could not be written (a full disk, say). Nothing half written stays
                and the previous checkpoints are untouched.
        """
        final = self.folder / f"step-{position.step:06d}"
        beside = final.with_name(final.name + ".tmp")
        if self.engine.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        self._on_main(beside, lambda: beside.mkdir(parents=True))
        if self.engine.backend == "deepspeed":
            self._save_sharded(beside / "zero")
        else:
            self._on_main(beside, lambda: self._save_plain(beside))
        self._on_main(beside, lambda: self._finish(beside, final, position))
        self.newest = final
        return final

    def _save_plain(self, folder: Path) -> None:
        weights = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters()}
        save_file(weights, folder / MODEL)
        save_file(optimizer_tensors(self.model, self.engine.optimizer), folder / OPTIMIZER)

    def _save_sharded(self, folder: Path) -> None:
        try:
            self.engine.save_state(folder)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            # No collective here: the other ranks may be anywhere in DeepSpeed's own.
            shutil.rmtree(folder.parent, ignore_errors=True)
            raise self._not_written(error) from error
        self.engine.barrier()

    def _finish(self, beside: Path, final: Path, position: Position) -> None:
        state = {
            "version": VERSION,
            **asdict(position),
            "identity": self.identity,
            "identity_hash": identity_hash(self.identity),
            "backend": self.engine.backend,
            "stage": self.engine.stage,
            "world": self.engine.world,
        }
        write_json(beside / STATE, state)
        write_json(beside / MANIFEST, {"version": VERSION, "files": hash_files(beside)})
        rename_into_place(beside, final)
        complete = [step for step in steps_in(self.folder) if step <= position.step]
        for step in complete[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{step:06d}")

    def _on_main(self, beside: Path, write: Callable[[], None]) -> None:
        """Write on the main process; where that fails, all ranks raise."""
        error: Exception | None = None
        if self.engine.is_main:
            try:
                write()
            except (OSError, SafetensorError) as caught:
                error = caught
                shutil.rmtree(beside, ignore_errors=True)
        if self.engine.reduce_max(float(error is not None)):
            raise self._not_written(error) from error

    def _not_written(self, error: Exception | None) -> PostshareError:
        reason = " ".join(str(error).split()) if error else "see the main process"
        last = f"the last good one is {self.newest}" if self.newest else "there is none yet"
        return PostshareError(
            f"the checkpoint could not be written to {self.folder} ({reason}); free disk space or "
            f"lower train.keep_checkpoints, then start again: {last}"
        )

    # --- reading ------------------------------------------------------------------------------

    def resume(self) -> Position:
        """Load the newest complete checkpoint into model and optimizer; without one, step 0.

        Says which one it took, and which it ignored and why. Leftovers of a killed write go.

        Raises:
            PostshareError: the newest complete checkpoint belongs to another recipe or plan, or
                its backend cannot be continued by this one.
        """
        chosen = -1.0
        if self.engine.is_main:
            for leftover in self.folder.glob("step-*.tmp"):
                self.say(f"removed {leftover}: it was never finished")
                shutil.rmtree(leftover)
            chosen = float(self._newest_complete())
        step = int(self.engine.reduce_max(chosen))
        if step < 0:
            return Position()
        folder = self.folder / f"step-{step:06d}"
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._check_belongs(folder, state)
        if self.engine.backend == "deepspeed":
            self.engine.load_state(folder / "zero")
        else:
            load_weights(self.model, folder / MODEL)
            load_optimizer(self.model, self.engine.optimizer, folder / OPTIMIZER)
        self.newest = folder
        if self.engine.is_main:
            self.say(f"resuming from {folder}")
        return Position(**{key: state[key] for key in asdict(Position())})

    def _newest_complete(self) -> int:
        for step in reversed(steps_in(self.folder)):
            folder = self.folder / f"step-{step:06d}"
            reason = incomplete(folder)
            if reason is None:
                return step
            self.say(f"ignored {folder}: {reason}")
        return -1

    def _check_belongs(self, folder: Path, state: dict[str, Any]) -> None:
        refuse_other_run(folder, state["identity"], self.identity)
        written = backend_name(state["backend"], state["stage"])
        here = backend_name(self.engine.backend, self.engine.stage)
        if written != here:
            raise PostshareError(
                f"{folder} was written by {written} and this run uses {here}; "
                "start with the launch file that wrote it, or choose another output_dir"
            )
        if self.engine.backend == "deepspeed" and state["world"] != self.engine.world:
            raise PostshareError(
                f"{folder} was written by {state['world']} processes under {written}, and this run "
                f"has {self.engine.world}: each file holds one process's partition, and converting "
                f"them is not supported; start {state['world']} processes"
            )


# --- identity -------------------------------------------------------------------------------------


def identity_hash(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_other_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises PostshareError, naming what differs, when `folder` holds a run of another identity."""
    theirs = json.loads(json.dumps(theirs))
    ours = json.loads(json.dumps(ours))  # tuples become lists, as in the file
    differing = _differences(theirs, ours)
    if differing:
        raise PostshareError(
            f"{folder} holds another run ({'; '.join(differing[:3])}); choose another output_dir, "
            "or delete the folder to start over"
        )


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        found = []
        for key in keys:
            found += _differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if theirs == ours else [f"{path} was {theirs!r}, now {ours!r}"]


def backend_name(backend: str, stage: int) -> str:
    return f"ZeRO-{stage}" if backend == "deepspeed" else "one process or DDP"


# --- tensors --------------------------------------------------------------------------------------


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as CPU tensors named `<parameter name>.<state key>`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            # AdamW's `step` is a tensor, that of bitsandbytes a number.
            tensors[f"{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Inverse of :func:`optimizer_tensors`; hyperparameters stay those of `optimizer`."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in load_file(path).items():
        name, key = full_name.rsplit(".", 1)
        saved.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    if unknown := set(saved) - set(ordered):
        raise PostshareError(
            f"{path} holds optimizer state of {sorted(unknown)[0]}, which this run does not train; "
            "restore train.trainable, or choose another output_dir"
        )
    state = {index: saved[name] for index, name in enumerate(ordered) if name in saved}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Copy every parameter from a safetensors file. Raises PostshareError unless names agree."""
    saved = load_file(path)
    parameters = dict(model.named_parameters())
    if different := set(saved) ^ set(parameters):
        raise PostshareError(
            f"{path} and the model differ in {sorted(different)[0]}; choose another output_dir"
        )
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            raise PostshareError(
                f"{path}: {name} has shape {list(saved[name].shape)}, the model's is "
                f"{list(parameter.shape)}; choose another output_dir"
            )
        parameter.copy_(saved[name])


# --- files ----------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """The steps of the folders named as checkpoints, ascending; complete or not."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def incomplete(folder: Path) -> str | None:
    """Why a checkpoint cannot be used: None when every file is there with its hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
            return f"{name} is damaged (its hash differs from the manifest)"
    return None


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {"sha256", "bytes"}} of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": file_hash(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    }


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def rename_into_place(beside: Path, final: Path) -> None:
    """Flush a folder to disk and give it its name, replacing a folder that has it."""
    for path in (*beside.rglob("*"), beside):
        flush(path)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(beside, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
