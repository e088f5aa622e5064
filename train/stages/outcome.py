"""The outcome of a run: its models evaluated, one table, wandb, the report, what to do next."""

from __future__ import annotations

import json
from pathlib import Path

from sa_models.atomic_files import write_json
from sa_models.export.manifest import update_notes
from train.common.run_files import SUMMARY_FILE
from train.data.blocks import Blocks
from train.evaluation.figures import Figures, rows_table
from train.evaluation.run_scores import measured_decode
from train.evaluation.summary import (
    TrainingCost,
    evaluate_models,
    saved_sentence,
    summarize,
    summary_table,
    weight_bytes,
)
from train.models.samples import Samples
from train.planning.find import requested_ratio
from train.planning.search.alternatives import alternatives_lines
from train.stages.evaluation import (
    directshare_of,
    evaluated_models,
    export_formats,
    exported,
    residual_parameters,
)
from train.stages.run import Run, base_of
from train.tracking.wandb_evaluation import log_outcome
from train.training.training_folder import read_result


def judge(current: Run) -> None:
    """Perplexity of base, continued, DirectShare and PostShare; the summary; the table."""
    if not current.shares:
        return
    blocks = current.blocks[1]
    current.on_main(lambda: measure(current, blocks))


def measure(current: Run, blocks: Blocks) -> None:
    """Evaluate what is not evaluated yet, write evaluation.json and summary.json, print both."""
    recipe, section = current.recipe, current.recipe.evaluate
    measured = evaluate_models(
        evaluated_models(current),
        blocks,
        section.batch_size,
        section.blocks,
        current.ranks.device,
        current.folder,
        current.say,
        Samples(current.folder, current.tokenizer, blocks, section.blocks).add,
    )
    published = directshare_of(current) if section.directshare else None
    summary = summarize(
        measured,
        current.plan,
        current.plan.savings(current.config),
        requested_ratio(recipe.plan, current.plan, current.plan.layout(current.config)),
        {"base": weight_bytes(base_of(current))}
        | {kind: weight_bytes(current.folder / "export" / kind) for kind in exported(current)},
        trained(current),
        element_bytes=current.export_dtype.itemsize,
        positions=current.config.max_position_embeddings,
        residual=residual_parameters(current),
        decode=measured_decode(current.folder) if recipe.residual is None else None,
        directshare=None if published is None else published.savings(current.config),
    )
    write_json(current.folder / SUMMARY_FILE, summary)
    figures = Figures.from_dict(summary["figures"])
    for kind in exported(current):
        notes = {"numbers": summary, "figures": figures.rows()}
        update_notes(current.folder / "export" / kind, notes)
    current.say("", summary_table(summary), "", rows_table(figures.rows()), "")
    current.say(saved_sentence(summary), *alternatives_lines(current.folder), "")


def tell_wandb(current: Run) -> None:
    """The evaluation, and where the recipe asks for it the exports, as a wandb run."""
    file = current.folder / SUMMARY_FILE

    def work() -> None:
        summary = json.loads(file.read_text(encoding="utf-8")) if current.shares else None
        folders = {kind: current.folder / "export" / kind for kind in exported(current)}
        log_outcome(current.recipe, current.group, current.plan, summary, folders)

    current.on_main(work)


def conclude(current: Run) -> None:
    """Tell wandb and the person what came of it."""
    tell_wandb(current)
    show(current)


def show(current: Run) -> None:
    """Write report.html; say where everything is."""
    from train.report.page import write_report  # draws, which a training does not wait for

    def work() -> None:
        page = write_report([current.folder])
        if current.shares:
            for kind in exported(current):
                current.say(f"{kind:<10}{current.folder / 'export' / kind}")
            current.say(f"summary   {current.folder / SUMMARY_FILE}")
        current.say(*pictures(current.folder))
        current.say(f"report    {page}")
        if current.shares:
            current.say(f"next      {next_step(current)}")

    current.on_main(work)


def pictures(folder: Path) -> list[str]:
    """Where the pictures of the plan are, in one line; none where there are none."""
    found = sorted(folder.glob("plan-*.png"))
    name = found[0].name if len(found) == 1 else "plan-*.png"
    return [f"pictures  {folder / name}, and .svg"] if found else []


def next_step(current: Run) -> str:
    """What to do with a finished run."""
    plan, budget = current.recipe.plan, current.recipe.plan.budget
    # Half as many units need not be whole layers.
    if budget is not None and budget.ratio is not None and plan.action != "drop":
        half = f"plan.budget.ratio={budget.ratio / 2:.3g}"
        return f"the same with half the budget: {half} output_dir=<another folder>"
    kind = export_formats(current)[0]
    return f"load it: see {current.folder / 'export' / kind / 'README.md'}"


def trained(current: Run) -> TrainingCost:
    """Tokens and seconds of the post-training, healing included."""
    results = [read_result(current.folder), read_result(current.folder / "heal")]
    done = [result for result in results if result is not None]
    return TrainingCost(sum(r.tokens for r in done), sum(r.seconds for r in done))
