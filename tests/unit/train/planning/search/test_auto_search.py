"""Strategy auto through recipe and plan stage: what it finds, that controls may win, that it goes
on where it was stopped."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from transformers import LlamaForCausalLM

from sa_models import SharingPlan
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.savings import llama_parameters
from sa_models.scores.fisher import estimate_sensitivity
from sa_models.spans import AttentionSpan
from sa_models.weights.compact_folder import CompactFolder
from tests.support.in_memory import text_blocks
from tests.support.spans_base import (
    LAYERS,
    LENGTH,
    base_model,
    calibration_ids,
    read,
    recipe,
    reference_loss,
)
from train.common.run_files import SEARCH_CACHE
from train.data.blocks import Blocks
from train.data.calibration import calibration_batches
from train.distributed.engines.start import start
from train.estimate.dry_run import print_dry_run
from train.estimate.llama_shapes import LlamaShape
from train.estimate.parameters import plan_savings
from train.evaluation.decode_time import bytes_read, compact_model, decode_time
from train.evaluation.perplexity import BlockLosses
from train.models.base_model import load_dense
from train.models.materialize import on_text
from train.planning.basis import saving_plan
from train.planning.problem import PlanProblem
from train.planning.search import auto_rebuild, auto_search
from train.planning.search.auto_rebuild import rival
from train.planning.search.auto_report import factored_note, left_out_note
from train.planning.search.auto_result import Factored
from train.planning.search.auto_search import search_auto
from train.planning.search.auto_space import ANY, FULL, REMOVALS, auto_passes
from train.planning.search.auto_space import LAYERS as LAYERS_ALONE
from train.planning.search.loss_search import parameters_along
from train.recipe.recipe import Recipe
from train.recipe.sections.plan import PlanSection
from train.stages.materialize import materialize_on_text, merged_folder
from train.stages.pipeline import plan, run
from train.stages.run import Run
from train.stages.start import begin

pytestmark = pytest.mark.usefixtures("sketched")

BLOCKS = 3
UNIT = 4 * 8 * 32  # of q, k, v and o


def share_of(home: Path, parameters: int) -> str:
    """A budget that so many parameters meet, and one less do not."""
    total = llama_parameters(base_model(home).config)
    return f"-{100 * (parameters - 0.5) / total:.6f}%"


def made(home: Path, folder: Path, parameters: int, **more: Any) -> Recipe:
    budget = {"bytes": share_of(home, parameters)}
    section = {"strategy": "auto", "budget": budget, "calibration_blocks": BLOCKS}
    section |= more.pop("plan", {})
    section |= {"objective": "bytes"} if section["strategy"] == "auto" else {}
    return recipe(home, folder, plan=section, **more)


def slope(base: LlamaForCausalLM, found: SharingPlan, tokens: torch.Tensor) -> float:
    """The first orders of all ties and removals of a plan, summed."""
    shares = {tie.projections for tie in found.ties}
    batches = [{"input_ids": row[None]} for row in tokens]
    estimated = estimate_sensitivity(base, batches, sorted(shares))
    total = sum(float(estimated.removal.first[unit]) for unit in found.removed)
    for tie in found.ties:
        total += float(estimated.ties[tie.projections].first[(*tie.target, *tie.source)])
    return total


def unit(model: LlamaForCausalLM, layer: int, head: int, projection: str) -> torch.Tensor:
    weight = model.get_parameter(HeadLayout.parameter_name(layer, projection))
    at = slice(8 * head, 8 * head + 8)
    return weight[:, at] if projection == "o" else weight[at]


def own_words(model: LlamaForCausalLM, count: int) -> Blocks:
    """Text that a model has drawn itself: any change of it makes the text less likely."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(count, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            chances = model(rows, use_cache=False).logits[:, -1].softmax(-1)
            rows = torch.cat([rows, chances.multinomial(1, generator=generator)], 1)
    return text_blocks(rows.tolist(), LENGTH)


def test_planted_ties_are_found_projection_by_projection(home: Path, tmp_path: Path) -> None:
    """A head has another's q and k and the v and o of a third, one more has v and o: all free."""
    model = base_model(home)
    planted = [((4, 1), (1, 2), "qk"), ((5, 3), (2, 0), "vo"), ((4, 1), (0, 3), "vo")]
    with torch.no_grad():
        for target, source, projections in planted:
            for p in projections:
                unit(model, *target, p).copy_(unit(model, *source, p))
        model.model.norm.weight *= 8  # sure of its words, so that every change tells
    of = made(home, tmp_path / "run", 3 * UNIT // 2, plan={"calibration_blocks": 8})
    blocks = own_words(model, 8)
    problem = PlanProblem(of.plan, model.config)
    text = calibration_batches(blocks, 8, of.evaluate.batch_size, model.device)
    searched = search_auto(problem, model, text, of.folder)
    found = searched.chosen.plan
    ties = {(t.target, t.source, "".join(t.projections)) for t in found.ties}
    assert ties == set(planted)
    assert (found.removed, found.spans, found.kv_heads) == ((), (), None)
    assert searched.chosen.name == FULL
    assert searched.chosen.expected == pytest.approx(searched.base.loss, abs=1e-6)
    assert all(c.expected > searched.base.loss + 1e-4 for c in searched.candidates[1:])


@pytest.mark.usefixtures("rendered")
def test_what_is_chosen_costs_no_more_than_any_control(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are measured again head by head, slopes summed from estimates of single actions."""
    of = made(home, tmp_path / "auto", 5 * UNIT)
    plan(of)
    found = SharingPlan.load(of.folder / "plan.json")
    search = read(of.folder, "plan-search.json")
    tokens, base = calibration_ids(of, BLOCKS), base_model(home)
    expected: dict[str, float] = {}
    for candidate in search["candidates"]:
        one = SharingPlan.from_dict(candidate["plan"])
        savings = one.savings(base.config)
        assert savings.removed_parameters == candidate["saved"] >= 5 * UNIT
        loss = reference_loss(base, one, tokens)
        assert candidate["loss"] == pytest.approx(loss, abs=1e-5)
        twice = len({tie.target for tie in one.ties}) < len(one.ties)  # their orders do not add up
        if not one.spans and one.kv_heads is None and not twice:
            off = slope(base, one, tokens)
            assert candidate["expected_loss"] == pytest.approx(loss - off, abs=3e-5)
        expected[candidate["name"]] = candidate["expected_loss"]
    assert {FULL, REMOVALS, ANY} <= set(expected)
    assert search["chosen"] == min(expected, key=expected.__getitem__)
    assert found.to_dict() == search["candidates"][0]["plan"]
    assert search["expected_loss"] == min(expected.values())
    for action in ("remove", "any"):
        pure = made(home, tmp_path / action, 5 * UNIT, plan={"strategy": "loss", "action": action})
        plan(pure)
        control = SharingPlan.load(pure.folder / "plan.json")
        without = reference_loss(base, control, tokens) - slope(base, control, tokens)
        assert search["expected_loss"] <= without + 3e-5
        name = {"remove": REMOVALS, "any": ANY}[action]
        assert expected[name] == pytest.approx(without, abs=3e-5)
    check_structures(search, base, tokens)
    check_front(search, of)
    page = (of.folder / "plan-search.md").read_text()
    assert page.count("(chosen)") == 1
    assert "fp32" in page
    lines = capsys.readouterr().out.splitlines()
    planned = lines[: next(n for n, line in enumerate(lines) if line.startswith("tables ")) + 1]
    assert planned[0].startswith("chosen    ")
    assert "forward passes over" in page
    assert planned[-1] == f"tables    {of.folder / 'plan-search.md'}"
    assert len(planned) <= 10
    assert [line for line in planned[:-1] if len(line) > 80] == []
    assert search["forward_passes"] <= search["forward_passes_at_most"]
    assert search["estimates"] <= search["estimates_at_most"]


def check_structures(search: dict, base: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """Spans of both kinds and every divisor are tried, each measured as its plan computes."""
    names = [entry["plan"] for entry in search["structures"]]
    assert {"1 KV heads", "2 KV heads"} <= set(names)
    assert any("(attention)" in name for name in names)
    assert any("(kv)" in name for name in names)
    (pooled,) = (entry for entry in search["structures"] if entry["plan"] == "2 KV heads")
    loss = reference_loss(base, SharingPlan(kv_heads=2), tokens)
    assert pooled["loss"] == pytest.approx(loss, abs=1e-5)
    assert pooled["parameters_saved"] == LAYERS * 2 * 2 * 8 * 32


def check_front(search: dict, of: Recipe) -> None:
    """No plan of the front is beaten by a plan that was measured; dense and chosen are timed."""
    front = search["front"]
    every = [*search["structures"], *front]
    for entry in front:
        for other in every:
            better = other["bytes"] <= entry["bytes"], other["perplexity"] <= entry["perplexity"]
            same = (other["bytes"], other["perplexity"]) == (entry["bytes"], entry["perplexity"])
            assert same or not all(better)
    smaller = [entry for entry in front if entry["parameters_saved"]]
    better = [entry for entry in smaller if entry["expected_loss"] <= search["base_loss"]]
    assert (front[0]["plan"] == "none (dense)") == (not better)
    timed = search["decoding"]
    assert timed[0]["plan"] == "none (dense)"
    assert all(entry["seconds"] > 0 for entry in timed)
    dense_seconds = timed[0]["seconds"] / timed[0]["over_dense"]
    for entry in timed:  # of one dense model, so that times are in the order of the ratios
        assert entry["seconds"] == pytest.approx(entry["over_dense"] * dense_seconds)
    assert 2 <= len(timed) <= 7
    assert search["expected_loss"] in [entry["expected_loss"] for entry in timed]
    picture = image.imread(of.folder / "plan-pareto.png")
    assert picture.shape[0] > 1.2 * picture.shape[1]  # two panels, one above the other
    assert picture[..., :3].std() > 0.05


def test_where_one_plan_is_left_nothing_is_reconstructed(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three units are no whole layer, and of a number of units no structure is tried."""
    monkeypatch.setattr(auto_rebuild, "on_text", lambda *_: pytest.fail("reconstructed"))
    section = {"strategy": "auto", "budget": {"heads": 3}, "calibration_blocks": BLOCKS}
    materialize = {"reconstruct": True, "calibration_blocks": 4}
    of = recipe(home, tmp_path, plan=section, materialize=materialize, train={"steps": 0})
    plan(of)
    assert f"chosen    {REMOVALS}, the only candidate\n" in capsys.readouterr().out
    search = read(of.folder, "plan-search.json")
    assert search["base_reconstructed_loss"] is None
    assert [c["reconstructed_loss"] for c in search["candidates"]] == [None]


@pytest.mark.more
def test_plans_are_compared_after_reconstruction(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the best three: the loss that the recipe's own materializing leaves, on its text."""
    monkeypatch.setattr(auto_rebuild, "rival", lambda *_: None)  # Basis Sharing: other tests
    more = {"materialize": {"reconstruct": True, "calibration_blocks": 4}, "train": {"steps": 0}}
    of = made(home, tmp_path / "auto", 5 * UNIT, **more)
    plan(of)
    search = read(of.folder, "plan-search.json")
    assert "; 3 reconstructed" in capsys.readouterr().out
    candidates = search["candidates"]
    assert search["chosen"] == candidates[0]["name"]
    assert candidates[0]["plan"] == SharingPlan.load(of.folder / "plan.json").to_dict()
    losses = [candidate["reconstructed_loss"] for candidate in candidates]
    assert losses[1:3] == sorted(losses[1:3])
    assert set(losses[3:]) == {None}
    best = sorted(candidates, key=lambda candidate: candidate["expected_loss"])[:3]
    assert {c["name"] for c in best} == {c["name"] for c in candidates[:3]}
    tokens = calibration_ids(of, 4)
    compared = 0
    for number, candidate in enumerate(candidates[:3]):
        found = SharingPlan.from_dict(candidate["plan"])
        if found.has_stock_form and found.kv_heads is None:
            found.save(tmp_path / f"{number}.json")
            section = {"strategy": "file", "path": str(tmp_path / f"{number}.json")}
            alone = recipe(home, tmp_path / f"{number}", plan=section, **more)
            plan(alone)
            current = begin(alone)
            materialize_on_text(current)
            rebuilt = load_dense(merged_folder(current), "sdpa")
            loss = reference_loss(rebuilt, SharingPlan(), tokens)
            assert candidate["reconstructed_loss"] == pytest.approx(loss, abs=1e-5)
            # Ten times what the two may differ by: it is not the loss of the plan as it is.
            assert abs(loss - reference_loss(base_model(home), found, tokens)) > 1e-4
            compared += 1
    assert compared >= 2
    # A second start measures nothing.
    before = (of.folder / SEARCH_CACHE).read_text()
    (of.folder / "plan.json").unlink()
    plan(of)
    assert (of.folder / SEARCH_CACHE).read_text() == before
    again = read(of.folder, "plan-search.json")
    assert [c["reconstructed_loss"] for c in again["candidates"]] == losses


@pytest.mark.more
def test_the_recipe_s_own_structure_is_reconstructed_as_the_plans_are(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row is one model in all columns: the base with the recipe's spans."""
    spans = [{"leader": 2, "followers": [3]}]
    of = made(home, tmp_path / "auto", 2 * 8 * 32 * 4 + 2 * UNIT, spans=spans, **REBUILT_ON)
    plan(of)
    said, search = (of.folder / "plan-search.md").read_text(), read(of.folder, "plan-search.json")
    assert "none (dense)" not in said.partition("vs dense")[0]
    structure = SharingPlan(spans=SharingPlan.load(of.folder / "plan.json").spans)
    blocks = Run(of, start(of)).blocks[0]
    model = on_text(of, structure, base_model(home), blocks, torch.device("cpu")).eval()
    tokens = calibration_ids(of, 4)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
    loss = -float(logits.gather(-1, tokens[:, 1:, None]).mean())
    assert search["base_reconstructed_loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(loss - reference_loss(base_model(home), SharingPlan(), tokens)) > 1e-3


def basis_recipe(home: Path, folder: Path, parameters: int, blocks: int) -> Recipe:
    """Basis Sharing that saves at least so many parameters, untrained."""
    return recipe(
        home,
        folder,
        plan={"strategy": "basis", "budget": {"parameters": share_of(home, parameters)}},
        materialize={"calibration_blocks": blocks},
        train={"steps": 0},
    )


REBUILT_ON = {"materialize": {"reconstruct": True, "calibration_blocks": 4}, "train": {"steps": 0}}


@pytest.mark.more
@pytest.mark.usefixtures("rendered")
def test_basis_sharing_at_as_many_bytes_is_measured_beside_them(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss is that of the control's own run, on the text of the reconstruction."""
    of = made(home, tmp_path / "auto", 5 * UNIT, **REBUILT_ON)
    plan(of)
    said, search = (of.folder / "plan-search.md").read_text(), read(of.folder, "plan-search.json")
    factored = search["factored"]
    other = SharingPlan.from_dict(search["candidates"][0]["plan"])
    saved = other.savings(base_model(home).config).removed_parameters
    # A rank less would be too few, a rank more too many: two layers of 32 x 32 have 96 a rank.
    assert saved <= factored["saved"] < saved + 3 * 32
    alone = basis_recipe(home, tmp_path / "basis", saved, 4)
    run(alone)
    assert SharingPlan.from_dict(factored["plan"]) == SharingPlan.load(alone.folder / "plan.json")
    tokens = calibration_ids(of, 4)
    dense = load_dense(alone.folder / "export" / "dense", "sdpa")
    loss = reference_loss(dense, SharingPlan(), tokens)
    assert factored["loss"] == pytest.approx(loss, abs=1e-5)
    dense_loss = reference_loss(base_model(home), SharingPlan(), tokens)
    assert search["base_reconstructed_loss"] == pytest.approx(dense_loss, abs=1e-5)
    last = search["decoding"][-1]
    assert (last["origin"], last["parameters_saved"]) == ("Basis Sharing", factored["saved"])
    assert last["seconds"] > 0
    assert "loss" not in last  # it is that of another text
    picture = image.imread(of.folder / "plan-pareto.png")
    assert picture.shape[0] > 1.8 * picture.shape[1]  # three panels
    low, high = factored["above"]
    assert low < search["candidates"][0]["reconstructed_loss"] - factored["loss"] < high
    assert factored["taken"] == (low > 0)
    found = SharingPlan.load(of.folder / "plan.json")
    assert found == (SharingPlan.from_dict(factored["plan"]) if factored["taken"] else other)
    assert ("Basis Sharing is chosen" in said) == factored["taken"]


@pytest.mark.parametrize(
    "budget",
    ["bytes", pytest.param("heads", marks=pytest.mark.more)],
)
def test_basis_sharing_is_taken_where_it_is_better_and_bytes_are_asked_for(
    home: Path,
    tmp_path: Path,
    budget: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run then factorizes, heals and exports; a number of heads cannot be met by it."""
    real = auto_rebuild.block_losses

    def better(model: LlamaForCausalLM, *arguments: Any, **options: Any) -> BlockLosses:
        measured = real(model, *arguments, **options)
        shared = isinstance(model, SharedLlamaForCausalLM) and model.config.plan.basis is not None
        return replace(measured, nats=tuple(n / 2 for n in measured.nats)) if shared else measured

    monkeypatch.setattr(auto_rebuild, "block_losses", better)
    more = REBUILT_ON | {"materialize": {**REBUILT_ON["materialize"], "heal_steps": 2}}
    if budget != "bytes":
        more |= {"plan": {"budget": {"heads": 5}}}
    of = made(home, tmp_path / "auto", 5 * UNIT, **more)
    run(of)
    said, search = (of.folder / "plan-search.md").read_text(), read(of.folder, "plan-search.json")
    found = SharingPlan.load(of.folder / "plan.json")
    other = SharingPlan.from_dict(search["candidates"][0]["plan"])
    exported = CompactFolder(of.folder / "export" / "compact")
    assert exported.config.plan == found
    summary = read(of.folder, "summary.json")
    if budget != "bytes":
        assert found == other
        assert search["chosen"] == search["candidates"][0]["name"]
        assert "Note: Basis Sharing" in said
        assert "is chosen where the budget is one of bytes" in said
        assert summary["structure"]["basis"] is None
        return
    assert found == SharingPlan.from_dict(search["factored"]["plan"])
    assert search["chosen"] == "Basis Sharing"
    assert said.count("(chosen)") == 1
    assert "Basis Sharing is chosen: it is better than" in said
    asked = found.savings(base_model(home).config).removed_parameters
    assert asked >= other.savings(base_model(home).config).removed_parameters >= 5 * UNIT
    assert summary["parameters"]["base"] - summary["parameters"]["stored"] == asked
    trained = CompactFolder(of.folder / "heal" / "weights")
    for name in trained.names():
        assert torch.equal(exported.read(name), trained.read(name).to(exported.dtype(name))), name


def test_basis_sharing_is_named_only_where_it_is_better_and_a_rival(home: Path) -> None:
    config, removed = base_model(home).config, SharingPlan(removed=((1, 0),))
    basis = saving_plan(config, UNIT)
    assert basis is not None
    better = Factored(basis, UNIT, 3.0, (0.01, 0.02), taken=False)
    assert better.is_better
    assert "by 1.0% to 2.0% of perplexity" in factored_note(better, removed, config)
    assert "better than 1 head removed" in factored_note(
        replace(better, taken=True), removed, config
    )
    assert not replace(better, above=(-0.001, 0.02)).is_better

    def asked(**sections: Any) -> SharingPlan | None:
        return rival(recipe(home, Path("x"), **sections), removed, config)

    auto = {"strategy": "auto", "objective": "bytes"}
    trained = {"train": {"steps": 0}}
    assert asked(plan={**auto, "budget": {"bytes": "-5%"}}, **trained) == basis
    assert asked(plan={**auto, "budget": {"heads": 2}}, **trained) == basis
    assert asked(plan={**auto, "budget": {"cache": "-5%"}}, **trained) is None
    # It saves neither cache nor time.
    for other in ("cache", "speed", "all"):
        section = {**auto, "budget": {"bytes": "-5%"}, "objective": other}
        assert asked(plan=section, **trained) is None
    spans = [{"leader": 2, "followers": [3]}]
    assert asked(plan={**auto, "budget": {"bytes": "-5%"}}, spans=spans, **trained) is None
    # A penalty pulls units, which factors have not.
    pulled = {"train": {"steps": 3}}
    assert asked(plan={**auto, "budget": {"bytes": "-5%"}}, **pulled) is None


def test_a_difference_that_tells_nothing_does_not_choose() -> None:
    """The order as it is stands, but where a later plan is better by more than chance."""

    def losses(*nats: float) -> BlockLosses:
        return BlockLosses(nats, (10,) * len(nats))

    first = losses(20.0, 22.0, 24.0, 26.0)
    # Differences 0.4, 1.6, 0.4, 1.6: mean 1, never below 0.4 however blocks are drawn.
    surely = losses(19.6, 20.4, 23.6, 24.4)
    # Differences 4, -2, 4, -2: the same mean, negative in 5 of 16 draws.
    perhaps = losses(16.0, 24.0, 20.0, 28.0)

    def chosen(*tried: BlockLosses, shares: tuple[float, float] = (1.0, 1.0)) -> int:
        return auto_rebuild._chosen(tried, shares, 2.0)  # base 2.0 nats a token

    assert chosen(first, surely) == 1
    assert chosen(first, perhaps) == 0
    assert chosen(surely, first) == 0
    assert chosen(losses(20.0), losses(10.0)) == 0  # one block has no spread
    # Rises 0.3 and 0.2 nats a token: the first is worth it where it saves 1.5 times as much.
    assert chosen(first, surely, shares=(0.2, 0.1)) == 0
    # The second may rise to 0.8 where it saves four times as much, and rises to 0.3: no doubt.
    assert chosen(surely, first, shares=(0.1, 0.4)) == 1
    assert chosen(surely, first, shares=(0.1, 0.14)) == 0


@pytest.mark.more
@pytest.mark.parametrize("quarters", [(3, 4), (1, 2)])
def test_it_goes_on_where_it_was_killed(
    home: Path, tmp_path: Path, quarters: tuple[int, ...]
) -> None:
    """Stopped in a search, and between two: the same plan, and nothing measured twice."""
    whole = made(home, tmp_path / "whole", 4 * UNIT)
    plan(whole)
    expected = SharingPlan.load(whole.folder / "plan.json")
    lines = (whole.folder / SEARCH_CACHE).read_text().splitlines(keepends=True)
    for count in (quarter * len(lines) // 4 for quarter in quarters):
        of = made(home, tmp_path / str(count), 4 * UNIT)
        of.folder.mkdir()
        of.save(of.folder / "recipe.yaml")
        file = of.folder / SEARCH_CACHE
        file.write_text("".join(lines[:count]) + (lines[count][:9] if count < len(lines) else ""))
        plan(of)
        assert SharingPlan.load(of.folder / "plan.json") == expected
        again = [json.loads(line) for line in file.read_text().splitlines()]
        keys = [(entry["of"], entry["key"]) for entry in again]
        assert len(keys) == len(set(keys)) == len(lines)
        search = read(of.folder, "plan-search.json")
        if count == len(lines):
            assert (search["forward_passes"], search["estimates"]) == (0, 0)
        else:
            assert search["forward_passes"] > 0


def test_structures_that_are_left_out_would_not_win(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan, from fewer passes, as where every structure is measured, and searched in."""
    model = base_model(home)
    with torch.no_grad():
        model.model.norm.weight *= 8  # sure of its words, so that every change tells
    blocks = own_words(model, 8)
    budget = {"bytes": share_of(home, 5 * UNIT)}
    of = recipe(home, tmp_path, plan={"strategy": "auto", "budget": budget})
    problem = PlanProblem(of.plan, model.config)
    text = calibration_batches(blocks, 8, of.evaluate.batch_size, model.device)
    fewer = search_auto(problem, model, text, tmp_path / "fewer")
    monkeypatch.setattr(auto_search._Search, "_most_rise", lambda *_: math.inf)
    begun = search_auto(problem, model, text, tmp_path / "begun")
    monkeypatch.setattr(auto_search._Search, "_is_behind", lambda *_: None)
    every = search_auto(problem, model, text, tmp_path / "every")
    assert fewer.chosen == begun.chosen == every.chosen
    names = {c.name for c in begun.candidates}
    assert {c.name for c in every.candidates} == names | set(begun.given_up)
    assert begun.given_up
    assert begun.passes < every.passes
    assert f"{begun.given_up[0]} (given up)" in str(left_out_note(begun))
    assert fewer.base.loss + 0.01 < fewer.chosen.expected < every.candidates[-1].expected
    assert fewer.passes < 0.8 * every.passes
    assert every.left_out == every.given_up == ()
    assert len(every.structures) == len(fewer.structures) + len(fewer.left_out)
    measured = {point.plan: point for point in every.structures}
    assert all(measured[point.plan] == point for point in fewer.structures)
    note = left_out_note(fewer)
    assert note is not None
    assert ", ".join(fewer.left_out) in note
    assert left_out_note(every) is None


def test_a_layer_is_emptied_unit_by_unit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that writes next to nothing goes, and then half of others, not a second layer."""
    model = base_model(home)
    layout = HeadLayout.from_config(model.config)
    with torch.no_grad():
        model.model.norm.weight *= 8
        for layer in range(1, LAYERS):
            for head in range(4 if layer == 3 else 2):
                unit(model, layer, head, "o").mul_(1e-3)
    blocks = own_words(model, 8)
    budget = {"bytes": share_of(home, 11 * UNIT)}
    of = recipe(home, tmp_path, plan={"strategy": "auto", "budget": budget})
    problem = PlanProblem(of.plan, model.config)
    text = calibration_batches(blocks, 8, of.evaluate.batch_size, model.device)
    fewer = search_auto(problem, model, text, tmp_path / "fewer", spans=False)
    found = fewer.chosen.plan
    assert found.dropped(layout) == {3}
    assert len(found.removed) == 11
    assert {head for layer, head in found.removed if layer != 3} == {0, 1}
    assert fewer.chosen.points[-1].saved == found.savings(model.config).removed_parameters
    along = parameters_along(fewer.chosen.found.path, layout)
    assert along[-1] == 11 * UNIT + layout.hidden_size
    assert fewer.given_up == (LAYERS_ALONE,)
    ids = torch.stack([row for batch in text for row in batch["input_ids"]])
    loss = reference_loss(model, found, ids)
    assert fewer.chosen.points[-1].loss == pytest.approx(loss, abs=1e-5)
    monkeypatch.setattr(auto_search._Search, "_is_behind", lambda *_: None)
    every = search_auto(problem, model, text, tmp_path / "every", spans=False)
    assert every.chosen == fewer.chosen
    whole = next(c for c in every.candidates if c.name == LAYERS_ALONE)
    assert whole.expected > fewer.chosen.expected + 0.01
    assert fewer.passes < every.passes


def test_a_structure_of_the_recipe_stays(home: Path, tmp_path: Path) -> None:
    spans = [{"leader": 2, "followers": [3]}]
    of = made(home, tmp_path / "run", 2 * 8 * 32 * 4 + 2 * UNIT, spans=spans)
    plan(of)
    found = SharingPlan.load(of.folder / "plan.json")
    assert [(s.leader, s.followers) for s in found.spans] == [(2, (3,))]
    search = read(of.folder, "plan-search.json")
    assert search["structures"] == []
    base = base_model(home)
    for part, loss in ((SharingPlan(spans=found.spans), "base_loss"), (found, "loss")):
        measured = reference_loss(base, part, calibration_ids(of, BLOCKS))
        assert search[loss] == pytest.approx(measured, abs=1e-5)


@pytest.mark.parametrize(
    "budget", [pytest.param({"ratio": 0.2}, marks=pytest.mark.more), {"cache": "-20%"}]
)
def test_other_budgets_are_met(home: Path, tmp_path: Path, budget: dict[str, Any]) -> None:
    of = recipe(
        home,
        tmp_path / "run",
        plan={"strategy": "auto", "budget": budget, "calibration_blocks": BLOCKS},
        train={"steps": 1},
    )
    run(of)
    found = SharingPlan.load(of.folder / "plan.json")
    savings = found.savings(base_model(home).config)
    if "ratio" in budget:
        assert savings.tied_units + savings.removed_units == 4
        assert read(of.folder, "plan-search.json")["structures"] == []
    else:
        assert savings.stored_cache <= 0.8 * savings.base_cache
    assert (of.folder / "summary.json").is_file()


def test_spans_need_a_compact_export(home: Path, tmp_path: Path) -> None:
    of = made(home, tmp_path / "run", 2 * UNIT, export={"formats": ["dense"]})
    plan(of)
    search = read(of.folder, "plan-search.json")
    assert all("span" not in entry["plan"] for entry in search["structures"])
    assert len(search["structures"]) == 2


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"share": ["q", "k"]}, "auto ignores share; remove plan.share"),
        ({"action": "remove"}, "auto ignores action"),
        ({"action": "any"}, "auto ignores action"),
        ({"search": "evolutionary"}, "auto ignores search"),
        ({"score": "k"}, "auto ignores score"),
        ({"fold_norm": True}, "auto ignores fold_norm"),
        ({"budget": None}, "auto needs a budget"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        PlanSection.model_validate({"strategy": "auto", "budget": {"bytes": "-1%"}} | fields)


def test_a_budget_that_cannot_be_met_names_the_nearest(home: Path, tmp_path: Path) -> None:
    of = made(home, tmp_path / "run", 30 * UNIT)
    with pytest.raises(PostshareError, match=r"spans and KV groups save .*nearest is") as caught:
        plan(of)
    assert not of.folder.exists()
    nearest = str(caught.value).rsplit("=", 1)[1]
    section = PlanSection.model_validate(
        {"strategy": "auto", "objective": "bytes", "budget": {"bytes": nearest}}
    )
    config = base_model(home).config
    saved = plan_savings(PlanProblem(section, config)).removed_parameters
    assert 18 * UNIT < saved < 24 * UNIT  # all units but those of layer 0 can be tied, and more


def test_a_7b_is_bounded() -> None:
    """Actions of a state, shortlists and rounds, written out; see docs/planning.md."""
    asked = {"strategy": "auto", "objective": "bytes", "budget": {"bytes": "-10%"}}
    bound = auto_passes(PlanProblem(PlanSection.model_validate(asked), LlamaShape()))
    removals = PlanSection.model_validate(asked | {"objective": "all"})
    fewer = auto_passes(PlanProblem(removals, LlamaShape()))
    assert fewer.forward < bound.forward / 2
    assert fewer.backward < bound.backward
    needed, row = 673_841_562, 128 * 4096
    searches = 0
    for smallest in (2 * row, 4 * row, 3 * row):
        actions = -(-needed // smallest)
        each = -(-actions // 32)
        searches += 1 + -(-actions // each) * (2 * each + 2)
    layers = -(-needed // (32 * 4 * row + 4096))
    assert layers == 11
    searches += 1 + layers * (8 + 1)  # alone: one in a round, eight measured
    assert searches < bound.forward < 3 * searches
    assert bound.forward == 6026


# --- decoding -------------------------------------------------------------------------------------


def test_the_model_that_is_timed_is_the_plan_s_and_leaves_the_base(home: Path) -> None:
    base = base_model(home)
    before = {name: p.clone() for name, p in base.named_parameters()}
    entry = {"target": [4, 0], "source": [1, 1], "projections": ["q", "k"], "score": None}
    value = SharingPlan().to_dict() | {"ties": [entry], "removed": [[5, 2]], "kv_heads": 2}
    for kv_heads, removed in itertools.product((None, 2), ([], [[5, 1]])):
        one = SharingPlan.from_dict(value | {"kv_heads": kv_heads, "removed": removed})
        tokens = torch.arange(24)[None] % 50
        compact = compact_model(base, one)
        stored = sum(p.numel() for p in compact.parameters())
        assert stored == one.savings(base.config).stored_parameters
        with torch.no_grad():
            logits = compact(tokens).logits[:, :-1].log_softmax(-1)
        loss = -float(logits.gather(-1, tokens[:, 1:, None]).mean())
        assert loss == pytest.approx(reference_loss(base, one, tokens), abs=1e-5)
        timed = decode_time(base, one, tokens)
        assert timed.seconds > 0
    spans = SharingPlan(spans=(AttentionSpan(2, (3,)), AttentionSpan(4, (5,), "kv")))
    assert decode_time(base, spans, tokens).seconds > 0
    shared = saving_plan(base.config, 5 * UNIT)
    assert shared is not None
    stored = sum(p.numel() for p in compact_model(base, shared).parameters())
    assert stored == shared.savings(base.config).stored_parameters
    assert decode_time(base, shared, tokens).seconds > 0
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.is_contiguous(), name  # a model with spans stores o otherwise


def test_a_tie_reads_what_it_does_not_store(home: Path) -> None:
    config = base_model(home).config
    entry = {"target": [4, 0], "source": [1, 1], "projections": list("qkvo"), "score": None}
    tied = SharingPlan.from_dict(SharingPlan().to_dict() | {"ties": [entry]})
    gone = SharingPlan(removed=((4, 0),))
    dense = (llama_parameters(config) + 10 * 2 * LAYERS * 32) * 2
    assert bytes_read(SharingPlan(), config, 10, 2) == dense
    assert bytes_read(tied, config, 10, 2) == dense
    assert bytes_read(gone, config, 10, 2) == dense - 2 * (UNIT + 10 * 2 * 8)
    # Both layers of a group read its basis: 32 x 32 weights become 32 x rank and rank x 32.
    shared = saving_plan(config, 5 * UNIT)
    assert shared is not None
    assert shared.basis is not None
    ranks = 2 * sum(sum(shared.basis.ranks(p)) for p in "qkv")
    assert bytes_read(shared, config, 10, 2) == dense + 2 * (64 * ranks - 3 * LAYERS * 32 * 32)


def test_the_dry_run_states_the_passes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = made(home, tmp_path / "run", 2 * UNIT, model={"tokenizer": "demo-base"})
    print_dry_run(of)
    said = " ".join(capsys.readouterr().out.split())
    assert "strategy auto: removals, spans" in said or "strategy auto: ties" in said
    assert "forward passes over 3 blocks" in said
    assert "cache bytes per token as the search decides" in said
    assert "reconstructions" not in said
    more = {"reconstruct": True, "calibration_blocks": 4}
    print_dry_run(of.model_copy(update={"materialize": of.materialize.model_copy(update=more)}))
    said = " ".join(capsys.readouterr().out.split())
    assert "over 3 blocks then 3 reconstructions" in said
    assert "3 reconstructions and one factorization" in said


def test_spans_that_are_found_and_meet_the_budget_alone_are_said(
    home: Path, tmp_path: Path
) -> None:
    """Before they were found nobody could know."""
    made = recipe(
        home,
        tmp_path / "run",
        plan={"strategy": "auto", "budget": {"cache": "-5%"}, "calibration_blocks": 2},
        spans={"strategy": "loss", "layers": 1, "share": "kv", "calibration_blocks": 2},
        train={"steps": 0},
        export={"formats": ["compact"]},
    )
    with pytest.raises(PostshareError, match=r"spans and KV heads alone save 16\.67%"):
        plan(made)
    assert not (made.folder / "plan.json").exists()
