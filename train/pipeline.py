"""The stages of a run, top to bottom: plan, post-train, materialize, export, evaluate.

Each stage reads files and writes files in the run folder, so any of them can be run alone, and a
stage that has finished is skipped on a second start. Every rank runs this; what is not training is
done by the main process, while the others wait for its outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sa_models import export as exporting
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.manifest import update_notes
from sa_models.materialize import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.readers import open_weights
from sa_models.weights import WeightsFolder, read_config
from train import engine as engines
from train.base_model import base_folder, fresh_config, load_base, load_dense
from train.checkpoint import refuse_other_run
from train.data import Blocks, prepare_data
from train.loop import TrainJob, TrainResult, train
from train.outcome import FREE_TRAIN, read_result
from train.planning import draw_plan, find_plan, plan_table, requested_ratio
from train.progress import ExportProgress
from train.recipe import Recipe, load_recipe
from train.summary import (
    SUMMARY_FILE,
    Training,
    evaluate_models,
    saved_sentence,
    summarize,
    summary_table,
    weight_bytes,
    write_json,
)
from train.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig

T = TypeVar("T")
RECIPE_FILE = "recipe.yaml"
PLAN_FILE = "plan.json"


@dataclass
class Run:
    """What the stages share: the recipe, the ranks, and inputs that are read when first used."""

    recipe: Recipe
    ranks: engines.Engine

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def shares(self) -> bool:
        return self.recipe.plan.strategy != "none"

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
        steps = self.recipe.train.steps
        needed = None if steps is None else max(1, steps * self.recipe.train.batch_size)
        return self.main_first(
            lambda: prepare_data(
                self.recipe,
                self.tokenizer,
                needed_blocks=needed,
                vocab_size=self.config.vocab_size,
            )
        )

    @cached_property
    def steps(self) -> int:
        section = self.recipe.train
        if section.steps is not None:
            return section.steps
        assert section.epochs is not None
        return math.ceil(section.epochs * len(self.blocks[0]) / section.batch_size)

    @property
    def plan(self) -> SharingPlan:
        """The run's plan, from its file."""
        if not self.shares:
            return SharingPlan()
        plan = SharingPlan.load(self.folder / PLAN_FILE)
        plan.validate(self.config)
        return plan

    def main_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process, then (from its caches) on the others."""
        done: list[T] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()

    def on_main(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the main process while the others wait; its error is everybody's."""
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

    def say(self, *renderables: Any) -> None:
        if self.ranks.is_main:
            for renderable in renderables:
                self.console.print(renderable)

    @cached_property
    def console(self) -> Console:
        return Console(highlight=False)


# --- the commands ---------------------------------------------------------------------------------


def run(recipe: Recipe) -> None:
    """The whole pipeline; finished stages are skipped."""
    current = begin(recipe)
    make_plan(current)
    post_train(current)
    heal(current)
    write_exports(current)
    judge(current)
    engines.shutdown()


def plan(recipe: Recipe) -> None:
    """`postshare plan`: find, print and draw the plan."""
    current = begin(recipe)
    if not current.shares:
        raise PostshareError("plan.strategy is none: there is no plan to find; set plan.strategy")
    make_plan(current)
    current.say(f"plan      {current.folder / PLAN_FILE}")
    for picture in sorted(current.folder.glob("plan-*.png")):
        current.say(f"picture   {picture}")


def export(recipe: Recipe) -> None:
    """`postshare export`: the exports of a finished training."""
    current = begin(recipe)
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
    train_blocks, validation_blocks = current.blocks
    current.say(
        f"data      {len(train_blocks):,} training and {len(validation_blocks):,} validation "
        f"blocks of {recipe.data.sequence_length} tokens, cached",
        "ready: with HF_HUB_OFFLINE=1 the recipe now needs no network",
    )


# --- the stages -----------------------------------------------------------------------------------


def begin(recipe: Recipe) -> Run:
    """Claim the run folder for this recipe.

    Raises:
        PostshareError: the folder belongs to another recipe, or to something else.
    """
    logging.disable_progress_bar()  # transformers' own bars would tear ours
    current = Run(recipe, engines.start(recipe))
    if current.base is not None:
        current.main_first(lambda: WeightsFolder(base_of(current)))

    def claim() -> None:
        file = current.folder / RECIPE_FILE
        if file.is_file():
            theirs = load_recipe(file)
            refuse_other_run(current.folder, run_identity(theirs), run_identity(recipe))
        elif current.folder.is_dir() and any(current.folder.iterdir()):
            raise PostshareError(
                f"{current.folder} is not empty and is no run folder; choose another output_dir"
            )
        current.folder.mkdir(parents=True, exist_ok=True)
        recipe.save(file)

    current.on_main(claim)
    return current


def run_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's results; the rest of a recipe may change between two starts."""
    free = {"name", "output_dir", "resume", "wandb", "export", "evaluate"}
    value = recipe.model_dump(mode="json", exclude=free)
    value["train"] = {
        k: v
        for k, v in value["train"].items()
        if k in ("steps", "epochs", "learning_rate") or k not in FREE_TRAIN
    }
    value["data"].pop("processes")
    return value


def make_plan(current: Run) -> None:
    """Find the plan, unless the run folder has it; print it, draw it."""
    if not current.shares:
        return
    section, base = current.recipe.plan, base_of(current)

    def work() -> None:
        file = current.folder / PLAN_FILE
        if not file.is_file():
            found, scores = find_plan(section, base)
            layout = HeadLayout.from_config(current.config)
            draw_plan(found, scores, layout, section, current.folder)
            found.save(file)
        show_plan(current)

    current.on_main(work)


def show_plan(current: Run) -> None:
    found, section = current.plan, current.recipe.plan
    requested = requested_ratio(section, found, HeadLayout.from_config(current.config))
    current.say(
        "", plan_table(found, current.config, requested, export_dtype(current).itemsize), ""
    )
    if found.released:
        current.say(
            "note: strategy released keeps the published chains, in which ties undo each other: "
            "fewer heads change than were asked for"
        )


def post_train(current: Run) -> None:
    """Train the control without penalty and sharing (*continued*), then the model itself."""
    if current.steps == 0:
        return
    if current.shares and current.recipe.evaluate.continued:
        train_one(current, "continued", current.folder / "continued", None)
    if current.shares:
        train_one(current, "post", current.folder, current.plan)
    else:
        train_one(current, "pretrain" if current.base is None else "post", current.folder, None)


def train_one(current: Run, name: str, folder: Path, plan: SharingPlan | None) -> TrainResult:
    section = current.recipe.train
    training, validation = current.blocks
    job = TrainJob(
        name=name,
        model=load_base(current.recipe),
        plan=plan,
        train_blocks=training,
        validation_blocks=validation,
        folder=folder,
        steps=current.steps,
        learning_rate=section.learning_rate,
    )
    return train(job, current.recipe)


def heal(current: Run) -> None:
    """Materialize, then train the compact model: a tied unit is one parameter, so ties stay exact.

    Raises:
        PostshareError: under ZeRO, where a parameter that several layers read is not exact yet.
    """
    section = current.recipe.materialize
    if section.heal_steps == 0:
        return
    if current.ranks.backend == "deepspeed":
        raise PostshareError(
            "materialize.heal_steps: healing is exact on one process and under DDP, not yet under "
            "ZeRO; launch with launch/accelerate/ddp.yaml, or set materialize.heal_steps=0"
        )
    model = load_dense(trained_folder(current), current.recipe.model.attention)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, current.plan, section.merge)
    training, validation = current.blocks
    job = TrainJob(
        name="heal",
        model=SharedLlamaForCausalLM.from_materialized(model, current.plan),
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

    def work() -> None:
        # The base's tokenizer files are copied as they are; another tokenizer is written anew.
        own = recipe.model.tokenizer is not None or current.base is None
        with ExportProgress() as progress:
            exporting.export_model(
                open_weights(weights),
                current.plan,
                current.folder / "export",
                formats=export_formats(current),
                dtype=export_dtype(current),
                shard_bytes=recipe.export.shard_bytes,
                merge="copy" if healed else recipe.materialize.merge,
                tokenizer=current.tokenizer if own else current.base,
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
    recipe, base, dtype = current.recipe, base_of(current), export_dtype(current)
    attention = recipe.model.attention

    def direct() -> PreTrainedModel:
        model = load_dense(base, attention)
        layout = HeadLayout.from_config(model.config)
        copied = recipe.materialize.merge
        materialize_(dict(model.named_parameters()), layout, current.plan, copied)
        return model

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
        current.plan.savings(current.config),
        requested_ratio(recipe.plan, current.plan, HeadLayout.from_config(current.config)),
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
        f"pictures  {current.folder / 'plan-*.png'}",
        "next      the same with another budget: plan.budget.ratio=0.1 output_dir=<another folder>",
    )


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


def base_of(current: Run) -> Path:
    if current.base is None:
        raise PostshareError(
            "a model from random weights has no heads worth sharing; train it with "
            "plan.strategy=none first, then share it by model.path"
        )
    return current.base


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
    """Without sharing there is nothing compact to store."""
    return current.recipe.export.formats if current.shares else ("dense",)


def export_dtype(current: Run) -> torch.dtype:
    """The dtype of the exported weights; with ``base``, that of the base model's q_proj."""
    name = current.recipe.export.dtype
    if name != "base":
        return getattr(torch, name)
    if current.base is None:
        return torch.float32
    return WeightsFolder(current.base).dtype(HeadLayout.parameter_name(0, "q"))
