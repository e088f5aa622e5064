"""The run folder: what the stages share, and the checks that come before anything is written."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from sa_models.atomic_files import beside, write_json
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights.config_file import read_config
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import Leaders
from train.common.console import plain_console
from train.common.identity import refuse_other_run
from train.common.progress import note
from train.common.run_files import (
    CHANCE_FILE,
    ISOTROPY_PICTURE,
    MERGED,
    PARETO_PICTURE,
    PLAN_FILE,
    RECIPE_FILE,
    SEARCH_CACHE,
    SEARCH_FILE,
    SIMILARITY_PICTURE,
    SPANS_FILE,
    SUMMARY_FILE,
    TIES_PICTURE,
)
from train.data.blocks import Blocks, prepare_data
from train.distributed.engines import start as engines
from train.distributed.shared_folder import SIGNS, require_shared
from train.models.base_model import base_folder, fresh_config, read_through
from train.models.lora import check_gpu
from train.models.tokenizer import load_tokenizer
from train.planning.check import check_plan
from train.recipe.identity import run_identity
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.warnings import recipe_warnings
from train.stages.inputs import HELD_OUT, INPUTS_FILE, changed, read_stamp, stamp_inputs
from train.stages.lock import LOCK_FILE, announce, lock, unlock
from train.stages.provenance import record_start
from train.tracking.wandb_run import check_wandb, plan_group

if TYPE_CHECKING:
    from transformers import LlamaConfig

T = TypeVar("T")
_PNG = (SIMILARITY_PICTURE, TIES_PICTURE, ISOTROPY_PICTURE, PARETO_PICTURE)
_PICTURES = (*_PNG, *(name.replace(".png", ".svg") for name in _PNG))
PLAN_OUTPUTS = (PLAN_FILE, SPANS_FILE, CHANCE_FILE, SEARCH_FILE, *_PICTURES)
"""What the plan stage may leave in a run folder, but for what a search has measured."""


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
            for line in (*blocks[0].notes, *blocks[1].notes):
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
                else:
                    self.console.print(renderable)

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


# --- claiming the folder --------------------------------------------------------------------------


def begin(
    recipe: Recipe,
    needs_data: bool = True,
    trains: bool = False,
    requires: Callable[[Run], None] | None = None,
) -> Run:
    """Check everything that can be checked without training, then claim and lock the run folder.

    Args:
        needs_data: whether to read (and cache) the data before anything is written.
        trains: whether a training may follow, for which a teacher has to be there.
        requires: called on the main process; raises PostshareError where the folder lacks what
            the command starts from. It may read `base`, not `blocks` or `tokenizer`.

    Raises:
        PostshareError: any of the inputs is wrong, or not what the run began with, or the folder
            belongs to another run or to something else, or another process is at work in it.
            Nothing has been written then.
    """
    logging.disable_progress_bar()  # transformers' own bars would tear ours
    with ExitStack() as on_error:
        current = on_error.enter_context(Run(recipe, engines.start(recipe)))
        _check(current, needs_data, trains, requires)
        on_error.pop_all()
    return current


def _check(
    current: Run, needs_data: bool, trains: bool, requires: Callable[[Run], None] | None
) -> None:
    recipe = current.recipe
    if trains:
        check_gpu(recipe)
    current.on_main(lambda: check_wandb(recipe.wandb))
    current.on_main(current.lock_existing)
    current.on_main(lambda: check_folder(recipe))
    if current.base is not None:
        current.on_main(lambda: check_plan(recipe, WeightsFolder(base_of(current))))
        check_weights(current, base_of(current))
    current.on_main(lambda: _warn(current))
    teacher = find_teacher(current) if trains and recipe.distill is not None else None
    if requires is not None:
        current.on_main(lambda: requires(current))
    if needs_data:
        _ = current.blocks
    require_shared(recipe.folder, current.ranks)
    current.on_main(lambda: claim(current, teacher))


UNCLAIMED = (SEARCH_CACHE, SIGNS, LOCK_FILE, beside(Path(RECIPE_FILE)).name)
"""What may lie in a folder that is no run's yet."""
STARTED = ("run.json", "continued", MERGED, "residual", "heal", "export", SUMMARY_FILE)


def has_started(folder: Path) -> bool:
    """Whether a run folder holds more than a plan."""
    return any((folder / name).exists() for name in STARTED)


def check_folder(recipe: Recipe) -> None:
    """Refuse a folder that holds another run, or something that is no run at all.

    What the search of another run has measured may lie there: every line names what it is of. So
    may what a start leaves that is killed before it has claimed the folder.
    """
    folder, file = recipe.folder, recipe.folder / RECIPE_FILE
    if not file.is_file():
        if folder.exists() and (
            not folder.is_dir()
            or not all(any(map(path.match, UNCLAIMED)) for path in folder.iterdir())
        ):
            raise PostshareError(
                f"{folder} is not empty and is no run folder; choose another output_dir"
            )
    elif has_started(folder):
        refuse_other_run(folder, run_identity(load_recipe(file)), run_identity(recipe))


def claim(current: Run, teacher: Path | None = None) -> None:
    """Lock the folder; write recipe, stamp and start.

    A plan of another recipe, file, base or text, never trained with, is dropped.

    Args:
        teacher: the folder of what a training will learn from.

    Raises:
        PostshareError: another process is at work in the folder, or a run that has begun would go
            on with another base or text.
    """
    folder, file = current.folder, current.folder / RECIPE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    current.lock()
    known = read_stamp(folder)
    blocks = current.blocks if "blocks" in vars(current) else None  # else no text is read
    stamp = stamp_inputs(current.recipe, current.base, teacher, blocks, known)
    exchanged = changed(known, stamp)
    trained = [phrase for key, phrase in exchanged.items() if not key.startswith(HELD_OUT)]
    if has_started(folder):
        if trained:
            raise PostshareError(
                f"{folder} began with other inputs ({'; '.join(trained[:3])}); put them back, "
                "choose another output_dir, or delete the folder to start over"
            )
        for phrase in exchanged.values():
            note(f"note: {phrase}: what is evaluated from here on is of another text")
    announce(folder)
    if file.is_file():
        other = trained or run_identity(load_recipe(file)) != run_identity(current.recipe)
        replaced = _plan_file_changed(current)
        if other or (replaced and not has_started(folder)):
            for stale in PLAN_OUTPUTS:
                (folder / stale).unlink(missing_ok=True)
        elif replaced:
            current.say(
                f"note: {current.recipe.plan.path} has changed since; the run keeps the plan that "
                f"it began with, {folder / PLAN_FILE}"
            )
    current.recipe.save(file)
    write_json(folder / INPUTS_FILE, {**known, **stamp})
    record_start(folder, current.config, current.ranks.world, current.ranks.device)


def _plan_file_changed(current: Run) -> bool:
    """Whether the recipe's plan file is no longer what the run folder has taken from it."""
    section, kept = current.recipe.plan, current.folder / PLAN_FILE
    if section.strategy != "file" or not kept.is_file():
        return False
    return SharingPlan.load(section.path or "") != SharingPlan.load(kept)


def _warn(current: Run) -> None:
    """What the command line could not yet know."""
    said = recipe_warnings(current.recipe)
    positions = current.config.max_position_embeddings
    for line in recipe_warnings(current.recipe, positions=positions):
        if line not in said:
            note(f"warning: {line}")


def check_weights(current: Run, folder: Path) -> None:
    """Refuse weights that are no numbers. A collective: every rank reads its share."""
    ranks = current.ranks
    current.on_all(lambda: read_through(WeightsFolder(folder), ranks.rank, ranks.world))


def find_teacher(current: Run) -> Path:
    """The folder of the teacher, which is fetched if need be; one that cannot teach is refused."""
    from train.training.teacher import check_teacher, teacher_folder

    recipe, config = current.recipe, current.config
    assert recipe.distill is not None
    tokenizer = None if recipe.distill.teacher is None else current.tokenizer
    folder = current.main_first(lambda: teacher_folder(recipe))
    current.on_main(lambda: check_teacher(recipe, folder, config, tokenizer, current.ranks))
    if folder != current.base:
        check_weights(current, folder)
    return folder
