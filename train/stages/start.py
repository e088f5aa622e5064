"""The start of a run: what is checked before anything is written, and the folder that it claims."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transformers.utils import logging

from sa_models.atomic_files import beside, write_json
from sa_models.errors import PostshareError
from sa_models.export.gguf.form import gguf_form, kind_of
from sa_models.plan import SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.identity import refuse_other_run
from train.common.progress import note
from train.common.run_files import (
    ALTERNATIVES_FILE,
    BLOCKS_FILE,
    CHANCE_FILE,
    DIRECTSHARE_FILE,
    ISOTROPY_PICTURE,
    MERGED,
    PARETO_PICTURE,
    PLAN_FILE,
    RECIPE_FILE,
    SEARCH_CACHE,
    SEARCH_FILE,
    SEARCH_PAGE,
    SIMILARITY_PICTURE,
    SPANS_FILE,
    SUMMARY_FILE,
    TIES_PICTURE,
)
from train.distributed.engines import start as engines
from train.distributed.shared_folder import SIGNS, require_shared
from train.models.base_model import read_through
from train.models.liger import check_kernels
from train.models.lora import check_gpu
from train.planning.check import check_plan
from train.recipe.identity import compared, run_identity
from train.recipe.precision import with_precisions_of
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.warnings import recipe_warnings
from train.stages.inputs import HELD_OUT, INPUTS_FILE, changed, read_stamp, stamp_inputs
from train.stages.lock import LOCK_FILE, announce
from train.stages.precision import settle_precision
from train.stages.provenance import record_start
from train.stages.run import Run, base_of
from train.tracking.wandb_run import check_wandb
from train.training.optimizer import check_optimizer

_PNG = (SIMILARITY_PICTURE, TIES_PICTURE, ISOTROPY_PICTURE, PARETO_PICTURE)
_PICTURES = (*_PNG, *(name.replace(".png", ".svg") for name in _PNG))
PLAN_OUTPUTS = (
    PLAN_FILE,
    SPANS_FILE,
    CHANCE_FILE,
    SEARCH_FILE,
    SEARCH_PAGE,
    DIRECTSHARE_FILE,
    ALTERNATIVES_FILE,
    *_PICTURES,
)
"""What the plan stage may leave in a run folder, but for what a search has measured."""


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
        on_gpu = current.ranks.device.type == "cuda"
        check_gpu(recipe, on_gpu)
        check_kernels(recipe, on_gpu)
        check_optimizer(recipe.train, on_gpu)
    current.on_main(lambda: check_wandb(recipe.wandb))
    current.on_main(current.lock_existing)
    current.on_main(lambda: check_folder(recipe))
    settle_precision(current, trains, lambda: begun_recipe(current.folder))
    recipe = current.recipe
    if current.base is not None:
        current.on_main(lambda: check_plan(recipe, WeightsFolder(base_of(current))))
        check_weights(current, base_of(current))
    if needs_data and "gguf" in recipe.export.formats:
        _ = current.config, current.tokenizer  # which every rank waits for
        current.on_main(lambda: check_gguf(current))
    current.on_main(lambda: _warn(current))
    teacher = find_teacher(current) if trains and recipe.distill is not None else None
    if requires is not None:
        current.on_main(lambda: requires(current))
    if needs_data:
        _ = current.blocks
    require_shared(recipe.folder, current.ranks)
    current.on_main(lambda: claim(current, teacher))


UNCLAIMED = (SEARCH_CACHE, BLOCKS_FILE, SIGNS, LOCK_FILE, beside(Path(RECIPE_FILE)).name)
"""What may lie in a folder that is no run's yet."""
STARTED = ("run.json", "continued", MERGED, "residual", "heal", "export", SUMMARY_FILE)


def has_started(folder: Path) -> bool:
    """Whether a run folder holds more than a plan."""
    return any((folder / name).exists() for name in STARTED)


def begun_recipe(folder: Path) -> Recipe | None:
    """The resolved recipe of a run that holds more than a plan."""
    file = folder / RECIPE_FILE
    return load_recipe(file) if file.is_file() and has_started(folder) else None


def check_folder(recipe: Recipe) -> None:
    """Refuse a folder that holds another run, or something that is no run at all.

    What another run has measured, of a search or of models, may lie there: every entry names what
    it is of. So may what a start leaves that is killed before it has claimed the folder.
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
    elif (theirs := begun_recipe(folder)) is not None:
        ours = with_precisions_of(recipe, theirs)  # what `auto` was then, it stays
        refuse_other_run(folder, *compared(theirs, ours))


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
        if not known:
            note(
                f"note: {folder} was begun by an earlier version, which kept no stamp of base and "
                "text: they are taken as they are now"
            )
        for phrase in exchanged.values():
            note(f"note: {phrase}: what is evaluated from here on is of another text")
    announce(folder)
    if file.is_file():
        # A plan that was found before the hardware was known is kept.
        earlier = with_precisions_of(load_recipe(file), current.recipe)
        ours = with_precisions_of(current.recipe, earlier)
        other = trained or run_identity(earlier) != run_identity(ours)
        replaced = _plan_file_changed(current)
        if other or (replaced and not has_started(folder)):
            for stale in PLAN_OUTPUTS:
                if not _is_given(current.recipe, folder / stale):
                    (folder / stale).unlink(missing_ok=True)
        elif replaced:
            current.say(
                f"note: {current.recipe.plan.path} has changed since; the run keeps the plan that "
                f"it began with, {folder / PLAN_FILE}"
            )
    current.recipe.save(file)
    write_json(folder / INPUTS_FILE, {**known, **stamp})
    record_start(folder, current.config, current.ranks.world, current.ranks.device)


def _is_given(recipe: Recipe, file: Path) -> bool:
    """Whether the recipe takes its plan from this file."""
    section = recipe.plan
    return section.strategy == "file" and Path(section.path or "").resolve() == file.resolve()


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


def check_gguf(current: Run) -> None:
    """Refuse a model or a tokenizer that GGUF cannot express, and a machine that cannot write it.

    Raises:
        PostshareError: see :func:`~sa_models.export.gguf.form.gguf_form`.
    """
    kind = current.recipe.export.gguf or kind_of(current.export_dtype)
    gguf_form(current.config, SharingPlan(), kind, current.tokenizer, origin=current.base)


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
