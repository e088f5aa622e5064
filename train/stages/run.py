"""The run in its folder: what the stages share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights.config_file import read_config
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import Leaders
from train.common.console import plain_console
from train.common.progress import note
from train.common.run_files import (
    PLAN_FILE,
)
from train.data.blocks import Blocks, prepare_data
from train.distributed.engines import start as engines
from train.models.base_model import base_folder, fresh_config
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import Recipe
from train.stages.lock import LOCK_FILE, lock, unlock
from train.tracking.wandb_run import plan_group

if TYPE_CHECKING:
    from transformers import LlamaConfig

T = TypeVar("T")


@dataclass
class Run:
    """What the stages share: the recipe, the ranks, and inputs that are read when first used."""

    recipe: Recipe
    ranks: engines.Engine
    _unlock: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the run folder back to other processes."""
        if self._unlock is not None:
            self._unlock()

    def lock(self) -> None:
        """Take the run folder for this process until the end of the `with` block, or of the run.

        Raises:
            PostshareError: another process is at work in it.
        """
        if self._unlock is None:
            lock(self.folder)
            self._unlock = weakref.finalize(self, unlock, self.folder)

    def lock_existing(self) -> None:
        """:meth:`lock`, where the folder was locked before: no other has to be made yet."""
        if (self.folder / LOCK_FILE).is_file():
            self.lock()

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def shares(self) -> bool:
        return self.recipe.plans

    @cached_property
    def base(self) -> Path | None:
        """Folder of the base model; None when the model is trained from random weights."""
        if self.recipe.model.config is not None:
            return None
        return self.main_first(lambda: base_folder(self.recipe.model))

    @cached_property
    def config(self) -> LlamaConfig:
        return fresh_config(self.recipe.model) if self.base is None else read_config(self.base)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self.recipe.model.tokenizer or (self.base and str(self.base))
        if name is None:
            raise PostshareError("model.config starts from nothing; set model.tokenizer as well")
        return self.main_first(lambda: load_tokenizer(str(name), self.recipe.model.revision))

    @cached_property
    def blocks(self) -> tuple[Blocks, Blocks]:
        """Training and validation blocks."""
        steps, spans, plan = self.recipe.steps, self.recipe.spans, self.recipe.plan
        measured = spans.calibration_blocks if spans is not None and spans.measures else 1
        measured = max(measured, plan.calibration_blocks if plan.measures else 1)
        merge = self.recipe.materialize
        measured = max(measured, merge.calibration_blocks if self.recipe.may_read_text else 1)
        residual = self.recipe.residual
        if residual is not None and residual.measures:
            measured = max(measured, residual.calibration_blocks)
        needed = None if steps is None else max(measured, steps * self.recipe.train.batch_size)
        tokenizer, vocab_size = self.tokenizer, self.config.vocab_size  # see `on_main`
        blocks = self.main_first(
            lambda: prepare_data(
                self.recipe, tokenizer, needed_blocks=needed, vocab_size=vocab_size
            )
        )
        if self.ranks.is_main:
            length = self.recipe.data.sequence_length
            counts = f"{len(blocks[0]):,} training and {len(blocks[1]):,} validation blocks"
            said = f"data      {counts} of {length} tokens"
            for line in (said, *blocks[0].notes, *blocks[1].notes):
                note(line)
        return blocks

    @cached_property
    def steps(self) -> int:
        section = self.recipe.train
        if section.steps is not None:
            return section.steps
        assert section.epochs is not None
        return math.ceil(section.epochs * len(self.blocks[0]) / section.batch_size)

    @property
    def leaders(self) -> Leaders:
        """How the leader of a kv span begins."""
        return self.recipe.leaders

    @property
    def export_dtype(self) -> torch.dtype:
        """The dtype of the exported weights; with ``base``, that of the base model's q_proj."""
        name = self.recipe.export.dtype
        if name != "base":
            return getattr(torch, name)
        if self.base is None:
            return torch.float32
        return WeightsFolder(self.base).dtype(HeadLayout.parameter_name(0, "q"))

    @property
    def plan(self) -> SharingPlan:
        """The run's plan, from its file."""
        if not self.recipe.plans:
            return SharingPlan()
        plan = SharingPlan.load(self.folder / PLAN_FILE)
        plan.validate(self.config)
        return plan

    @property
    def group(self) -> str:
        """What wandb groups the runs of this recipe with this plan by."""
        return plan_group(self.recipe.name, self.plan, self.config)

    def main_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process, then (from its caches) on the others."""
        done: list[T] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()

    def on_main(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the main process while the others wait; its error is everybody's.

        ``work`` must not be the first to read `base`, `tokenizer` or `blocks`: those wait for all
        ranks themselves, and the others are not there.
        """
        problem = None
        if self.ranks.is_main:
            try:
                work()
            except PostshareError as error:
                problem = str(error)
        if self.ranks.world > 1:
            from accelerate.utils import broadcast_object_list

            problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise PostshareError(problem)

    def on_all(self, work: Callable[[], None]) -> None:
        """Run ``work`` on every rank; the first error is everybody's."""
        problem = None
        try:
            work()
        except PostshareError as error:
            problem = str(error)
        if self.ranks.world > 1:
            from accelerate.utils import gather_object

            problem = next((found for found in gather_object([problem]) if found), None)
        if problem is not None:
            raise PostshareError(problem)

    def say(self, *renderables: Any) -> None:
        if self.ranks.is_main:
            for renderable in renderables:
                if isinstance(renderable, Table):
                    print_whole(self.console, renderable)
                else:  # a path that is wrapped cannot be copied
                    self.console.print(renderable, soft_wrap=True)

    @cached_property
    def console(self) -> Console:
        return plain_console()


def print_whole(console: Console, table: Table) -> None:
    """Print a table; where no cell may be wrapped, no number is cut either: the terminal wraps."""
    width = console.width
    if all(column.no_wrap for column in table.columns):
        unbounded = console.options.update(max_width=10_000)
        width = max(width, Measurement.get(console, unbounded, table).maximum)
    plain_console(file=console.file, width=width).print(table)  # print() never widens


def base_of(current: Run) -> Path:
    if current.base is None:
        raise PostshareError(
            "a model from random weights has no heads worth sharing; train it with "
            "plan.strategy=none first, then share it by model.path"
        )
    return current.base
