"""Plans chosen on calibration text, through recipe and pipeline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from sa_models import HeadTie, SharingPlan
from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS
from sa_models.scores.fisher import estimate_sensitivity
from sa_models.scores.magnitude import unit_norms
from sa_models.search.algorithms import EvolutionOptions
from sa_models.search.budget import parse_share
from sa_models.spans import ranges
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.spans_base import (
    HEADS,
    LAYERS,
    base_model,
    calibration_ids,
    ids,
    read,
    recipe,
    reference_loss,
)
from train.common.run_files import SEARCH_CACHE
from train.data.calibration import calibration_batches
from train.distributed.engines.start import start
from train.estimate.parameters import plan_savings
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.planning.search import loss_search
from train.planning.search.loss_search import choose_by_importance, unlike
from train.recipe.sections.plan import PlanSection
from train.stages.pipeline import plan, run
from train.stages.run import Run

pytestmark = pytest.mark.usefixtures("sketched")

BLOCKS = 3
LOSS = {"strategy": "loss", "budget": {"ratio": 0.2}, "calibration_blocks": BLOCKS}


@pytest.mark.usefixtures("rendered")
def test_the_plan_is_the_best_of_what_was_measured(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One unit. What was measured is measured again by another implementation."""
    section = LOSS | {"budget": {"heads": 1}, "share": ["q", "k", "v", "o"]}
    made = recipe(home, tmp_path / "run", plan=section)
    plan(made)
    found = SharingPlan.load(made.folder / "plan.json")
    (tie,) = found.ties
    tokens, base = calibration_ids(made, BLOCKS), base_model(home)
    search = read(made.folder, "plan-search.json")
    dense = reference_loss(base, SharingPlan(), tokens)
    assert search["base_loss"] == pytest.approx(dense, abs=1e-5)
    assert search["loss"] == pytest.approx(reference_loss(base, found, tokens), abs=1e-5)
    batches = [{"input_ids": row[None]} for row in tokens]
    estimates = estimate_sensitivity(base, batches, [PROJECTIONS])
    slopes = estimates.ties[PROJECTIONS].first
    rises = {}
    for line in (made.folder / SEARCH_CACHE).read_text().splitlines():
        entry = json.loads(line)
        actions = json.loads(entry["key"].split(" ")[1]) if entry["key"][0] == "l" else []
        if actions:
            ((target, source, projections),) = actions
            other = SharingPlan(ties=(HeadTie(tuple(target), tuple(source), tuple(projections)),))
            loss = reference_loss(base, other, tokens)
            assert entry["value"] == pytest.approx(loss, abs=1e-5)
            rises[tuple(target), tuple(source)] = loss - dense - float(slopes[(*target, *source)])
    assert len(rises) == 8
    best = min(rises, key=rises.__getitem__)
    assert (tie.target, tie.source) == best
    (rise,) = search["loss_rises"]
    assert rise["loss_rise"] == pytest.approx(rises[best], abs=2e-5)
    removal = float(estimates.removal.second[tie.target])
    assert rise["removal_rise"] == pytest.approx(removal, rel=1e-4)
    dearer = rises[best] > removal
    assert search["dearer_than_removal"] == [list(tie.target)] * dearer
    (step,) = search["path"]
    assert step["actions"] == [
        {
            "action": "tie",
            "target": list(tie.target),
            "source": list(tie.source),
            "projections": list("qkvo"),
        }
    ]
    savings = found.savings(base.config)
    assert step["parameters_saved"] == savings.removed_parameters
    assert step["perplexity"] == pytest.approx(math.exp(search["loss"]))
    assert search["forward_passes"] <= search["forward_passes_at_most"]
    picture = image.imread(made.folder / "plan-pareto.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.05
    page, shown = (made.folder / "plan-search.md").read_text(), capsys.readouterr().out
    note = (
        f"of 1 tied units 1 would cost less if they were removed: an estimated {removal:.4f} nats"
    )
    assert (note in page) == ("would cost less if they were removed" in shown) == dearer
    assert f"| tie [{tie.target[0]}, {tie.target[1]}] <- " in page
    assert f"cost      perplexity {math.exp(dense):.2f} to " in shown


@pytest.mark.parametrize("search", ["greedy", "evolutionary"])
def test_plans_are_the_same_every_time_and_resume(
    home: Path, tmp_path: Path, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loss_search,
        "EvolutionOptions",
        lambda seed: EvolutionOptions(population=4, generations=2, seed=seed),
    )
    section = LOSS | {"search": search, "seed": 3 if search == "evolutionary" else 0}
    plans = []
    for folder in ("one", "two"):
        made = recipe(home, tmp_path / folder, plan=section)
        plan(made)
        plans.append(SharingPlan.load(made.folder / "plan.json"))
        found = read(made.folder, "plan-search.json")
        assert found["forward_passes"] > 0
        losses = [step["loss"] for step in found["path"]]
        assert losses[-1] == found["loss"]
    assert plans[0] == plans[1]
    assert len({tie.target for tie in plans[0].ties}) == int(0.2 * LAYERS * HEADS)
    # Stopped before the plan was written: nothing is measured again.
    (made.folder / "plan.json").unlink()
    plan(made)
    assert SharingPlan.load(made.folder / "plan.json") == plans[0]
    again = read(made.folder, "plan-search.json")
    assert (again["forward_passes"], again["estimates"]) == (0, 0)
    assert again["path"] == found["path"]


def test_the_whole_pipeline(home: Path, tmp_path: Path) -> None:
    made = recipe(home, tmp_path / "run", plan=LOSS, train={"steps": 1})
    run(made)
    summary = read(made.folder, "summary.json")
    assert summary["heads"]["effective_ratio"] == int(0.2 * LAYERS * HEADS) / (LAYERS * HEADS)


def test_spans_stay_as_they_are(home: Path, tmp_path: Path) -> None:
    spans = [{"leader": 2, "followers": [3]}]
    made = recipe(home, tmp_path / "run", plan=LOSS, spans=spans)
    plan(made)
    found = SharingPlan.load(made.folder / "plan.json")
    assert [(s.leader, s.followers) for s in found.spans] == [(2, (3,))]
    layers = {layer for tie in found.ties for layer, _ in (tie.target, tie.source)}
    assert 3 not in layers
    search = read(made.folder, "plan-search.json")
    for part, loss in ((SharingPlan(spans=found.spans), "base_loss"), (found, "loss")):
        measured = reference_loss(base_model(home), part, calibration_ids(made, BLOCKS))
        assert search[loss] == pytest.approx(measured, abs=1e-5)


def test_spans_and_ties_that_are_both_searched_fill_ten_lines(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(recipe(home, tmp_path / "run", plan=LOSS, spans={"strategy": "loss", "layers": 1}))
    said = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in said if not line.startswith(("files", "picture"))]
    expected = ["cost", "cost", "plan", "spans", "saved", "weights", "cache", "ties", "tables"]
    assert names[:9] == expected
    assert len(names) <= 10
    assert max(map(len, said)) <= 80 or str(tmp_path) in max(said, key=len)


def halves(home: Path, folder: Path, budget: dict[str, float]) -> tuple[int, int]:
    """Units that each of two blocks alone would choose: in common, and of each."""
    made = recipe(home, folder, plan=LOSS | {"budget": budget, "calibration_blocks": 2})
    plan(made)
    found = read(folder, "plan-search.json")["halves"]
    return found["common"], found["units"]


def test_little_text_is_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert halves(home, tmp_path / "run", {"heads": 2}) == (0, 2)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "not stable" in line)
    assert "agree on 0 of 2 units" in line
    assert "plan.calibration_blocks=50 is expected to give 80%" in line


def test_enough_text_is_not_mentioned(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert halves(home, tmp_path / "run", {"ratio": 0.4}) == (9, 9)
    assert "not stable" not in capsys.readouterr().err


def test_text_unlike_that_of_the_evaluation_is_said() -> None:
    assert unlike(2.0, 2.5) is None
    assert unlike(2.5, 2.0) is None
    line = unlike(2.21, 3.55)
    assert line is not None
    assert "2.21 nats per token on the calibration text and 3.55 on the evaluation text" in line
    assert "1.6 times as much" in line
    assert unlike(3.55, 2.21) is not None


def test_the_evaluation_text_is_measured_with_the_base(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the search, which has changed the model and must have restored it."""
    asked: list[tuple[float, ...]] = []
    monkeypatch.setattr("train.stages.plan.unlike", lambda *losses: asked.append(losses))
    made = recipe(home, tmp_path / "run", plan=LOSS | {"calibration_blocks": 2})
    plan(made)
    ((_, measured),) = asked
    expected = reference_loss(base_model(home), SharingPlan(), ids(made, 2, validation=True))
    assert measured == pytest.approx(expected, abs=1e-5)


# --- pruning controls -----------------------------------------------------------------------------


def test_magnitude_and_gradient_remove_the_least(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharingPlan, "validate", lambda plan, config: None)
    base = base_model(home)
    section = {"strategy": "magnitude", "action": "remove", "budget": {"ratio": 0.2}}
    made = recipe(home, tmp_path / "run", plan=section)
    reader = WeightsFolder(home / "base")
    found, _ = find_ties(PlanProblem(made.plan, base.config), reader)

    def value(layer: int, unit: int, name: str) -> float:
        rows = slice(unit * 8, unit * 8 + 8)
        total = 0.0
        for p in PROJECTIONS:
            weight = getattr(base.model.layers[layer].self_attn, f"{p}_proj").weight
            part = weight[:, rows] if p == "o" else weight[rows]
            if name == "magnitude":
                total += part.square().sum().item()
            else:
                slope = weight.grad[:, rows] if p == "o" else weight.grad[rows]
                total += (part * slope).sum().item()
        return abs(total)

    units = [(layer, unit) for layer in range(1, LAYERS) for unit in range(HEADS)]
    least = sorted(units, key=lambda u: value(*u, "magnitude"))[:4]
    assert found.removed == tuple(sorted(least))

    section |= {"strategy": "gradient", "calibration_blocks": BLOCKS}
    made = recipe(home, tmp_path / "run", plan=section)
    blocks = Run(made, start(made)).blocks[0]
    found = choose_by_importance(
        PlanProblem(made.plan, base.config),
        base_model(home),
        calibration_batches(blocks, BLOCKS, made.evaluate.batch_size, torch.device("cpu")),
    )
    tokens = calibration_ids(made, BLOCKS)
    base(tokens, labels=tokens, use_cache=False).loss.backward()
    least = sorted(units, key=lambda u: value(*u, "gradient"))[:4]
    assert found.removed == tuple(sorted(least))


# --- whole layers ---------------------------------------------------------------------------------

DROP = LOSS | {"action": "drop"}


def whole_layers(*layers: int) -> SharingPlan:
    return SharingPlan(removed=tuple((layer, unit) for layer in layers for unit in range(HEADS)))


@pytest.mark.usefixtures("rendered")
def test_the_layer_that_costs_least_is_dropped(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of six layers, one after the other, against every choice measured by the definition."""
    made = recipe(home, tmp_path / "run", plan=DROP | {"budget": {"heads": 2 * HEADS}})
    plan(made)
    found = SharingPlan.load(made.folder / "plan.json")
    tokens, base = calibration_ids(made, BLOCKS), base_model(home)
    batches = [{"input_ids": row[None]} for row in tokens]
    taken: list[int] = []
    current = dense = reference_loss(base, SharingPlan(), tokens)
    slopes = estimate_sensitivity(base, batches).drop.first
    for _ in range(2):
        rises = {
            layer: reference_loss(base, whole_layers(*taken, layer), tokens) - current
            for layer in range(1, LAYERS)
            if layer not in taken
        }
        best = min(rises, key=lambda layer: rises[layer] - float(slopes[layer]))
        taken.append(best)
        current += rises[best]
    assert found == whole_layers(*sorted(taken))
    search = read(made.folder, "plan-search.json")
    assert search["base_loss"] == pytest.approx(dense, abs=1e-5)
    assert search["loss"] == pytest.approx(current, abs=1e-5)
    actions = [action for step in search["path"] for action in step["actions"]]
    assert [(a["action"], a["target"]) for a in actions] == [("drop", [at, None]) for at in taken]
    savings = found.savings(base.config)
    assert search["path"][-1]["parameters_saved"] == savings.removed_parameters
    assert savings.removed_parameters == 2 * (HEADS * 4 * 8 * 32 + 32)
    assert search["halves"]["units"] == 2
    assert f"| drop layer {taken[0]}" in (made.folder / "plan-search.md").read_text()
    named = ranges(tuple(sorted(taken)))
    assert f"2 of {LAYERS} without attention: {named}" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_layers_are_dropped_by_chance_and_by_magnitude(home: Path, strategy: str) -> None:
    config, reader = base_model(home).config, WeightsFolder(home / "base")
    asked = section(strategy=strategy, action="drop", budget={"ratio": 0.5})
    found, _ = find_ties(PlanProblem(asked, config), reader)
    dropped = found.dropped(found.layout(config))
    assert len(dropped) == 3
    assert len(found.removed) == 3 * HEADS
    assert 0 not in dropped
    if strategy == "magnitude":
        norms = unit_norms(reader, found.layout(config)).sum(1)
        assert dropped == set((norms[1:].argsort()[:3] + 1).tolist())
    else:
        others = [
            find_ties(PlanProblem(asked.model_copy(update={"seed": n}), config), reader)[0]
            for n in range(1, 6)
        ]
        assert len({other.removed for other in others}) > 1


def test_gradient_drops_the_layers_of_least_importance(home: Path) -> None:
    base = base_model(home)
    asked = section(strategy="gradient", action="drop", budget={"ratio": 0.5})
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(2048, (2, 16))}]
    found = choose_by_importance(PlanProblem(asked, base.config), base, batches)
    importance = estimate_sensitivity(base, batches).gradient.sum(1)
    least = set((importance[1:].argsort()[:3] + 1).tolist())
    assert found.dropped(found.layout(base.config)) == least


@pytest.mark.parametrize(
    ("budget", "layers"),
    [
        ({"ratio": 1 / 3}, None),  # 7 of 24 units
        ({"ratio": 0.34}, 2),
        ({"heads": 4}, 1),
        ({"heads": 6}, None),
        ({"parameters": "-1%"}, 1),
        ({"bytes": "-5%"}, 2),
        ({"cache": "-33.3%"}, 2),
        ({"cache": "-34%"}, 3),
    ],
)
def test_budgets_of_whole_layers(home: Path, budget: dict[str, Any], layers: int | None) -> None:
    """Units have to come to whole layers; shares are met by the fewest layers."""
    config = base_model(home).config
    problem = PlanProblem(section(strategy="random", action="drop", budget=budget), config)
    if layers is None:
        with pytest.raises(PostshareError, match=r"the nearest is .*\(1 or 2 of 6 layers\)"):
            _ = problem.space
        return
    predicted = plan_savings(problem)
    found, _ = find_ties(problem, WeightsFolder(home / "base"))
    assert predicted == found.savings(config)
    assert predicted.dropped_layers == layers
    if "cache" in budget:
        share = parse_share(budget["cache"])
        assert (layers - 1) / LAYERS < share <= layers / LAYERS


# --- budgets --------------------------------------------------------------------------------------


def section(**fields: Any) -> PlanSection:
    return PlanSection.model_validate(fields)


@pytest.mark.parametrize("counted", ["parameters", "bytes"])
@pytest.mark.parametrize("share", ["-1%", "-3.5%", "-6%"])
@pytest.mark.parametrize("strategy", ["cosine", "random", "loss"])
def test_a_budget_in_parameters_is_met_and_not_by_more_than_a_unit(
    home: Path, tmp_path: Path, counted: str, share: str, strategy: str
) -> None:
    config = base_model(home).config
    asked = section(strategy=strategy, budget={counted: share}, share=["q", "v"])
    wanted = parse_share(share)
    problem = PlanProblem(asked, config)
    predicted = plan_savings(problem)
    saved = predicted.removed_parameters
    unit = 2 * 8 * config.hidden_size
    assert wanted <= saved / predicted.base_parameters
    assert (saved - unit) / predicted.base_parameters < wanted
    if strategy == "cosine":
        found, _ = find_ties(problem, WeightsFolder(home / "base"))
        assert found.savings(config).removed_parameters == saved
    if strategy == "loss":
        space = problem.space
        assert (space.tie_saves, space.removal_saves) == (unit, 2 * unit)
        assert space.needed == math.ceil(wanted * predicted.base_parameters)


def test_spans_and_kv_heads_count_towards_a_share(home: Path) -> None:
    config = base_model(home).config
    structure = SharingPlan(kv_heads=2)
    given = structure.savings(config).removed_parameters
    base = structure.savings(config).base_parameters
    asked = PlanProblem(section(budget={"bytes": "-20%"}), config, structure).required
    assert asked.needed + given == math.ceil(base / 5)
    low = f"-{100 * given / base - 0.01:.2f}%"
    with pytest.raises(PostshareError, match="spans and KV heads alone save"):
        _ = PlanProblem(section(budget={"parameters": low}), config, structure).required
    cache = section(strategy="loss", action="remove", budget={"cache": "-60%"})
    space = PlanProblem(cache, config, structure).space
    assert (space.tie_saves, space.removal_saves) == (0, 16)
    assert space.needed == math.ceil(0.6 * 2 * LAYERS * 32) - 2 * LAYERS * 16


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"strategy": "cosine", "budget": {"parameters": "-40%"}}, r"the nearest is .*=-\d"),
        ({"strategy": "loss", "budget": {"bytes": "-40%"}}, r"the nearest is .*bytes=-\d"),
        (
            {"strategy": "loss", "action": "remove", "budget": {"cache": "-90%"}},
            r"cache asks for -90.10%.*save -62.50% at most.*cache=-62.5%",
        ),
        (
            {"strategy": "magnitude", "action": "remove", "budget": {"ratio": 0.7}},
            "asks for 16 of 24 units, possible are 1 to 15",
        ),
        (
            {"strategy": "loss", "action": "drop", "budget": {"cache": "-90%"}},
            r"cache asks for -90.10%.*save -83.33% at most.*cache=-83.33%",
        ),
    ],
)
def test_the_nearest_budget_is_said_and_can_be_met(
    home: Path, tmp_path: Path, fields: dict[str, Any], part: str
) -> None:
    made = recipe(home, tmp_path / "run", plan=fields)
    with pytest.raises(PostshareError, match=part) as caught:
        plan(made)
    assert "\n" not in str(caught.value)
    assert not made.folder.exists()
    if "=-" in str(caught.value):
        (counted,) = fields["budget"]
        nearest = str(caught.value).rsplit("=", 1)[1]
        met = section(**(fields | {"budget": {counted: nearest}}))
        plan_savings(PlanProblem(met, base_model(home).config))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"budget": {"bytes": "10%"}}, "'10%' is no share to save; write for example -10%"),
        ({"budget": {"bytes": "-100%"}}, "no share"),
        ({"budget": {"parameters": "-0%"}}, "no share"),
        ({"budget": {"bytes": "-1%", "ratio": 0.1}}, "exactly one of"),
        ({"budget": {"cache": "-1%"}}, "tied unit still caches"),
        ({"strategy": "magnitude"}, "set plan.action=remove"),
        ({"strategy": "gradient", "action": "any"}, "set plan.action=remove"),
        ({"action": "any"}, "set plan.strategy=loss"),
        ({"strategy": "released", "action": "remove"}, "released ignores action"),
        ({"search": "evolutionary"}, "cosine ignores search"),
        ({"calibration_blocks": 3}, "cosine ignores calibration_blocks"),
        ({"strategy": "loss", "score": "k"}, "loss ignores score"),
        ({"strategy": "loss", "calibration_blocks": 1}, "greater than or equal to 2"),
        ({"strategy": "loss", "action": "remove", "share": ["q"]}, "ignores share"),
        ({"strategy": "loss", "budget": None}, "loss needs a budget"),
        ({"action": "drop"}, "cosine drops no layers by itself"),
        ({"strategy": "auto", "action": "drop"}, "auto ignores action"),
        ({"strategy": "basis", "action": "drop"}, "basis ignores action"),
        ({"strategy": "loss", "action": "drop", "share": ["q"]}, "ignores share"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        section(**({"budget": {"ratio": 0.1}} | fields))


def test_the_cache_survives_another_budget(home: Path, tmp_path: Path) -> None:
    """What one search measured, the next one does not measure again."""
    made = recipe(home, tmp_path / "run", plan=LOSS | {"budget": {"heads": 2}})
    plan(made)
    before = (made.folder / SEARCH_CACHE).read_text()
    made = recipe(home, tmp_path / "run", plan=LOSS | {"budget": {"heads": 3}})
    plan(made)
    after = (made.folder / SEARCH_CACHE).read_text()
    assert after.startswith(before)
    assert len(SharingPlan.load(made.folder / "plan.json").ties) == 3


def test_the_cache_of_another_run_is_used(home: Path, tmp_path: Path) -> None:
    """It may lie in a new folder; anything else there is refused."""
    first = recipe(home, tmp_path / "first", plan=LOSS | {"budget": {"heads": 2}})
    plan(first)
    second = recipe(home, tmp_path / "second", plan=LOSS | {"budget": {"heads": 2}})
    second.folder.mkdir()
    shutil.copyfile(first.folder / SEARCH_CACHE, second.folder / SEARCH_CACHE)
    plan(second)
    assert SharingPlan.load(second.folder / "plan.json") == SharingPlan.load(
        first.folder / "plan.json"
    )
    assert read(second.folder, "plan-search.json")["forward_passes"] == 0
    third = recipe(home, tmp_path / "third", plan=LOSS | {"budget": {"heads": 2}})
    third.folder.mkdir()
    (third.folder / "notes.txt").write_text("mine")
    with pytest.raises(PostshareError, match="is not empty and is no run folder"):
        plan(third)
