"""`plan.uniform` from the recipe to the dense folder: chosen, refused, healed, said, computed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

from sa_models import PostshareError, SharingPlan
from sa_models.scores.fisher import estimate_sensitivity
from sa_models.scores.magnitude import unit_norms
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.spans_base import (
    LAYERS,
    base_model,
    ids,
    read,
    recipe,
    reference_loss,
)
from train.cli import main
from train.common.run_files import SEARCH_CACHE
from train.distributed.engines.start import start
from train.estimate.dry_run import print_dry_run
from train.estimate.llama_shapes import LlamaShape, find_shape
from train.estimate.parameters import disk_space, plan_savings
from train.planning.check import check_budget
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.planning.search.auto_search import search_auto
from train.planning.search.auto_space import full_space
from train.recipe.recipe import Recipe
from train.recipe.sections.plan import PlanSection
from train.stages.pipeline import plan, run
from train.stages.run import Run

pytestmark = pytest.mark.usefixtures("sketched")

UNIFORM: dict[str, Any] = {
    "strategy": "loss",
    "action": "remove",
    "uniform": True,
    "budget": {"ratio": 0.25},
    "calibration_blocks": 3,
}
SHAPE = LlamaShape(97, 64, 176, 8, 8, 4, 8, 128)
"""8 layers of 4 KV groups of 2 heads."""


def made(home: Path, folder: Path, section: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return recipe(home, folder, plan=UNIFORM | (section or {}), **{"train": {"steps": 0}, **more})


def problem(shape: LlamaShape = SHAPE, structure: SharingPlan | None = None, **section: Any):
    value = {key: v for key, v in (UNIFORM | section).items() if v is not ...}
    return PlanProblem(PlanSection.model_validate(value), shape, structure or SharingPlan())


def gone(found: SharingPlan, layers: int = LAYERS) -> list[int]:
    """How many units each layer has lost."""
    return [sum(at == layer for at, _ in found.removed) for layer in range(layers)]


# --- the recipe and the budget --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"plan": {"strategy": "cosine", "calibration_blocks": ...}}, "which strategy cosine does"),
        (
            {"plan": {"strategy": "basis", "action": "tie", "calibration_blocks": ...}},
            "which strategy basis does not; set plan.strategy=loss, or plan.uniform=false",
        ),
        ({"plan": {"action": "tie"}}, "uniform: action tie leaves layers that differ from a stock"),
        ({"plan": {"action": "any"}}, "uniform: action any leaves"),
        ({"plan": {"action": "drop"}}, "uniform: action drop leaves"),
        ({"plan": {"skip_layers": [1]}}, "from every layer; remove plan.skip_layers"),
        ({"spans": [{"leader": 1, "followers": [2]}]}, "no stock Llama computes spans; remove sp"),
        ({"residual": {"rank": 2}}, "residual: nothing is tied"),
        ({"penalty": {"kind": "mse"}}, "nothing to pull; remove penalty"),
    ],
)
def test_what_leaves_no_stock_llama_is_refused(sections: dict[str, Any], says: str) -> None:
    sections["plan"] = UNIFORM | sections.get("plan", {})
    with pytest.raises(PostshareError) as error:
        recipe(Path("unused"), Path("unused"), **sections)
    assert says in str(error.value)


def test_a_resolved_recipe_is_read_again(home: Path, tmp_path: Path) -> None:
    """It states the default of skip_layers, which is of no effect here."""
    first = made(home, tmp_path)
    assert type(first).model_validate(first.model_dump()) == first
    assert first.plan.skipped == ()
    assert made(home, tmp_path, {"skip_layers": []}).plan.skipped == ()


@pytest.mark.parametrize(
    ("budget", "each"),
    [
        ({"ratio": 0.25}, 1),
        ({"ratio": 0.75}, 3),
        ({"heads": 32}, 2),
        # A unit is 24,576 of 389,184 + 2 x 97 x 64 + ... parameters, so 2 % are two of 8 layers'.
        ({"parameters": "-2%"}, 1),
        ({"bytes": "-9%"}, 2),
        ({"cache": "-25%"}, 1),
        ({"cache": "-25.1%"}, 2),
        ({"cache": "-75%"}, 3),
    ],
)
def test_a_budget_is_met_by_the_fewest_units_of_every_layer(
    budget: dict[str, Any], each: int
) -> None:
    asked = problem(budget=budget)
    check_budget(asked)
    assert asked.space.uniform == each
    assert len(asked.space.removable) == 8 * 4, "layer 0 too"
    savings = plan_savings(asked)
    assert (savings.removed_units, savings.stock_units) == (8 * each, 4 - each)
    assert savings.dense_parameters == savings.stored_parameters
    if asked.budget.share is None:
        return
    counted, share = asked.budget.share
    saved = 1 - savings.stored_cache / savings.base_cache
    if counted != "cache":
        saved = savings.removed_parameters / savings.base_parameters
    assert saved >= share > saved * (each - 1) / each


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            {"ratio": 0.3},
            r"asks for 9 of 32 units.*plan\.budget\.ratio=0\.25 or 0\.5 \(1 or 2 of 4",
        ),
        ({"ratio": 0.1}, r"asks for 3 of 32 .*ratio=0\.25 \(1 of 4 KV groups a layer\)"),
        ({"ratio": 0.01}, r"asks for 0 of 32 .*ratio=0\.25 \(1 of 4"),
        ({"ratio": 0.99}, r"asks for 31 of 32 .*ratio=0\.75 \(3 of 4"),
        ({"heads": 18}, r"asks for 9 of 32 units"),
        (
            {"cache": "-80%"},
            r"asks for -80.*%; 3 of the 4 KV groups of every layer save -75\.00%",
        ),
    ],
)
@pytest.mark.parametrize("strategy", ["loss", "random", "magnitude"])
def test_what_no_whole_number_meets_names_the_nearest(
    budget: dict[str, Any], says: str, strategy: str
) -> None:
    more = {} if strategy == "loss" else {"calibration_blocks": ...}
    with pytest.raises(PostshareError, match=says) as error:
        check_budget(problem(budget=budget, strategy=strategy, **more))
    assert "\n" not in str(error.value)
    nearest = str(error.value).partition("plan.budget.ratio=")[2].split(" ")[0]
    if nearest:  # and it is one
        check_budget(problem(budget={"ratio": float(nearest)}))


def test_auto_refuses_the_same_and_counts_kv_heads() -> None:
    auto: dict[str, Any] = {"strategy": "auto", "action": ...}
    with pytest.raises(PostshareError, match=r"nearest is plan\.budget\.ratio=0\.25 or 0\.5"):
        check_budget(problem(**auto, budget={"ratio": 0.3}))
    check_budget(problem(**auto, budget={"ratio": 0.25}))
    # One KV head saves 87.5 % of the cache of 4, and then nothing is left to remove.
    check_budget(problem(**auto, budget={"cache": "-75%"}))
    with pytest.raises(PostshareError, match="as many removals in every layer and KV groups save"):
        check_budget(problem(**auto, budget={"cache": "-90%"}))


def test_one_unit_a_layer_and_biases_are_refused() -> None:
    mqa = LlamaShape(97, 64, 176, 8, 8, 1, 8, 128)
    with pytest.raises(PostshareError, match=r"plan\.uniform: a layer has one of the KV groups"):
        check_budget(problem(mqa, budget={"ratio": 0.5}))
    biased = LlamaShape(97, 64, 176, 8, 8, 4, 8, 128, mlp_bias=True)
    with pytest.raises(PostshareError, match="6 heads do not divide hidden_size 64, which no"):
        check_budget(problem(biased))
    check_budget(problem(biased, budget={"ratio": 0.5}))


def test_the_dry_run_of_a_7b(home: Path) -> None:
    section = UNIFORM | {"budget": {"ratio": 0.25}}
    of = recipe(home, Path("x"), plan=section, model={"path": "meta-llama/Llama-2-7b-hf"})
    shape, _ = find_shape(of.model)
    console = Console(width=160, record=True, file=io.StringIO())
    print_dry_run(of, console=console)
    said = " ".join(console.export_text().split())
    assert "256 of 1,024 units (heads) removed, 25.0%, 8 in every layer" in said
    exports = disk_space(of, shape).exports
    stored = 6_738_415_616 - 256 * 4 * 128 * 4096
    assert exports == 2 * 2 * stored  # compact and dense, the same tensors, 2 bytes each
    assert f"compact {2 * stored / 1e9:.1f} GB, dense {2 * stored / 1e9:.1f} GB" in said


# --- the choice -----------------------------------------------------------------------------------


def test_weights_and_chance_choose_layer_by_layer(home: Path) -> None:
    weights, config = WeightsFolder(home / "base"), base_model(home).config
    more: dict[str, Any] = {"calibration_blocks": ..., "budget": {"ratio": 0.5}}
    of = problem(config, strategy="magnitude", **more)
    found, _ = find_ties(of, weights)
    norms = unit_norms(weights, of.layout)
    expected = [(at, int(u)) for at in range(LAYERS) for u in norms[at].argsort()[:2]]
    assert found.removed == tuple(sorted(expected))
    drawn = [
        find_ties(problem(config, strategy="random", seed=seed, **more), weights)[0]
        for seed in (0, 0, 1)
    ]
    assert [gone(each) for each in drawn] == [[2] * LAYERS] * 3
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_search_takes_what_was_measured_best(home: Path, tmp_path: Path) -> None:
    """One unit of each layer; losses are those of another implementation."""
    of = made(home, tmp_path / "run")
    plan(of)
    found = SharingPlan.load(of.folder / "plan.json")
    assert gone(found) == [1] * LAYERS
    search = read(of.folder, "plan-search.json")
    layers = [step["actions"][0]["target"][0] for step in search["path"]]
    assert sorted(layers) == list(range(LAYERS)), "one unit in each layer"
    count = len(Run(of, start(of)).blocks[0])
    tokens = ids(of, count)[[0, count // 3, 2 * count // 3]]
    base = base_model(home)
    loss = reference_loss(base, found, tokens)
    assert search["loss"] == pytest.approx(loss, abs=1e-5)
    # Without the slopes of this text, by which nothing is chosen.
    batches = [{"input_ids": row[None]} for row in tokens]
    slope = estimate_sensitivity(base, batches, []).removal.first

    def lasting(plan: SharingPlan) -> float:
        return reference_loss(base, plan, tokens) - sum(float(slope[u]) for u in plan.removed)

    first = tuple(search["path"][0]["actions"][0]["target"])
    alone = {}
    for line in (of.folder / SEARCH_CACHE).read_text().splitlines():
        entry = json.loads(line)
        actions = json.loads(entry["key"].split(" ")[1]) if entry["key"][0] == "l" else []
        if len(actions) == 1:
            (target, *_), only = actions[0], SharingPlan(removed=(tuple(actions[0][0]),))
            alone[tuple(target)] = lasting(only)
    assert len(alone) == 8, "the shortlist"
    assert alone[first] == pytest.approx(min(alone.values()), abs=1e-6)


@pytest.mark.parametrize("strategy", ["gradient", "auto", "evolutionary"])
def test_other_strategies_take_as_many_of_every_layer(
    home: Path, tmp_path: Path, strategy: str
) -> None:
    section: dict[str, Any] = {"strategy": strategy, "budget": {"bytes": "-10%"}}
    if strategy == "evolutionary":
        section |= {"strategy": "loss", "search": "evolutionary", "budget": {"ratio": 0.5}}
    if strategy == "auto":
        section |= {"action": "tie", "objective": "bytes"}
    of = made(home, tmp_path / "run", section)
    plan(of)
    found = SharingPlan.load(of.folder / "plan.json")
    assert not found.ties
    assert not found.spans
    each = set(gone(found))
    assert len(each) == 1
    saved = found.savings(base_model(home).config)
    if strategy != "evolutionary":
        assert saved.removed_parameters >= 0.1 * saved.base_parameters
        fewer = saved.removed_parameters - LAYERS * 4 * 8 * 32
        assert fewer < 0.1 * saved.base_parameters or found.kv_heads is not None


def test_auto_tries_kv_heads_and_no_spans(home: Path, tmp_path: Path) -> None:
    of = made(home, tmp_path, {"strategy": "auto", "action": "tie", "budget": {"cache": "-60%"}})
    current = Run(of, start(of))
    model, blocks = base_model(home), current.blocks[0]
    text = [{"input_ids": blocks[i]["input_ids"][None]} for i in (0, 5)]
    found = search_auto(PlanProblem(of.plan, model.config), model, text, tmp_path)
    assert {point.plan.kv_heads for point in found.structures} == {1, 2}
    every = [candidate.plan for candidate in found.candidates]
    assert every
    for each in every:
        assert not each.spans
        assert not each.ties
        assert len(set(gone(each))) == 1
        savings = each.savings(model.config)
        assert savings.stored_cache <= 0.4 * savings.base_cache
    # 3 of 4 units, or one KV head, which alone meets it; and 1 of the 2 units of 2 KV heads.
    assert {(each.kv_heads, gone(each)[0]) for each in every} >= {(None, 3), (1, 0)}
    within = PlanProblem(of.plan, model.config, SharingPlan(kv_heads=2))
    assert (full_space(within).uniform, full_space(within).most()) == (1, LAYERS * 2 * 8)


# --- the whole run --------------------------------------------------------------------------------


def command(*arguments: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_reconstructed_healed_with_a_teacher_and_loaded_by_anyone(
    home: Path, tmp_path: Path, kv_heads: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 of 4 heads, a Mistral by name; or 2 of 4 on one KV head, a Llama."""
    of = made(
        home,
        tmp_path / "run",
        {"budget": {"ratio": 0.25 if kv_heads is None else 0.5}},
        **({} if kv_heads is None else {"heads": {"kv_heads": kv_heads}}),
        materialize={"reconstruct": True, "calibration_blocks": 2, "heal_steps": 3},
        distill={"weight": 0.5},
        export={"dtype": "float32"},
    )
    run(of)
    found = SharingPlan.load(of.folder / "plan.json")
    assert gone(found) == [1] * LAYERS
    heads, kv = (3, 3) if kv_heads is None else (2, 1)
    shipped = of.folder / "export" / "dense"
    stock, info = AutoModelForCausalLM.from_pretrained(shipped, output_loading_info=True)
    assert not any(info.values())
    assert type(stock) is (MistralForCausalLM if heads == 3 else LlamaForCausalLM)
    assert (stock.config.num_attention_heads, stock.config.num_key_value_heads) == (heads, kv)
    compact = AutoModelForCausalLM.from_pretrained(of.folder / "export" / "compact")
    tokens = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (stock(tokens).logits - compact(tokens).logits).abs().max() <= 1e-5
        blocks = Run(of, start(of)).blocks[1]
        held = torch.stack([blocks[i]["input_ids"] for i in range(of.evaluate.blocks)])
        loss = stock(held, labels=held).loss.item()
    summary = read(of.folder, "summary.json")
    assert summary["perplexity"]["post"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert summary["perplexity"]["post"] < summary["perplexity"]["direct"]
    assert summary["bytes"]["dense"] == summary["bytes"]["compact"] < summary["bytes"]["base"]
    assert sum(p.numel() for p in stock.parameters()) == summary["parameters"]["stored"]

    said = capsys.readouterr().out
    name = type(stock).__name__
    sizes = ", ".join(map(str, (1, 3) if heads == 3 else (1,)))
    assert f"stock     {name} of {heads} heads a layer (tensor parallel {sizes})" in said
    report = " ".join((of.folder / "report.html").read_text().split())
    assert "A stock model with fewer heads" in report
    assert f"{heads} of 4" in report

    if kv_heads is None:
        return
    # Ours read it as any Llama; so do a dry run and a run that begins with it.
    assert command("generate", shipped, "--prompt", "Every stage", "--tokens", "3") == 0
    assert "Every stage" in capsys.readouterr().out


def test_the_dense_export_alone_is_judged_and_is_a_base(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = made(home, tmp_path / "run", export={"formats": ["dense"], "dtype": "float32"})
    run(of)
    shipped = of.folder / "export" / "dense"
    assert [path.name for path in shipped.parent.iterdir()] == ["dense"]
    assert json.loads((shipped / "config.json").read_text())["model_type"] == "mistral"
    capsys.readouterr()
    out = tmp_path / "out.json"
    held = home / "text.jsonl"
    options = ("--text", held, "--context", "64", "--output", out)
    assert command("evaluate", shipped, *options) == 0
    assert "Mistral" not in capsys.readouterr().out
    assert command("generate", shipped, "--prompt", "Every stage", "--tokens", "3") == 0
    capsys.readouterr()
    # Shared again: ties among the heads that are left, exported as what it is.
    again = recipe(
        home,
        tmp_path / "again",
        model={"path": str(shipped), "tokenizer": "demo-base"},
        plan={"strategy": "cosine", "budget": {"heads": 3}, "share": ["q", "k", "v", "o"]},
        train={"steps": 2},
        export={"dtype": "float32"},
    )
    console = Console(width=160, record=True, file=io.StringIO())
    print_dry_run(again, console=console)
    assert "3 of 18 units (heads) tied" in console.export_text()
    run(again)
    stock = AutoModelForCausalLM.from_pretrained(again.folder / "export" / "dense")
    assert type(stock) is MistralForCausalLM
    compact = AutoModelForCausalLM.from_pretrained(again.folder / "export" / "compact")
    tokens = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (stock(tokens).logits - compact(tokens).logits).abs().max() <= 1e-5
