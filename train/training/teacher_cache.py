"""The teacher's top k, computed once before a training and kept in the run folder.

    folder/teacher/
      teacher.json                  what decides the numbers: weights, precision, k, order ...
      chunk-000012.safetensors      of 32 blocks; see `TopK`
      chunk-000012.json             SHA-256 and bytes of it, SHA-256 of the text; written last

Chunk c holds the blocks that samples 32 c to 32 c + 31 of the first epoch are: the trainings of a
run read the same samples in the same order, so each needs the first chunks, and those that an
earlier one has left, or a run that was killed, are only checked. The teacher is in memory for the
missing ones alone, and not while the student trains. It takes 8 k + 4 bytes for a token.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa_models.atomic_files import new_file, write_json
from sa_models.errors import PostshareError
from sa_models.weights.safetensors_folder import save_tensors
from train.common.files import damage, file_entry, file_hash
from train.common.identity import refuse_other_run
from train.common.progress import bar, note
from train.data.blocks import Blocks, permutation
from train.data.reader import read_batch
from train.distributed.shared_folder import VISIBLE_SECONDS
from train.distributed.watchdog import Watchdog
from train.training.distill_loss import TopK
from train.training.teacher import Teacher, teacher_folder

if TYPE_CHECKING:
    from train.data.packed import Block
    from train.distributed.engines.base import Engine
    from train.recipe.recipe import Recipe

CHUNK = 32
"""Blocks in a file."""
KEYS = ("teacher_ids", "teacher_log_probabilities", "teacher_rest")
"""The entries that a block gets: int32 [length, k], fp32 [length, k], fp32 [length]."""


def taught(entries: dict[str, Tensor]) -> TopK:
    """The entries of a micro-batch, taken out of it, as what the teacher says."""
    return TopK(*(entries.pop(key) for key in KEYS))


class TaughtBlocks(Blocks):
    """The training's blocks, each with what the teacher says about it. Chunks have to be there."""

    def __init__(self, blocks: Blocks, folder: Path, seed: int) -> None:
        self.blocks, self.folder = blocks, folder
        self.length, self.notes = blocks.length, blocks.notes
        self.sample_of = np.argsort(permutation(len(blocks), seed, 0))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        chunk, row = divmod(int(self.sample_of[index]), CHUNK)
        file = _mapped(self.folder / f"chunk-{chunk:06d}.safetensors")
        return self.blocks[index] | {key: file.get_slice(key)[row] for key in KEYS}


@lru_cache(maxsize=64)
def _mapped(path: Path) -> Any:
    return safe_open(path, framework="pt")


class TeacherCache:
    """The chunks of one run. Methods without underscore are collectives."""

    def __init__(self, recipe: Recipe, engine: Engine, blocks: Blocks) -> None:
        self.recipe, self.engine, self.blocks = recipe, engine, blocks
        self.folder = recipe.folder / "teacher"
        self._order = permutation(len(blocks), recipe.seed, 0)

    def fill(self, samples: int) -> TaughtBlocks:
        """Have the teacher's answers for the first `samples` samples of the training.

        Raises:
            PostshareError: the folder holds another teacher's, or cannot be written.
            RankLostError: another rank is gone.
        """
        timeout = self.recipe.train.hang_timeout
        with Watchdog(self.engine.rank, self.engine.world, timeout) as watch:
            watch.note("looking for the teacher's answers", limited=False)
            self._claim()
            chunks = math.ceil(min(samples, len(self.blocks)) / CHUNK)
            missing = self._missing(chunks)
            if missing:
                self._compute(missing, watch)
        _mapped.cache_clear()  # a file may have been replaced
        return TaughtBlocks(self.blocks, self.folder, self.recipe.seed)

    def _claim(self) -> None:
        """The main process compares or writes teacher.json; its error is everybody's."""
        file, problem = self.folder / "teacher.json", None
        if self.engine.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                ours = self._identity()
                if file.is_file():
                    refuse_other_run(self.folder, json.loads(file.read_text("utf-8")), ours)
                write_json(file, ours)
            except (OSError, ValueError, PostshareError) as error:
                problem = error
        self._together(problem)

    def _identity(self) -> dict[str, Any]:
        section = self.recipe.distill
        assert section is not None
        return {
            "version": 1,
            "weights": _content(teacher_folder(self.recipe)),
            "precision": section.precision,
            "top_k": section.top_k,
            "temperature": section.temperature,
            "seed": self.recipe.seed,
            "blocks": len(self.blocks),
            "length": self.blocks.length,
        }

    def _missing(self, chunks: int) -> list[int]:
        """Chunks that are not there whole; the ranks share the hashing."""
        missing = torch.zeros(chunks, device=self.engine.device)
        with bar("checking the teacher's answers", shown=self.engine.is_main) as advance:
            mine = range(self.engine.rank, chunks, self.engine.world)
            for done, chunk in enumerate(mine, start=1):
                problem = self._problem(chunk)
                missing[chunk] = float(problem is not None)
                if problem:
                    note(f"{self._file(chunk)} {problem}: it is computed again")
                advance(done, len(mine))
        return self.engine.reduce_sum(missing).nonzero().flatten().tolist()

    def _problem(self, chunk: int) -> str | None:
        """Why a chunk cannot be used; empty where it was never finished, None where it can."""
        file = self._file(chunk)
        try:
            entry = json.loads(file.with_suffix(".json").read_text("utf-8"))
            if entry["tokens"] != self._text(chunk):
                return "is about another text"
            return damage(file, entry)
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError):
            return "has an entry that cannot be read"

    def _compute(self, missing: Sequence[int], watch: Watchdog) -> None:
        """Each rank a chunk at a time; all as often, as a sharded teacher is asked by all ranks."""
        watch.note("loading the teacher", limited=False)
        teacher = Teacher(self.recipe, self.engine)
        world, problem = self.engine.world, None
        rounds = math.ceil(len(missing) / world)
        with bar("asking the teacher", shown=self.engine.is_main) as advance:
            for number in range(rounds):
                watch.note("asking the teacher", number + 1)
                at = number * world + self.engine.rank
                answers = self._ask(teacher, missing[min(at, len(missing) - 1)], watch)
                if at < len(missing) and problem is None:
                    try:
                        self._write(missing[at], answers)
                    except (OSError, SafetensorError) as error:
                        problem = error
                advance(number + 1, rounds)
        del teacher
        gc.collect()
        self.engine.accelerator.free_memory()
        watch.note("waiting for all answers")
        self._together(problem)
        self._together(self._unseen(missing))

    def _unseen(self, written: Sequence[int]) -> OSError | None:
        """What another rank has written and this one does not see, NFS's patience given."""
        end = time.monotonic() + VISIBLE_SECONDS
        for file in map(self._file, written):
            while not file.exists():
                if time.monotonic() > end:
                    return FileNotFoundError(f"{file} cannot be seen by rank {self.engine.rank}")
                time.sleep(0.2)
        return None

    def _ask(self, teacher: Teacher, chunk: int, watch: Watchdog) -> dict[str, Tensor]:
        indices, size, parts = self._indices(chunk), self.recipe.train.micro_batch_size, []
        # The same number of forwards for each chunk: the last one may have fewer blocks.
        for start in range(0, CHUNK, size):
            watch.note("asking the teacher")
            rows = indices[start : start + size] or indices[:1]
            batch = read_batch(self.blocks, rows, self.engine.device)
            batch.pop("labels")
            with teacher(batch) as lesson:
                top = lesson.distribution
            assert isinstance(top, TopK)
            if start < len(indices):
                parts.append([part.cpu() for part in (top.ids, top.log_probabilities, top.rest)])
        columns = zip(*parts, strict=True)
        return {key: torch.cat(column) for key, column in zip(KEYS, columns, strict=True)}

    def _write(self, chunk: int, answers: dict[str, Tensor]) -> None:
        file = self._file(chunk)
        file.with_suffix(".json").unlink(missing_ok=True)
        with new_file(file) as beside:
            save_tensors(answers, beside)
        write_json(file.with_suffix(".json"), file_entry(file) | {"tokens": self._text(chunk)})

    def _file(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.safetensors"

    def _indices(self, chunk: int) -> list[int]:
        return self._order[chunk * CHUNK : (chunk + 1) * CHUNK].tolist()

    def _text(self, chunk: int) -> str:
        """SHA-256 of all that the teacher reads of a chunk."""
        digest = hashlib.sha256()
        for index in self._indices(chunk):
            for name, value in sorted(self.blocks[index].items()):
                if name != "labels":
                    digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def _together(self, problem: Exception | None) -> None:
        """One rank's error is everybody's."""
        if not self.engine.reduce_max(float(problem is not None)):
            return
        if isinstance(problem, PostshareError):
            raise problem
        reason = " ".join(str(problem).split()) if problem else "see the other processes"
        raise PostshareError(
            f"the teacher's answers cannot be kept in {self.folder} ({reason}); free disk space "
            "(8 distill.top_k + 4 bytes a token), or set distill.cache=false, then start again"
        ) from problem


@lru_cache(maxsize=4)
def _content(folder: Path) -> str:
    """SHA-256 of a model's config and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()
