"""The stages of a run, top to bottom: plan, post-train, materialize, export, evaluate.

Each stage reads files and writes files in the run folder, so any of them can be run alone, and a
stage that has finished is skipped on a second start. Every rank runs this; what is not training is
done by the main process, while the others wait for its outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedModel

from sa_models import export as exporting
from sa_models.convert import convert
from sa_models.errors import PostshareError
from sa_models.manifest import update_notes
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.readers import open_weights
from sa_models.weights import WeightsFolder
from train import engine as engines
from train.base_model import load_base, load_dense, load_model, tie_model
from train.data import Blocks
from train.files import write_json
from train.loop import TrainJob, TrainResult, train
from train.outcome import read_result
from train.penalty_modes import unfinished
from train.plan_stage import make_plan
from train.planning import requested_ratio
from train.progress import ExportProgress
from train.recipe import Recipe
from train.run_folder import PLAN_OUTPUTS, Run, base_of, begin, find_teacher
from train.streaming import base_source, compact_source
from train.summary import (
    SUMMARY_FILE,
    Training,
    evaluate_models,
    saved_sentence,
    summarize,
    summary_table,
    weight_bytes,
)

# --- the commands ---------------------------------------------------------------------------------


def run(recipe: Recipe) -> None:
    """The whole pipeline; finished stages are skipped."""
    stages(recipe)
    engines.shutdown()


def stages(recipe: Recipe) -> None:
    """As `run`; other runs may follow in this process. Call `engine.shutdown` after the last."""
    current = begin(recipe, trains=True)
    make_plan(current)
    post_train(current)
    heal(current)
    write_exports(current)
    judge(current)


def plan(recipe: Recipe) -> None:
    """`postshare plan`: find, print and draw the plan."""
    if not recipe.shares:
        raise PostshareError("plan.strategy is none: there is no plan to find; set plan.strategy")
    measures = recipe.spans is not None and recipe.spans.measures
    current = begin(recipe, needs_data=measures or recipe.plan.measures)
    make_plan(current)
    for name in PLAN_OUTPUTS:
        if (current.folder / name).is_file():
            current.say(f"{current.folder / name}")


def export(recipe: Recipe) -> None:
    """`postshare export`: the exports of a finished training."""
    current = begin(recipe, needs_data=False)
    require_trained(current)
    write_exports(current)


def evaluate(recipe: Recipe) -> None:
    """`postshare evaluate`: perplexity of the run's models, and its summary."""
    current = begin(recipe)
    require_trained(current)
    judge(current)


def prepare(recipe: Recipe) -> None:
    """`postshare prepare`: fetch and cache model, tokenizer and data; nothing is trained."""
    current = Run(recipe, engines.start(recipe))
    if current.base is not None:
        WeightsFolder(current.base)
        current.say(f"model     {current.base}")
    if recipe.distill is not None:
        current.say(f"teacher   {find_teacher(current)}")
    train_blocks, validation_blocks = current.blocks
    current.say(
        f"data      {len(train_blocks):,} training and {len(validation_blocks):,} validation "
        f"blocks of {recipe.data.sequence_length} tokens, cached",
        "ready: with HF_HUB_OFFLINE=1 the recipe now needs no network",
    )


# --- the stages -----------------------------------------------------------------------------------


def post_train(current: Run) -> None:
    """Train the control without any sharing (*continued*), then the model with its structure.

    The control takes as many steps as the model, its healing included.
    """
    if current.steps and (problem := unfinished(current.recipe.penalty, current.steps)):
        raise PostshareError(problem)
    steps = current.steps + current.recipe.materialize.heal_steps
    if current.shares and current.recipe.evaluate.continued and steps > 0:
        train_one(current, "continued", current.folder / "continued", None, steps)
    if current.steps == 0:
        return
    if current.shares:
        train_one(current, "post", current.folder, current.plan)
    else:
        train_one(current, "pretrain" if current.base is None else "post", current.folder, None)


def train_one(
    current: Run, name: str, folder: Path, plan: SharingPlan | None, steps: int | None = None
) -> TrainResult:
    section = current.recipe.train
    training, validation = current.blocks
    job = TrainJob(
        name=name,
        load=lambda: convert(load_base(current.recipe), plan or SharingPlan(), current.leaders),
        source=lambda: base_source(current.recipe.model, plan or SharingPlan(), current.leaders),
        plan=plan,
        train_blocks=training,
        validation_blocks=validation,
        folder=folder,
        steps=current.steps if steps is None else steps,
        learning_rate=section.learning_rate,
    )
    return train(job, current.recipe)


def heal(current: Run) -> None:
    """Materialize, then train the compact model, in which a tied unit is one parameter."""
    section = current.recipe.materialize
    if section.heal_steps == 0:
        return

    def load() -> SharedLlamaForCausalLM:
        model = load_model(trained_folder(current), current.recipe.model.attention)
        return SharedLlamaForCausalLM.from_materialized(
            tie_model(model, current.plan, current.recipe), current.plan
        )

    training, validation = current.blocks
    job = TrainJob(
        name="heal",
        load=load,
        source=lambda: compact_source(
            trained_folder(current),
            current.recipe.model,
            current.plan,
            current.leaders,
            current.recipe.materialize.merge,
        ),
        plan=None,
        train_blocks=training,
        validation_blocks=validation,
        folder=current.folder / "heal",
        steps=section.heal_steps,
        learning_rate=section.heal_learning_rate or current.recipe.train.learning_rate,
    )
    train(job, current.recipe)


def write_exports(current: Run) -> None:
    """Export compact and dense, verified."""
    recipe = current.recipe
    healed = recipe.materialize.heal_steps > 0
    weights = current.folder / "heal" / "weights" if healed else trained_folder(current)

    # The base's tokenizer files are copied as they are; another tokenizer is written anew.
    own = recipe.model.tokenizer is not None or current.base is None
    tokenizer = current.tokenizer if own else current.base

    def work() -> None:
        with ExportProgress() as progress:
            exporting.export_model(
                open_weights(weights),
                current.plan,
                current.folder / "export",
                formats=export_formats(current),
                dtype=current.export_dtype,
                shard_bytes=recipe.export.shard_bytes,
                merge="copy" if healed else recipe.materialize.merge,
                leaders=current.leaders,
                base_config=current.config,
                tokenizer=tokenizer,
                recipe=recipe.model_dump(mode="json"),
                notes={"name": recipe.name, "base_model": recipe.model.path},
                progress=progress,
            )

    current.on_main(work)


def judge(current: Run) -> None:
    """Perplexity of base, continued, DirectShare and PostShare; the summary; the table."""
    if not current.shares:
        return
    blocks = current.blocks[1]
    current.on_main(lambda: report(current, blocks))


def report(current: Run, blocks: Blocks) -> None:
    """Evaluate what is not evaluated yet, write evaluation.json and summary.json, print both."""
    recipe, base, dtype = current.recipe, base_of(current), current.export_dtype
    attention = recipe.model.attention

    def direct() -> PreTrainedModel:
        return tie_model(load_dense(base, attention), current.plan, recipe)

    models: dict[str, Callable[[], PreTrainedModel]] = {"base": lambda: load_dense(base, attention)}
    if (current.folder / "continued" / "weights").is_dir():
        weights = current.folder / "continued" / "weights"
        models["continued"] = lambda: load_dense(weights, attention, through=dtype)
    models["direct"] = direct
    if current.steps > 0 or recipe.materialize.heal_steps > 0:
        models["post"] = lambda: load_export(current)
    limit, size = recipe.evaluate.blocks, recipe.evaluate.batch_size
    device = current.ranks.device
    measured = evaluate_models(models, blocks, size, limit, device, current.folder)
    summary = summarize(
        measured,
        current.plan,
        current.plan.savings(current.config),
        requested_ratio(recipe.plan, current.plan, current.plan.layout(current.config)),
        {"base": weight_bytes(base)}
        | {
            kind: weight_bytes(current.folder / "export" / kind) for kind in export_formats(current)
        },
        trained(current),
    )
    write_json(current.folder / SUMMARY_FILE, summary)
    for kind in export_formats(current):
        update_notes(current.folder / "export" / kind, {"numbers": summary})
    current.say("", summary_table(summary), saved_sentence(summary), "")
    for kind in export_formats(current):
        current.say(f"{kind:<10}{current.folder / 'export' / kind}")
    current.say(
        f"summary   {current.folder / SUMMARY_FILE}",
    )
    if any(current.folder.glob("plan-*.png")):
        current.say(f"pictures  {current.folder / 'plan-*.png'}")
    if recipe.plan.budget is not None and recipe.plan.budget.ratio is not None:
        current.say(
            "next      the same with another budget: plan.budget.ratio=0.1 "
            "output_dir=<another folder>"
        )
    else:
        kind = export_formats(current)[0]
        current.say(f"next      load it: see {current.folder / 'export' / kind / 'README.md'}")


def load_export(current: Run) -> PreTrainedModel:
    """The model that is shipped, with fp32 parameters: the compact export, else the dense one."""
    attention = current.recipe.model.attention
    for kind, load in (("compact", SharedLlamaForCausalLM), ("dense", LlamaForCausalLM)):
        folder = current.folder / "export" / kind
        if folder.is_dir():
            model = load.from_pretrained(folder, dtype="auto", attn_implementation=attention)
            return model.float()
    raise PostshareError(f"{current.folder} has no export; run `postshare export` first")


# --- where things are -----------------------------------------------------------------------------


def trained_folder(current: Run) -> Path:
    """Folder of the weights that are materialized: trained, or with no steps those of the base."""
    return current.folder / "weights" if current.steps > 0 else base_of(current)


def require_trained(current: Run) -> None:
    if not (trained_folder(current) / "config.json").is_file():
        raise PostshareError(
            f"{current.folder} holds no finished training; start it with `postshare run`"
        )


def trained(current: Run) -> Training:
    """Tokens and seconds of the post-training, healing included."""
    results = [read_result(current.folder), read_result(current.folder / "heal")]
    done = [result for result in results if result is not None]
    return Training(sum(r.tokens for r in done), sum(r.seconds for r in done))


def export_formats(current: Run) -> tuple[exporting.Format, ...]:
    """With KV heads alone there is nothing compact to store; with spans, no stock form."""
    plan = current.plan
    if not plan.ties and not plan.removed and not plan.spans:
        return ("dense",)
    return current.recipe.export.formats if plan.has_stock_form else ("compact",)
