"""Removed units from the recipe to the summary: what is chosen, refused, healed and said."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models import AttentionSpan, HeadTie, PostshareError, SharingPlan
from sa_models.heads import HeadLayout
from sa_models.savings import llama_parameters
from sa_models.weights.compact_folder import open_weights
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import tiny
from train.distributed.engines.start import start
from train.estimate.dry_run import print_dry_run
from train.estimate.llama_shapes import LlamaShape, find_shape
from train.estimate.parameters import disk_space, plan_savings
from train.evaluation.summary import figures_of, saved_sentence, summary_table
from train.models.base_model import load_dense
from train.planning.check import check_budget
from train.planning.find import find_ties, requested_ratio
from train.planning.plan_maps import save_ties
from train.planning.problem import PlanProblem
from train.recipe.recipe import PlanSection, Recipe, validate
from train.recipe.warnings import recipe_warnings
from train.stages.pipeline import run
from train.stages.run import Run, print_whole
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)


def recipe(folder: Path, base: Any, text: Any, **sections: Any) -> Recipe:
    value: dict[str, Any] = {
        "name": "removal",
        "output_dir": str(folder),
        "model": {"path": str(base)},
        "data": {"train": str(text), "validation": str(text), "sequence_length": 64},
        "plan": {"strategy": "random", "action": "remove", "budget": {"ratio": 0.3}},
        "train": {"steps": 0, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "materialize": {"heal_steps": 3},
        "evaluate": {"blocks": 4},
    }
    for name, section in sections.items():
        value[name] = value.get(name, {}) | section
    return validate({name: section for name, section in value.items() if section is not None})


def printed(thing: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


TEXT = "A layer attends with the heads that are left of it; nothing else is stored."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = TEXT.split()
    rows = [" ".join((words[i % 14 :] + words[: i % 14]) * 3) for i in range(60)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


# --- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"plan": {"share": ["q", "k"]}}, "action remove ignores share"),
        ({"plan": {"strategy": "released"}}, "strategy released ignores action"),
        (
            {"plan": {"strategy": "file", "path": "p.json", "budget": None}},
            "strategy file ignores action",
        ),
        (
            {"plan": {"strategy": "none", "budget": None}, "materialize": {"heal_steps": 0}},
            "strategy none ignores action",
        ),
        ({"plan": {"action": "prune"}}, "plan.action is 'prune'"),
        ({"penalty": {"kind": "mse"}}, "plan.action is remove, nothing to pull"),
        ({"materialize": {"merge": "mean"}}, "plan.action is remove, nothing is merged"),
        ({"plan": {"action": "drop"}, "penalty": {"kind": "mse"}}, "plan.action is drop, nothing"),
        ({"plan": {"action": "drop"}, "residual": {"rank": 2}}, "residual: nothing is tied"),
    ],
)
def test_what_would_have_no_effect_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(PostshareError) as error:
        recipe(Path("unused"), "demo-base", "stdlib", **sections)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_pulled_and_training_before_removing_is_warned_about() -> None:
    held_out = {"validation": {"path": "stdlib", "split": "validation"}}
    made = recipe(Path("unused"), "demo-base", "stdlib", data=held_out)
    assert (made.penalized, recipe_warnings(made)) == (False, [])
    trained = recipe(Path("unused"), "demo-base", "stdlib", data=held_out, train={"steps": 5})
    assert not trained.penalized
    (line,) = recipe_warnings(trained)
    assert "set materialize.heal_steps" in line


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["cosine", "random"])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_the_removed_units_are_the_targets_of_the_ties(
    tmp_path: Path, strategy: str, kv_heads: int
) -> None:
    model = tiny.model(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=kv_heads)
    model.save_pretrained(tmp_path)
    section = {"strategy": strategy, "budget": {"ratio": 0.2}, "seed": 3}

    def found(action: str, structure: SharingPlan) -> SharingPlan:
        made = PlanSection.model_validate(section | {"action": action})
        problem = PlanProblem(made, model.config, structure)
        plan, _ = find_ties(problem, WeightsFolder(tmp_path))
        assert plan_savings(problem) == plan.savings(model.config)
        assert plan.spans == structure.spans
        return plan

    plain, spans = SharingPlan(), SharingPlan(spans=(AttentionSpan(2, (3,)),))
    removed = found("remove", plain)
    assert removed.ties == ()
    assert len(removed.removed) == kv_heads
    assert set(removed.removed) == {tie.target for tie in found("tie", plain).ties}
    assert len(found("tie", spans).ties) == kv_heads
    beside = found("remove", spans)
    assert beside.ties == ()
    assert len(beside.removed) == kv_heads
    assert {layer for layer, _ in beside.removed} <= {1, 4}


def test_disk_space_holds_the_zeros_of_the_dense_form() -> None:
    shape = LlamaShape()  # a Llama-2-7B
    sizes = {}
    for formats in (["compact"], ["dense"], ["compact", "dense"]):
        made = recipe(Path("x"), "x", "x", export={"formats": formats, "dtype": "bfloat16"})
        sizes[tuple(formats)] = disk_space(made, shape).exports
    removed = 307 * 4 * 128 * 4096  # floor(0.3 * 1,024) heads, in q, k, v and o
    assert sizes["dense",] == 2 * llama_parameters(shape)
    assert sizes["compact",] == sizes["dense",] - 2 * removed
    assert sizes["compact", "dense"] == sizes["compact",] + sizes["dense",]


def test_a_budget_that_would_empty_a_layer_is_refused_at_once(tmp_path: Path) -> None:
    model = tiny.model(num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    section = PlanSection.model_validate(
        {"strategy": "random", "action": "remove", "budget": {"heads": 4}}
    )
    says = r"asks for 4 of 8 units, and 3 can be removed \(every layer keeps one, .*action=drop"
    problem = PlanProblem(section, model.config)
    with pytest.raises(PostshareError, match=says):
        check_budget(problem)
    with pytest.raises(PostshareError, match=says):
        find_ties(problem, WeightsFolder(tmp_path))


def test_the_dry_run_of_a_7b() -> None:
    made = recipe(Path("unused"), "meta-llama/Llama-2-7b-hf", "stdlib")
    shape, _ = find_shape(made.model)
    assert isinstance(shape, LlamaShape)
    console = Console(width=160, record=True, file=io.StringIO())
    print_dry_run(made, console=console)
    said = " ".join(console.export_text().split())
    gone = 307 * 4 * 128 * 4096
    assert "307 of 1,024 units (heads) removed, 30.0%" in said
    assert f"{gone:,}" in said
    assert "367,104, 30.0% less than stock" in said  # of the cache: 717 of 1,024 heads, 2 bytes
    assert "dense 13.5 GB" in said


def test_the_dry_run_of_dropped_layers() -> None:
    """10 % of the cache are four of 32 layers; with each goes a norm of 4,096."""
    section = {"action": "drop", "budget": {"cache": "-10%"}}
    made = recipe(Path("unused"), "meta-llama/Llama-2-7b-hf", "stdlib", plan=section)
    console = Console(width=160, record=True, file=io.StringIO())
    print_dry_run(made, console=console)
    said = " ".join(console.export_text().split())
    assert "the attention of 4 of 32 layers dropped, 12.5% of the units" in said
    assert f"{4 * (4 * 4096 * 4096 + 4096):,}" in said
    assert "458,752, 12.5% less than stock" in said


# --- the whole run --------------------------------------------------------------------------------


def check_exports(folder: Path) -> dict[str, Any]:
    """The two exports agree with each other and with the summary, which is returned."""
    summary = json.loads((folder / "summary.json").read_text())
    compact = AutoModelForCausalLM.from_pretrained(folder / "export/compact", dtype=torch.float32)
    dense, info = LlamaForCausalLM.from_pretrained(
        folder / "export/dense", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (compact(ids).logits - dense(ids).logits).abs().max()
    assert difference <= 1e-5
    assert sum(p.numel() for p in compact.parameters()) == summary["parameters"]["stored"]
    assert sum(p.numel() for p in dense.parameters()) == summary["parameters"]["base"]
    return summary


def test_the_demo_base_is_pruned_and_healed(tmp_path: Path, text: Path) -> None:
    made = recipe(tmp_path / "run", "demo-base", text)
    run(made)
    summary = check_exports(made.folder)
    assert summary["heads"] == {
        "requested_ratio": 0.3,
        "effective_ratio": 19 / 64,
        "total": 64,
        "tied": 0,
        "removed": 19,
    }
    # Heads of 16, hidden 128.
    assert summary["parameters"]["base"] - summary["parameters"]["stored"] == 19 * 4 * 16 * 128
    cache = summary["cache"]
    assert cache["stored_elements_per_token"] == cache["base_elements_per_token"] - 19 * 32
    rows = read_rows(made.folder / "heal" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["penalty"] is None for row in rows)
    # Healing has moved the units that are left, and only the export of it is what was evaluated.
    assert summary["perplexity"]["post"] < summary["perplexity"]["direct"]
    assert (made.folder / "plan-ties.png").read_bytes().startswith(b"\x89PNG")
    plan = SharingPlan.load(made.folder / "plan.json")
    assert len(plan.removed) == 19
    healed = open_weights(made.folder / "heal" / "weights")
    dense = WeightsFolder(made.folder / "export" / "dense")
    for layer, unit in plan.removed:
        rows_of_unit = slice(16 * unit, 16 * unit + 16)
        for p in "qkvo":
            key = (slice(None), rows_of_unit) if p == "o" else rows_of_unit
            name = HeadLayout.parameter_name(layer, p)
            assert not dense.read(name)[key].any()
            assert not healed.read(name)[key].any()
    table = printed(summary_table(summary))
    assert " removed " in table
    assert "19/64" in table
    assert "PostShare" not in table
    narrow = io.StringIO()
    print_whole(Console(file=narrow, width=60), summary_table(summary))
    assert f" {summary['parameters']['stored']:,} " in narrow.getvalue()
    assert f" {summary['bytes']['compact']:,}\n" in narrow.getvalue()
    said = saved_sentence(summary)
    assert said.startswith(
        "saved     29.7% of the heads removed: 29.7% of the attention parameters"
    )
    assert "tied" not in said
    figures = figures_of(summary)
    assert figures is not None
    stored, base = 1_869_952 - 19 * 4 * 16 * 128, 1_869_952
    assert figures.weight_bytes == summary["bytes"]["compact"]
    assert figures.weight_ratio == stored / base
    size = figures.stock_cache_bytes // (8 * 2 * 128)
    assert (size, figures.cache_bytes) == (2, 45 * 2 * 16 * size)
    rows = figures.rows()
    assert rows["cache bytes per token"] == "2,880, 29.7% less than stock"
    assert rows["cache of 8 x 512 tokens"] == "11.8 MB, stock 16.8 MB"
    assert rows["decode time against stock"] == "not measured"
    ratio = summary["perplexity"]["post"] / summary["perplexity"]["continued"]
    assert rows["perplexity against continued"] == f"{ratio - 1:+.1%}"
    for kind in ("compact", "dense"):
        notes = json.loads((made.folder / "export" / kind / "manifest.json").read_text())["notes"]
        assert notes["figures"] == rows


def test_whole_layers_are_dropped_reconstructed_and_healed_with_a_teacher(
    tmp_path: Path, text: Path
) -> None:
    """What a dropped layer's attention gives is nothing, to the teacher too."""
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={"action": "drop", "budget": {"bytes": "-8%"}, "seed": 1},
        materialize={"reconstruct": True, "calibration_blocks": 2, "heal_steps": 2},
        distill={"hidden_weight": 0.1, "attention_weight": 0.1},
        evaluate={"blocks": 2, "continued": False},
    )
    run(made)
    summary = check_exports(made.folder)
    plan = SharingPlan.load(made.folder / "plan.json")
    config = WeightsFolder(made.folder / "export" / "dense").config
    dropped = plan.dropped(plan.layout(config))
    saved = summary["parameters"]["base"] - summary["parameters"]["stored"]
    assert saved == len(dropped) * (8 * 4 * 16 * 128 + 128)  # eight heads of 16, a norm of 128
    assert saved >= 0.08 * summary["parameters"]["base"] > saved - saved // len(dropped)
    cache = summary["cache"]
    layers = 8 - len(dropped)
    assert cache["stored_elements_per_token"] == cache["base_elements_per_token"] * layers // 8
    healed = open_weights(made.folder / "heal" / "weights")
    for layer in dropped:
        for p in "qkvo":
            assert not healed.read(HeadLayout.parameter_name(layer, p)).any()
        assert (healed.read(HeadLayout.norm_name(layer)) == 1).all()
    assert summary["perplexity"]["post"] < summary["perplexity"]["direct"]
    manifest = json.loads((made.folder / "export" / "compact" / "manifest.json").read_text())
    assert manifest["heads"]["dropped_layers"] == len(dropped)
    card = (made.folder / "export" / "compact" / "README.md").read_text()
    assert f"| layers without attention | {len(dropped)} |" in card
    assert (made.folder / "report.html").is_file()


def test_a_plan_file_with_ties_and_removed_units(tmp_path: Path, text: Path) -> None:
    plan = SharingPlan(
        (HeadTie((2, 0), (1, 3), ("q", "k", "v", "o")), HeadTie((3, 1), (0, 1), ("v",))),
        removed=((1, 0), (2, 2), (3, 0)),
    )
    plan.save(tmp_path / "plan.json")
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={
            "strategy": "file",
            "path": str(tmp_path / "plan.json"),
            "budget": None,
            "action": "tie",
        },
        train={"steps": 2},
        materialize={"heal_steps": 2, "merge": "mean"},
        evaluate={"blocks": 2, "continued": False},
    )
    layout = HeadLayout.from_config(WeightsFolder(Run(made, start(made)).base).config)
    assert requested_ratio(made.plan, plan, layout) == 5 / 64
    run(made)
    summary = check_exports(made.folder)
    heads = summary["heads"]
    assert (heads["tied"], heads["removed"], heads["effective_ratio"]) == (2, 3, 5 / 64)
    assert all(row["penalty"] > 0 for row in read_rows(made.folder / "metrics.jsonl"))
    table = printed(summary_table(summary))
    assert " heads tied " in table
    assert " + removed " in table
    assert " 2 + 3/64 " in table
    assert " continued " not in table  # neither the model nor a column for it
    said = saved_sentence(summary)
    assert "3.1% of the heads tied, 4.7% of the heads removed: " in said


@pytest.mark.usefixtures("rendered")
def test_the_picture_marks_removed_units(tmp_path: Path) -> None:
    """It differs from that of the same plan without them."""
    layout = HeadLayout(3, 32, 4, 4, 8)
    ties = (HeadTie((2, 0), (1, 3), ("q",)),)
    for name, plan in (
        ("both", SharingPlan(ties, removed=((1, 0), (1, 1)))),
        ("ties", SharingPlan(ties)),
        ("removed", SharingPlan(removed=((1, 0), (1, 1)))),
    ):
        save_ties(plan, layout, tmp_path / f"{name}.png")
    assert len({file.read_bytes() for file in tmp_path.glob("*.png")}) == 3


def test_removing_heads_of_a_real_base(shared: Path, tmp_path: Path) -> None:
    """The perplexity is recomputed from a stock Llama whose columns of o are zeroed by index."""
    made = recipe(
        tmp_path / "run",
        shared / "models" / "mixed7M",
        shared / "text" / "mixed-validation.jsonl",
        data={"sequence_length": 256},
        materialize={"heal_steps": 0},
        evaluate={"blocks": 8},
    )
    run(made)
    summary = check_exports(made.folder)
    plan = SharingPlan.load(made.folder / "plan.json")
    assert summary["heads"]["removed"] == len(plan.removed) == 19
    model = load_dense(shared / "models" / "mixed7M", "sdpa")
    with torch.no_grad():
        for layer, head in plan.removed:
            o = model.model.layers[layer].self_attn.o_proj.weight
            o[:, 32 * head : 32 * head + 32] = 0
        blocks = Run(made, start(made)).blocks[1]
        ids = torch.stack([blocks[i]["input_ids"] for i in range(8)])
        loss = model(ids, labels=ids).loss.item()
    assert summary["perplexity"]["direct"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert summary["perplexity"]["direct"] > 1.05 * summary["perplexity"]["base"]
