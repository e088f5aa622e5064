"""The stages of a run, top to bottom: plan, post-train, materialize, export, evaluate, report.

Each stage reads files and writes files in the run folder, and one that has finished is skipped on a
second start. Planning, and on what a run has left exporting and evaluating, are commands of their
own. Every rank runs this; what is not training is done by the main process, while the others wait
for its outcome.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export import export as exporting
from sa_models.export.peft_adapter import insert_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.weights.structure import convert
from train.common.progress import bar
from train.common.run_files import (
    CHANCE_FILE,
    PLAN_FILE,
    SEARCH_FILE,
    SPANS_FILE,
    SUMMARY_FILE,
)
from train.distributed.engines import start as engines
from train.models.base_model import load_base, load_model
from train.models.lora import TRAINABLE as ADAPTERS
from train.models.lora import adapt
from train.models.sharded_source import (
    Source,
    base_source,
    compact_source,
    exported_weights,
    factored_source,
)
from train.recipe.recipe import Recipe
from train.recipe.rules import check_structure, unfinished
from train.stages.evaluation import (
    export_formats,
    planned_figures,
    require_exports,
    shipped,
)
from train.stages.materialize import (
    awaits_text,
    materialize_on_text,
    merged_folder,
    report_merged,
    tied,
    trained_folder,
)
from train.stages.outcome import conclude, judge, pictures
from train.stages.plan import make_plan
from train.stages.residual import fit_residual, fitted, residual_of, trainable, with_residual
from train.stages.run import Run, base_of
from train.stages.start import begin, check_weights, find_teacher
from train.stages.timetable import Stage, announce
from train.training.job import TrainJob
from train.training.loop import TrainResult, train

# --- the commands ---------------------------------------------------------------------------------


def run(recipe: Recipe) -> None:
    """The whole pipeline; finished stages are skipped."""
    stages(recipe)
    engines.shutdown()


def stages(recipe: Recipe) -> None:
    """As `run`; other runs may follow in this process. Call `engine.shutdown` after the last."""
    with begin(recipe, trains=True) as current:
        check_length(current)
        every = timetable(current)
        for number, stage in enumerate(every, start=1):
            announce(current, every, number)
            stage.work(current)


def timetable(current: Run) -> list[Stage]:
    """The stages that this recipe has, in their order."""
    recipe, folder = current.recipe, current.folder
    healing, control = recipe.materialize.heal_steps, control_steps(current)
    first = "pretrain" if current.base is None else "post"
    made = recipe.may_read_text or recipe.residual is not None
    every = [
        (recipe.plans, Stage("plan", make_plan)),
        (control > 0, Stage("continued", train_control, control, folder / "continued")),
        (current.steps > 0, Stage(first, post_train, current.steps, folder)),
        (made, Stage("materialize", materialize)),
        (healing > 0, Stage("heal", heal, healing, folder / "heal")),
        (True, Stage("export", write_exports)),
        (recipe.plans, Stage("evaluate", judge, reads=evaluation_reads(current))),
        (True, Stage("report", conclude)),
    ]
    return [stage for wanted, stage in every if wanted]


def evaluation_reads(current: Run) -> float:
    """What the evaluation reads, in optimizer steps; it is done by one process alone, if at all."""
    if not current.recipe.plans:
        return 0.0
    evaluate, trained = current.recipe.evaluate, current.recipe.steps != 0
    models = [True, control_steps(current) > 0, evaluate.directshare, True, trained]
    held_out = len(current.blocks[1])
    blocks = held_out if evaluate.blocks is None else min(evaluate.blocks, held_out)
    steps = sum(models) * blocks / current.recipe.train.batch_size
    return steps * current.ranks.world


def plan(recipe: Recipe) -> None:
    """`postshare plan`: find, print and draw the plan."""
    if not recipe.plans:
        raise PostshareError("plan.strategy is none: there is no plan to find; set plan.strategy")
    measures = recipe.spans is not None and recipe.spans.measures
    with begin(recipe, needs_data=measures or recipe.plan.measures) as current:
        make_plan(current)
        files = [
            name
            for name in (PLAN_FILE, SPANS_FILE, CHANCE_FILE, SEARCH_FILE)
            if (current.folder / name).is_file()
        ]
        current.say(f"files     {current.folder}: {', '.join(files)}", *pictures(current.folder))


def export(recipe: Recipe) -> None:
    """`postshare export`: the exports of a finished training."""
    text = awaits_text(recipe)
    with begin(recipe, needs_data=text, requires=require_trained) as current:
        if text:
            materialize_on_text(current)
        write_exports(current)


def evaluate(recipe: Recipe) -> None:
    """`postshare evaluate`: perplexity of the run's models, its summary, its report."""
    with begin(recipe, requires=require_evaluable) as current:
        judge(current)
        conclude(current)


def prepare(recipe: Recipe) -> None:
    """`postshare prepare`: fetch and cache model, tokenizer and data; nothing is trained."""
    current = Run(recipe, engines.start(recipe))
    if current.base is not None:
        check_weights(current, current.base)
        current.say(f"model     {current.base}")
    if recipe.distill is not None:
        current.say(f"teacher   {find_teacher(current)}")
    _ = current.blocks  # says how many there are
    current.say("ready: with HF_HUB_OFFLINE=1 the recipe now needs no network")


# --- the stages -----------------------------------------------------------------------------------


def check_length(current: Run) -> None:
    """Refuse a penalty that the training is too short for; of epochs only the data tells."""
    if current.steps and (problem := unfinished(current.recipe.penalty, current.steps)):
        raise PostshareError(problem)


def control_steps(current: Run) -> int:
    """Steps of the control: as many as the model takes, its healing included; 0 without one."""
    if not (current.shares and current.recipe.evaluate.continued):
        return 0
    return current.steps + current.recipe.materialize.heal_steps


def train_control(current: Run) -> None:
    """Train without any sharing (*continued*)."""
    folder = current.folder / "continued"
    steps = control_steps(current)
    train_one(current, "continued", folder, None, steps, later_steps=steps)


def post_train(current: Run) -> None:
    """Train the model with the plan's structure, its ties pulled together."""
    if current.shares:
        train_one(current, "post", current.folder, current.plan)
        report_merged(current, base_of(current), current.folder / "weights")
    else:
        train_one(current, "pretrain" if current.base is None else "post", current.folder, None)


def train_one(
    current: Run,
    name: str,
    folder: Path,
    plan: SharingPlan | None,
    steps: int | None = None,
    later_steps: int | None = None,
) -> TrainResult:
    section = current.recipe.train
    training, validation = current.blocks
    job = TrainJob(
        name=name,
        load=lambda: adapt(
            convert(load_base(current.recipe), plan or SharingPlan(), current.leaders),
            current.recipe,
        ),
        trainable=None if current.recipe.lora is None else ADAPTERS,
        source=lambda: base_source(current.recipe.model, plan or SharingPlan(), current.leaders),
        plan=plan,
        train_blocks=training,
        validation_blocks=validation,
        folder=folder,
        steps=current.steps if steps is None else steps,
        learning_rate=section.learning_rate,
        group=current.group,
        later_steps=current.recipe.materialize.heal_steps if later_steps is None else later_steps,
    )
    return train(job, current.recipe)


def materialize(current: Run) -> None:
    """What needs calibration text or is fitted: merges, factors, residuals."""
    materialize_on_text(current)
    fit_residual(current, trained_folder(current))


def heal(current: Run) -> None:
    """Train the compact model, in which what is shared is one parameter."""
    section = current.recipe.materialize
    residual = None if current.recipe.residual is None else fitted(current)

    def load() -> LlamaForCausalLM:
        model = load_model(merged_folder(current), current.recipe.model.attention)
        if current.plan.basis is not None:
            return model
        compact = SharedLlamaForCausalLM.from_materialized(tied(current, model), current.plan)
        if residual is not None:
            insert_(compact, residual)
        return compact

    def source() -> Source:
        if current.plan.basis is not None:
            return factored_source(merged_folder(current), current.recipe.model)
        compact = compact_source(
            merged_folder(current),
            current.recipe.model,
            current.plan,
            current.leaders,
            current.recipe.materialize.remaining_merge,
        )
        return compact if residual is None else with_residual(compact, residual)

    training, validation = current.blocks
    job = TrainJob(
        name="heal",
        load=load,
        source=source,
        plan=None,
        trainable=None if residual is None else trainable(current.recipe),
        train_blocks=training,
        validation_blocks=validation,
        folder=current.folder / "heal",
        steps=section.heal_steps,
        learning_rate=section.heal_learning_rate or current.recipe.train.learning_rate,
        group=current.group,
    )
    train(job, current.recipe)


def write_exports(current: Run) -> None:
    """Export what the recipe asks for, verified."""
    recipe = current.recipe
    healed = recipe.materialize.heal_steps > 0
    weights = current.folder / "heal" / "weights" if healed else merged_folder(current)

    # The base's tokenizer files are copied as they are; another tokenizer is written anew.
    own = recipe.model.tokenizer is not None or current.base is None
    tokenizer = current.tokenizer if own else current.base

    def work() -> None:
        judged = current.folder / "export" / shipped(current)
        is_there = judged.is_dir()
        with (
            bar("export: write", of_bytes=True) as write,
            bar("export: verify", of_bytes=True) as verify,
        ):
            shows = {"write": write, "verify": verify}
            exporting.export_model(
                exported_weights(weights, current.export_dtype),
                current.plan,
                current.folder / "export",
                formats=export_formats(current),
                gguf=recipe.export.gguf,
                dtype=current.export_dtype,
                shard_bytes=recipe.export.shard_bytes,
                merge="copy" if healed else recipe.materialize.remaining_merge,
                leaders=current.leaders,
                residual=residual_of(current),
                base_config=current.config,
                base=current.base,
                tokenizer=tokenizer,
                recipe=recipe.model_dump(mode="json"),
                written=recipe.written,
                notes={
                    "name": recipe.name,
                    "base_model": recipe.model.path,
                    "figures": planned_figures(current).rows(),
                },
                progress=lambda stage, done, total: shows[stage](done, total),
            )
        summary = current.folder / SUMMARY_FILE
        if summary.is_file() and not is_there:
            summary.unlink()
            current.say(
                f"note: {summary} was of an earlier export and is removed until this one is "
                "evaluated (`postshare evaluate RECIPE`)"
            )

    current.on_main(work)


# --- where things are -----------------------------------------------------------------------------


def require_trained(current: Run) -> None:
    """Raises PostshareError: the plan, a training or the residuals that are exported are missing.

    Asked of the main process, which may be alone: `blocks` are not read.
    """
    recipe, folder = current.recipe, current.folder
    heals = recipe.materialize.heal_steps > 0
    trainings = [folder] if recipe.train.steps != 0 else []
    for training in [*trainings, *([folder / "heal"] if heals else [])]:
        if not (training / "weights" / "config.json").is_file():
            raise PostshareError(
                f"{training} holds no finished training; start it with `postshare run`"
            )
    check_structure(recipe, current.plan, current.config)  # formats may be asked for later
    if recipe.residual is not None and not heals:
        fitted(current)


def require_evaluable(current: Run) -> None:
    """Raises PostshareError: as `require_trained`; or the exports are missing."""
    require_trained(current)
    if current.shares:
        require_exports(current)
