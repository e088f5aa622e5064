"""The plan stage of a run: spans, then ties and removed units, found once and kept as a file."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import LlamaForCausalLM

from sa_models.calibration.partial_forward import Batch
from sa_models.errors import PostshareError
from sa_models.materialize.merge import check_merge
from sa_models.plan import SharingPlan
from sa_models.scores.registry import IMPORTANCES_OF_TEXT
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.search.ranking import Agreement
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert
from train.common.progress import note
from train.common.run_files import (
    ALTERNATIVES_FILE,
    PLAN_FILE,
    SEARCH_CACHE,
    SEARCH_FILE,
    SEARCH_PAGE,
)
from train.data.blocks import Blocks
from train.data.calibration import calibration_batches
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_dense
from train.planning.find import draw_plan, find_ties, plan_lines, requested_ratio
from train.planning.problem import PlanProblem
from train.planning.scores import calibration_text, chance_line, save_chances
from train.planning.search.alternatives import (
    alternatives_lines,
    budgets,
    save_alternatives,
    search_alternative,
)
from train.planning.search.auto_rebuild import compare_rebuilt
from train.planning.search.auto_report import (
    chosen_lines,
    compared_table,
    cost_table,
    factored_note,
    front_table,
    left_out_note,
    save_auto,
    time_front,
)
from train.planning.search.auto_result import AutoResult, Timed
from train.planning.search.auto_search import search_auto
from train.planning.search.auto_space import check_auto
from train.planning.search.loss_search import (
    LossSearch,
    bound_sentence,
    choose_by_importance,
    dearer_note,
    save_search,
    search_plan,
    search_table,
    took_sentence,
    unlike,
    unstable,
)
from train.planning.search.objective import objective_sentence
from train.planning.search_page import add_to_page, cost_line
from train.planning.spans import SpanFinder, save_spans, spans_table
from train.recipe.rules import check_structure
from train.recipe.sections.structure import listed_structure
from train.recipe.warnings import recipe_warnings
from train.stages.evaluation import directshare_of, residual_parameters
from train.stages.materialize import tied
from train.stages.run import Run, base_of

TIES = "ties      save no cache and no time"
DEARER = f"{TIES}; some cost more than removal: {SEARCH_PAGE}"
"""Where the search measured what removing the tied units would cost."""


def make_plan(current: Run) -> None:
    """Find the plan, unless the run folder has it; print it, draw it."""
    if not current.recipe.plans:
        return
    section, base, spans = current.recipe.plan, base_of(current), current.recipe.spans
    spans_measure = spans is not None and spans.measures
    blocks = current.blocks[0] if spans_measure or section.measures else None

    def work() -> None:
        file = current.folder / PLAN_FILE
        if not file.is_file():
            (current.folder / SEARCH_PAGE).unlink(missing_ok=True)
            structure = find_structure(current, base, blocks if spans_measure else None)
            scores = text = None
            if section.searches:
                assert blocks is not None
                found = find_by_loss(current, base, structure, blocks)
            else:
                if section.scores_text:
                    assert blocks is not None
                    pooled = SharingPlan(kv_heads=structure.kv_heads)
                    text = calibration_text(section, measured_model(current, base, pooled), blocks)
                found, scores = find_ties(
                    PlanProblem(section, current.config, structure), WeightsFolder(base), text
                )
            check_merge(found, current.recipe.materialize.merge)
            merges = current.recipe.materialize.merge != "copy"
            if merges and found.basis is None and not found.ties:
                note("note: the plan ties no units, so materialize.merge changes nothing")
            draw_plan(found, scores, found.layout(current.config), section, current.folder)
            save_chances(section, base, found, text, current.folder)
            found.save(file)
        # The formats may be others than those that it was found for.
        check_structure(current.recipe, current.plan, current.config)
        if current.recipe.evaluate.directshare:
            directshare_of(current)  # what cannot be met is said before the training
        if section.alternatives:
            assert blocks is not None
            find_alternatives(current, base, blocks)
        if current.recipe.residual is not None and not current.plan.ties:
            raise PostshareError("residual: the plan ties nothing; remove residual")
        show_plan(current)

    current.on_main(work)


def find_structure(current: Run, base: Path, blocks: Blocks | None) -> SharingPlan:
    """KV heads and spans of the recipe; spans that are to be measured need the training blocks."""
    structure = listed_structure(current.recipe.heads, current.recipe.spans)
    if blocks is None:
        return structure
    model = measured_model(current, base, SharingPlan(kv_heads=structure.kv_heads))
    found = SpanFinder(current.recipe, model, blocks, current.folder / SEARCH_CACHE).find(
        structure.spans
    )
    save_spans(found, current.folder)
    add_to_page(current.folder, spans_table(found))
    current.say(cost_line(found.choices[0].loss, found.base_loss, "spans: "))
    return replace(structure, spans=found.spans)


def measured_model(current: Run, base: Path, structure: SharingPlan) -> LlamaForCausalLM:
    """The base with KV heads and spans of a plan, ready to be measured on calibration text."""
    model = load_dense(base, current.recipe.model.fp32_attention)
    model = convert(model, structure, current.leaders)
    model.to(current.ranks.device)  # type: ignore[arg-type]  # transformers' decorator hides it
    return model.eval()


def measured_text(current: Run, blocks: Blocks) -> list[Batch]:
    """Training blocks on which a plan is measured, evenly spread."""
    recipe, device = current.recipe, current.ranks.device
    count, size = recipe.plan.calibration_blocks, recipe.evaluate.batch_size
    return calibration_batches(blocks, count, size, device)


def find_by_loss(current: Run, base: Path, structure: SharingPlan, blocks: Blocks) -> SharingPlan:
    """The plan of the strategies that measure the base with its structure."""
    section, config = current.recipe.plan, current.config
    problem = PlanProblem(section, config, structure)
    if section.strategy == "auto":
        return find_by_auto(current, base, problem, blocks)
    model = measured_model(current, base, structure)
    if section.strategy in IMPORTANCES_OF_TEXT:
        found = choose_by_importance(problem, model, measured_text(current, blocks))
    else:
        found, searched = search_plan(
            problem, model, measured_text(current, blocks), current.folder
        )
        save_search(searched, problem, current.export_dtype.itemsize, current.folder)
        tell_search(current, searched, problem)
        warn_of_text(current, model, searched.found.base_loss, searched.agreement, searched.blocks)
    found.validate(config)
    return found


def tell_search(current: Run, searched: LossSearch, problem: PlanProblem) -> None:
    """The search of strategy loss: every step on the page, what it comes to on the terminal."""
    found = searched.found
    took = took_sentence(searched.seconds, searched.passes, searched.blocks, searched.estimates)
    add_to_page(
        current.folder,
        search_table(found, problem.layout),
        f"{took} {bound_sentence(searched.bound)}",
        *filter(None, [dearer_note(found, problem)]),
    )
    current.say(cost_line(found.path[-1].loss if found.path else found.base_loss, found.base_loss))


def warn_of_text(
    current: Run, model: LlamaForCausalLM, loss: float, agreement: Agreement | None, count: int
) -> None:
    """Say where a choice was made on too little text, or on text unlike that of the evaluation.

    Args:
        model: that was searched, unchanged; `loss` is its loss on the calibration text.
        count: of calibration blocks; as many of the evaluation text are read.
    """
    held_out, size = current.blocks[1], current.recipe.evaluate.batch_size
    found = perplexity(model, held_out, size, limit=count, progress=False)
    lines = [None if agreement is None else unstable(agreement, count), unlike(loss, found.loss)]
    for line in lines:
        if line is not None:
            note(f"warning: {line}")


def find_by_auto(current: Run, base: Path, problem: PlanProblem, blocks: Blocks) -> SharingPlan:
    """The plan of strategy auto; shows what it was compared with, and what each choice costs.

    Searching, comparing and timing load the base anew, so that none holds what another needed.
    """
    check_auto(problem)  # spans that were found may meet the budget alone
    recipe, config, size = current.recipe, current.config, current.export_dtype.itemsize
    device, spans = current.ranks.device, recipe.export.allows_spans
    model = measured_model(current, base, problem.structure)
    text = measured_text(current, blocks)
    searched = search_auto(problem, model, text, current.folder, spans)
    agreement = searched.chosen.agreement
    warn_of_text(current, model, searched.base.loss, agreement, searched.blocks)
    del model
    gc.collect()  # the projections of models with spans refer to each other
    if recipe.materialize.reconstruct:
        load = partial(load_dense, base, recipe.model.fp32_attention)
        searched = compare_rebuilt(searched, recipe, problem, load, blocks, device, current.folder)
    model = measured_model(current, base, SharingPlan())
    prompt = blocks[0]["input_ids"][None].to(device)
    front = time_front(searched, model, prompt, current.leaders, config, size)
    del model
    within = problem.within(searched.chosen.plan.structure())
    save_auto(searched, front, within, size, current.folder)
    tell_auto(current, searched, front, within)
    searched.plan.validate(config)
    return searched.plan


def find_alternatives(current: Run, base: Path, blocks: Blocks) -> None:
    """What strategy auto would do for as many bytes, and as much cache, unless it was asked."""
    if (current.folder / ALTERNATIVES_FILE).is_file():
        return
    section, plan, batches = current.recipe.plan, current.plan, measured_text(current, blocks)
    dense = measured_model(current, base, SharingPlan())
    alternatives = [
        search_alternative(counted, share, section, dense, batches, current.folder)
        for counted, share in budgets(plan, current.config, residual_parameters(current)).items()
    ]
    before = MeasuredLoss(dense, batches, current.folder / SEARCH_CACHE)(frozenset())
    after = MeasuredLoss(tied(current, dense, "copy"), batches)(frozenset())
    save_alternatives(alternatives, math.expm1(after - before), current.folder)
    add_to_page(current.folder, "\n".join(alternatives_lines(current.folder)))


def tell_auto(current: Run, searched: AutoResult, front: list[Timed], problem: PlanProblem) -> None:
    """The search of strategy auto: its tables on the page, what was chosen on the terminal.

    Args:
        problem: with the structure of the best candidate.
    """
    config, size = current.config, current.export_dtype.itemsize
    factored, found = searched.factored, searched.found
    better = factored is not None and factored.is_better
    dearer = None if found is None else dearer_note(found, problem)
    took = took_sentence(searched.seconds, searched.passes, searched.blocks, searched.estimates)
    add_to_page(
        current.folder,
        compared_table(searched, config),
        cost_table(searched, config),
        front_table(front, config, size),
        f"{took} {bound_sentence(searched.bound)}",
        objective_sentence(current.recipe.plan.objective, searched.plan, config, size),
        *([factored_note(factored, searched.chosen.plan, config)] if better and factored else []),
        *filter(None, [left_out_note(searched), dearer]),
    )
    current.say(*chosen_lines(searched))
    if better and searched.plan.basis is None:
        current.say(f"note      Basis Sharing at as many bytes is better untrained: {SEARCH_PAGE}")


def has_dearer_ties(folder: Path) -> bool:
    """Whether a search has found ties that are estimated to cost more than removals."""
    file = folder / SEARCH_FILE
    if not file.is_file():
        return False
    # An earlier version wrote no such list.
    return bool(json.loads(file.read_text(encoding="utf-8")).get("dearer_than_removal"))


def show_plan(current: Run) -> None:
    found, section = current.plan, current.recipe.plan
    requested = requested_ratio(section, found, found.layout(current.config))
    current.say(*plan_lines(found, current.config, requested, current.export_dtype.itemsize))
    if found.ties:
        current.say(DEARER if has_dearer_ties(current.folder) else TIES)
    if (current.folder / SEARCH_PAGE).is_file():
        current.say(f"tables    {current.folder / SEARCH_PAGE}")
    if section.scores:
        current.say(chance_line(section, current.folder))
    if found.released:
        current.say(
            "note: strategy released keeps the published chains, in which ties undo each\n"
            "other: fewer heads change than were asked for"
        )
    if not found.has_stock_form and "dense" in current.recipe.export.formats:
        current.say("note: spans have no dense form; only compact will be exported")
    positions = current.config.max_position_embeddings
    said = recipe_warnings(current.recipe, None, positions)  # before the plan was known
    for line in recipe_warnings(current.recipe, found.shared_projections(), positions):
        if line not in said:
            note(f"warning: {line}")
