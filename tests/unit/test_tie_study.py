"""The study of ties: which trainings follow, the plans they share, and its tables."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from sa_models.heads import PROJECTIONS
from sa_models.plan import SharingPlan
from tests.support import outputs
from tests.support.spans_base import recipe, write_base, write_text
from train.recipe.recipe import validate
from train.stages.pipeline import plan, run

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MERGES = ("least_squares", "weighted_mean")
UNIT = 4 * 8 * 32
"""Parameters of a unit of the small base: q, k, v and o."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tie_study")


@pytest.fixture
def settings(made: ModuleType) -> dict[str, Any]:
    return yaml.safe_load(made.SETTINGS.read_text(encoding="utf-8"))


def add_lines(study: Any, jobs: list[Any], perplexity: dict[str, float]) -> None:
    """Finished trainings; those that are not named are bad."""
    with study.lines.open("a") as file:
        for job in jobs:
            value = {"trained": perplexity.get(job.arm.name, 99.0)}
            file.write(json.dumps({"name": job.name, "perplexity": value}) + "\n")


def test_a_round_goes_on_with_the_best_of_the_one_before(
    made: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    study = made.Study(settings, tmp_path / "lines.jsonl", tmp_path)
    first = study.next_jobs("10")
    names = [job.name for job in first]
    assert names[:2] == ["qkvo-heal-10-4096-0", "qk-heal-10-4096-0"]
    assert names[-1] == "removed-heal-10-4096-0"
    assert len(first) == 4 + 1
    assert len(study.next_jobs("30")) == 1 + 1  # what came first at 10 % alone
    add_lines(study, first[:3], {"vo heal": 30.0})
    assert study.next_jobs("10") == first[3:]  # what was stopped goes on
    larger = study.next_jobs("30")
    add_lines(study, larger, {"qkvo heal": 30.0})
    pulls = {job.arm.name for job in study.next_jobs("30")}  # and copies alone: no round for merges
    kinds = ("none", "decoupled-400", "progressive")
    assert pulls == {"qkvo" + ("" if kind == "none" else f" {kind}") for kind in kinds} | {
        f"qkvo heal {kind}" for kind in kinds[1:]
    }
    add_lines(study, first[3:], {"kv heal": 32.0, "removed heal": 20.0})
    merges = study.next_jobs("10")
    assert {job.arm.name for job in merges} == {
        f"{share} {merge} heal" for share in ("vo", "kv") for merge in MERGES
    }
    add_lines(study, merges, {"kv weighted_mean heal": 31.0})
    second = study.next_jobs("10")
    found = {job.arm.name for job in second}
    assert {arm.split()[0] for arm in found} == {"kv", "vo"}  # no control is kept
    # 6 ways to pull or not, healed or not; "heal" alone is known
    assert sum(name.startswith("vo") for name in found) == 6 * 2 - 1
    assert sum(name.startswith("kv weighted_mean") for name in found) == 6 * 2 - 1
    untrained = next(job for job in second if job.arm.name == "vo")
    assert untrained.name == "vo-10-0-0"
    pulls = ("vo heal progressive", "vo heal penalty", "kv weighted_mean heal decoupled")
    add_lines(study, second, dict.fromkeys(pulls, 10.0))
    third = study.next_jobs("10")
    # 3 residuals, with or without a teacher, of which neither is known; with a residual units are
    # copied.
    assert len(third) == 3 * (3 * 2 - 1) + 1  # and the control with a teacher
    names = {job.arm.name for job in third}
    assert {"kv heal decoupled rank4", "kv weighted_mean heal decoupled teacher"} <= names
    assert {job.tokens for job in third} == {4096}
    add_lines(study, third, {"vo heal penalty rank4": 9.0, "vo heal penalty teacher": 8.0})
    fourth = study.next_jobs("10")
    assert len(fourth) == 4 + 2
    assert {job.tokens for job in fourth} == {16384}
    assert [job.arm.name for job in fourth[:2]] == [
        "vo heal penalty teacher",
        "vo heal penalty rank4",
    ]
    add_lines(study, fourth, {"vo heal penalty rank4": 7.0, "vo heal penalty teacher": 8.0})
    fifth = study.next_jobs("10")  # o cannot make up for what a residual brings back
    assert [job.arm.name for job in fifth] == ["vo heal penalty teacher reconstruct"]
    add_lines(study, fifth, {"vo heal penalty teacher reconstruct": 6.0})
    last = study.next_jobs("10")
    assert {job.seed for job in last} == {0, 1, 2}
    names = {job.arm.name for job in last}
    assert names == {"vo heal penalty teacher reconstruct", "removed heal teacher"}
    add_lines(study, last, {})
    assert study.next_jobs("10") == []


def test_every_training_of_a_round_has_a_valid_recipe(
    made: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    study = made.Study(settings, tmp_path / "lines.jsonl", tmp_path)
    jobs = study.next_jobs("10")
    add_lines(study, jobs, {"vo heal": 30.0, "qkvo heal": 31.0})
    kept = {"vo heal teacher": 10.0, "qkvo least_squares heal": 11.0}
    rounds = ({"qkvo least_squares heal": 29.0}, {"vo heal decoupled": 29.0}, kept, kept, {})
    for better in rounds:
        more = study.next_jobs("10")
        add_lines(study, more, better)
        jobs += more
    shortest = {job.arm.name: job for job in reversed(jobs)}
    recipes = {name: validate(study.recipe(job)) for name, job in shortest.items()}
    pulled = recipes["vo heal decoupled rank16 teacher"]
    assert (pulled.train.steps, pulled.materialize.heal_steps) == (4, 4)
    assert (pulled.penalty.mode, pulled.penalty.coefficient) == ("decoupled", 12)
    assert pulled.residual is not None
    assert pulled.distill is not None
    assert (pulled.residual.rank, pulled.distill.weight) == (16, 0.5)
    assert pulled.plan.path == str(tmp_path / "plan-vo-10-rank16.json")
    healed = recipes["qkvo least_squares heal"]
    assert (healed.materialize.merge, healed.materialize.heal_steps) == ("least_squares", 8)
    assert recipes["removed heal teacher"].distill is not None
    rebuilt = recipes["vo heal teacher reconstruct"]
    assert (rebuilt.materialize.reconstruct, rebuilt.materialize.calibration_blocks) == (True, 32)
    assert "qkvo least_squares heal reconstruct" not in recipes
    assert recipes["vo"].steps == 0
    for share, size in (("qkvo", "10"), ("kv", "10"), ("removed", "30")):
        searched = validate(study.search_recipe(share, size))
        assert searched.plan.strategy == "loss"
    assert searched.plan.action == "remove"


def test_a_plan_is_the_shortest_beginning_that_saves_enough(made: ModuleType) -> None:
    """Units of the small base have 1,024 parameters; a residual of rank 2 takes 512 a layer."""
    config = base_model_config()
    targets = [[5, 0], [5, 1], [4, 0], [3, 0], [2, 0]]
    path = [
        {
            "actions": [
                {"target": target, "source": [0, 0], "projections": [*PROJECTIONS]}
                for target in pair
            ]
        }
        for pair in (targets[:2], targets[2:4], targets[4:])
    ]

    def length(needed: int, rank: int) -> int:
        return len(made.first_of_path(path, config, needed, rank).ties)

    assert [length(needed, 0) for needed in (1, UNIT, UNIT + 1, 3 * UNIT)] == [1, 1, 2, 3]
    # 1 unit leaves 512, 2 of one layer 1,536, 3 of two layers 2,048, 4 of three 2,560.
    assert [length(needed, 2) for needed in (512, 513, 1537, 2049)] == [1, 2, 3, 4]
    with pytest.raises(Exception, match="5 actions saves less than 5,121"):
        length(5 * UNIT + 1, 0)


def base_model_config() -> Any:
    from transformers import LlamaConfig

    from tests.support.spans_base import HEADS, HIDDEN, LAYERS

    return LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )


@pytest.mark.more
def test_trainings_share_a_search_and_what_was_measured(
    made: ModuleType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = copy.deepcopy(settings)
    write_base(tmp_path / "base"), write_text(tmp_path / "text.jsonl")
    known = recipe(
        tmp_path, tmp_path / "any", plan={"strategy": "none"}, export={"formats": ["dense"]}
    )
    data = known.data.model_dump(mode="json")
    small["base"] |= {
        "model": {"path": str(tmp_path / "base"), "tokenizer": "demo-base"},
        "data": {name: data[name] for name in ("train", "validation", "sequence_length")},
        "evaluate": {"blocks": 4, "continued": False},
    }
    small["search"]["calibration_blocks"] = 2
    small["sizes"] = {"10": 2 * UNIT}
    small["axes"]["share"] = {"qkvo": {"plan": {"share": [*PROJECTIONS]}, "heads": {"10": 4}}}
    small["axes"]["merge"] = {"copy": {}}
    small["axes"]["residual"] = {
        "none": {},
        "rank2": {"recovery": ["residual"], "recipe": {"residual": {"rank": 2}}},
    }
    small["axes"]["teacher"] = small["axes"]["reconstruct"] = {"none": {}}
    small["controls"] = {"removed": {"plan": {"action": "remove"}, "heads": {"10": 2}}}
    small["rounds"] = [
        {"tokens": 64, "vary": ["heal", "residual"], "keep": 1},
        {"tokens": 128, "keep": 1},
    ]
    started: list[str] = []

    def start(command: str, value: dict[str, Any], file: Path) -> None:
        started.append(f"{command} {file.stem}")
        {"plan": plan, "run": run}[command](validate(value))

    monkeypatch.setattr(made, "start", start)
    study = made.Study(small, tmp_path / "lines.jsonl", tmp_path / "runs")
    study.folder.mkdir()
    with outputs.sketched():
        done = [job.name for job in made.go_on(study, ["10"])]
    assert done[:4] == [
        "qkvo-heal-10-64-0",
        "qkvo-heal-rank2-10-64-0",
        "qkvo-10-0-0",
        "qkvo-rank2-10-0-0",
    ]
    assert len(started) == len(done) + 2
    assert started[0] == "plan search-qkvo-10"
    lines = {line["name"]: line for line in study.read()}
    assert {line["perplexity"]["base"] for line in lines.values()} == {
        lines["qkvo-10-0-0"]["perplexity"]["base"]
    }
    plain, residual = lines["qkvo-heal-10-64-0"], lines["qkvo-rank2-10-0-0"]
    assert plain["perplexity"]["untrained"] == lines["qkvo-10-0-0"]["perplexity"]["trained"]
    assert plain["units"] == 2 < residual["units"]
    base = lines["continued-heal-0-64-0"]
    assert base["perplexity"]["trained"] != base["perplexity"]["base"]
    assert [name for name in lines if name not in done] == [
        "continued-heal-0-64-0",
        "continued-heal-0-128-0",
    ]
    assert base["bytes"] - plain["bytes"] >= 2 * UNIT * 4 - 2000  # heads of files differ
    plans = [SharingPlan.load(study.folder / f"plan-qkvo-10-{n}.json") for n in ("none", "rank2")]
    assert {*plans[0].ties} < {*plans[1].ties}
    assert not any(child.is_dir() for child in (study.folder / "qkvo-heal-10-64-0").iterdir())
    table = importlib.import_module("tie_tables").tables([*lines.values()])
    assert "**10 % (9 of 90 KV groups), 64 tokens**" in table
    assert "| qkvo, heal, rank2 | 1 | " in table
    assert [*made.go_on(study, ["10"])] == []
    # In another folder no path is searched again.
    other = made.Study(small, study.lines, tmp_path / "other")
    other.folder.mkdir()
    study.lines.write_text("\n".join(study.lines.read_text().splitlines()[:-2]) + "\n")
    started.clear()
    with outputs.sketched():
        again = [job.name for job in made.go_on(other, ["10"])]
    assert started == [f"run {name}" for name in again]
    assert again
    found = {line["name"]: line["nats"] for line in other.read()}
    assert found == {name: line["nats"] for name, line in lines.items()}


def test_an_interval_stands_beside_what_lies_above_continued(made: ModuleType) -> None:
    tables = importlib.import_module("tie_tables")

    def line(share: str, seed: int, nats: list[float], teacher: str = "none") -> dict[str, Any]:
        return {
            "arm": {"share": share, "teacher": teacher}, "seed": seed, "nats": nats,
            "predicted": [10, 10], "size": "0" if share == "continued" else "10",
        }  # fmt: skip

    continued = [line("continued", seed, [30.0, 32.0]) for seed in (0, 1)]
    ours = [line("qkvo", 0, [30.2, 32.2]), line("qkvo", 1, [30.2, 32.2])]
    # 0.02 nats a token whatever blocks and seeds are drawn: exp(0.02) - 1
    assert tables.above(ours, continued) == "2.02 % (2.02 to 2.02)"
    assert tables.above(ours[:1], continued) == "2.02 % (2.02 to 2.02)"
    assert tables.above([line("qkvo", 2, [30.2, 32.2])], continued) == ""
    assert tables.above([line("qkvo", 0, [30.2, 32.2], "teacher")], continued) == ""
    spread = tables.above([line("qkvo", 0, [30.0, 32.4])], continued)
    assert spread == "2.02 % (0.00 to 4.08)"


def test_an_arm_is_compared_with_the_one_that_leaves_one_thing_out(made: ModuleType) -> None:
    def line(nats: float, **changed: str) -> dict[str, Any]:
        arm = {"share": "qk", "merge": "copy", "heal": "heal", "pull": "none", "residual": "none"}
        arm |= {"teacher": "none"} | changed
        perplexity = {"untrained": 30.0, "trained": math.exp(nats / 10)}
        return {
            "arm": arm, "seed": 0, "nats": [nats, nats], "predicted": [10, 10], "size": "10",
            "tokens": 64, "perplexity": perplexity, "bytes": 1,
        }  # fmt: skip

    lines = [
        line(30.0),
        line(30.2, pull="penalty"),
        line(29.8, residual="rank4"),
        line(29.7, residual="rank4", teacher="teacher"),
        line(31.0, share="vo", teacher="teacher"),  # nobody has left its teacher out
    ]
    table = importlib.import_module("tie_tables").tables(lines)
    assert table.split("what one change does**\n\n")[1].splitlines()[2:] == [
        "| penalty | qk, heal | 20.09 | 20.49 | 2.02 % (2.02 to 2.02) |",
        "| rank4 | qk, heal | 20.09 | 19.69 | -1.98 % (-1.98 to -1.98) |",
        "| teacher | qk, heal, rank4 | 19.69 | 19.49 | -1.00 % (-1.00 to -1.00) |",
    ]


def test_the_page_has_the_tables_of_its_lines(made: ModuleType) -> None:
    tables = importlib.import_module("tie_tables")
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run tests/benchmarks/tie_tables.py"
