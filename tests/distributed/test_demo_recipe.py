"""The demo recipe as users start it: `accelerate launch`, the shipped launch files, `-m train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sa_models.export.peft_adapter import load_adapter
from tests.support.launcher import launch, run
from train.recipe.recipe import load_recipe
from train.stages import pipeline
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=3",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.evaluate_every=3",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=4",
)


SPANS = {
    # Chosen by the published rule: nothing is measured but one block's maps.
    "sa": ("spans.strategy=late", "spans.calibration_blocks=1", "evaluate.continued=false"),
    # Keys and values of a layer below, the leader's their mean; ties and pooled heads besides.
    "kv, pooled, tied": (
        "spans={spans: [{leader: 2, followers: [3, 5], share: kv}, {leader: 6, followers: [7]}]}",
        "heads.kv_heads=4",
        "plan={budget: {ratio: 0.2}, share: [q, k, v, o]}",
        "evaluate.continued=false",
    ),
}
"""Overrides of recipes/demo_sa.yaml; the control has no spans and is compared with those above."""


def start(
    config: str,
    folder: Path,
    *overrides: str,
    processes: int | None = None,
    recipe: str = "recipes/demo_postshare.yaml",
) -> str:
    return run(
        config,
        "-m",
        "train",
        recipe,
        *SHORT,
        f"output_dir={folder}",
        *overrides,
        processes=processes,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    start("cpu", folder)
    return folder


SHORT_AUTO = ("plan.calibration_blocks=2", "materialize.calibration_blocks=4")
"""Of recipes/demo.yaml: most of the search is on 64 tokens a block."""


def test_the_demo_itself_on_two_processes(tmp_path: Path) -> None:
    """Searched, reconstructed, healed and distilled: as on one process, and better than untouched
    by the reconstruction alone."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for config, folder in zip(("cpu", "zero3"), folders, strict=True):
        start(config, folder, *SHORT_AUTO, recipe="recipes/demo.yaml")
    assert_same_curve(folders[1] / "heal", folders[0] / "heal", penalized=False)
    one, two = (json.loads((f / "summary.json").read_text()) for f in folders)
    assert one["heads"] == two["heads"]
    assert one["parameters"]["base"] - one["parameters"]["stored"] >= 0.083 * 1_869_952
    for model in ("base", "continued", "direct", "post"):
        assert two["perplexity"][model] == pytest.approx(one["perplexity"][model], rel=1e-4)
    assert (folders[1] / "report.html").is_file()


@pytest.mark.parametrize(
    "config", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3", "fsdp2"]
)
def test_two_processes_give_the_single_process_losses(
    config: str, single: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    output = start(config, folder)
    assert output.count("PostShare") == 1, "the table is printed once, by the main process"
    assert_same_curve(folder, single, penalized=True)
    assert_same_curve(folder / "continued", single / "continued", penalized=False)
    assert_same_results(folder, single)


def assert_same_curve(folder: Path, single: Path, penalized: bool) -> None:
    rows, expected = read_rows(folder / "metrics.jsonl"), read_rows(single / "metrics.jsonl")
    assert len(rows) == len(expected) == 3
    keys = ["lm_loss", "total_loss", "gradient_norm"]
    keys += ["penalty", "pair_distance_mean"] if penalized else []
    for row, wanted in zip(rows, expected, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=1e-4), (row["step"], key)
        assert row["tokens"] == wanted["tokens"]
    last, wanted = rows[-1]["validation_loss"], expected[-1]["validation_loss"]
    assert last == pytest.approx(wanted, rel=1e-4)


def assert_same_results(folder: Path, single: Path) -> None:
    own = load_file(folder / "weights" / "model.safetensors")
    expected = load_file(single / "weights" / "model.safetensors")
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert float((own[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    summary, wanted = (json.loads((f / "summary.json").read_text()) for f in (folder, single))
    for name, value in wanted["perplexity"].items():
        found = summary["perplexity"][name]
        assert found is value is None or found == pytest.approx(value, rel=2e-4), name
    assert (folder / "export" / "compact" / "manifest.json").is_file()


@pytest.fixture(scope="module", params=SPANS)
def spans_single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the span recipes on a single process, this one, in a folder of its name."""
    folder = tmp_path_factory.mktemp("spans") / request.param
    overrides = [*SHORT, *SPANS[request.param], f"output_dir={folder}"]
    pipeline.run(load_recipe("recipes/demo_sa.yaml", overrides))
    return folder


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_spans_on_two_processes_give_the_single_process_losses(
    config: str, spans_single: Path, tmp_path: Path
) -> None:
    folder, kind = tmp_path / "run", spans_single.name
    output = start(config, folder, *SPANS[kind], recipe="recipes/demo_sa.yaml")
    assert output.count("post-trained") == 1, "the table is printed once, by the main process"
    assert (folder / "plan.json").read_bytes() == (spans_single / "plan.json").read_bytes()
    assert_same_curve(folder, spans_single, penalized=kind != "sa")
    assert_same_results(folder, spans_single)
    # Followers have no projections that would only lie idle; nothing is missing, either.
    names = load_file(folder / "weights" / "model.safetensors").keys()
    gone = {(5, "q"), (5, "k"), (6, "q"), (6, "k")}
    if kind != "sa":
        gone = {(3, "k"), (3, "v"), (5, "k"), (5, "v"), (7, "q"), (7, "k")}
    kept = {(layer, p) for layer in range(8) for p in "qkvo"} - gone
    assert {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer, p in kept} == {
        name for name in names if ".self_attn." in name
    }


@pytest.mark.parametrize(("sharded", "rank"), [("fsdp2", 0), ("zero3", 4)])
def test_healing_of_a_sharded_model_equals_one_process(
    sharded: str, rank: int, tmp_path: Path
) -> None:
    """With and without residuals of a rank, which ZeRO-3 too reads from files."""
    more = [f"residual.rank={rank}"] if rank else []
    folders = {"cpu": tmp_path / "cpu", sharded: tmp_path / sharded}
    for config, folder in folders.items():
        start(config, folder, "materialize.heal_steps=2", "evaluate.continued=false", *more)
    if rank:
        first, second = (load_adapter(f / "heal/weights/adapter") for f in folders.values())
        begun = load_adapter(folders["cpu"] / "residual")
        for where, pair in first.items():
            assert float((pair.b - begun[where].b).norm()) > 1e-4
            # Of A and B alone the directions of nearly equal sizes may differ.
            ours, theirs = pair.product(), second[where].product()
            assert float((ours - theirs).norm()) <= 1e-3 * float(ours.norm()), where
    one, two = (load_file(f / "heal/weights/model.safetensors") for f in folders.values())
    before = load_file(folders["cpu"] / "weights" / "model.safetensors")
    moved = 0.0
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-4 * float(value.norm()), name
        if value.shape == before[name].shape:
            moved += float((value - before[name]).norm())
    assert moved > 0.1
    if rank:
        return
    # The exported dense model holds every tie exactly.
    dense = load_file(folders[sharded] / "export" / "dense" / "model.safetensors")
    plan = json.loads((folders[sharded] / "plan.json").read_text())
    for tie in plan["ties"]:
        (layer, unit), (at, source) = tie["target"], tie["source"]
        for p in tie["projections"]:
            mine = dense[f"model.layers.{layer}.self_attn.{p}_proj.weight"].unflatten(0, (8, -1))
            theirs = dense[f"model.layers.{at}.self_attn.{p}_proj.weight"].unflatten(0, (8, -1))
            assert torch.equal(mine[unit], theirs[source])


def test_an_error_of_the_main_process_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """A tokenizer that is not there is found on the main process, while the others wait."""
    result = launch(
        "ddp", "-m", "train", "recipes/demo_postshare.yaml", *SHORT, f"model.tokenizer={tmp_path}",
        f"output_dir={tmp_path / 'run'}", timeout=120,
    )  # fmt: skip
    assert result.failed
    assert not result.timed_out, result.report()
    assert result.output.count("error: no tokenizer can be loaded") == 1, result.report()
    ranks = [line for line in result.output.splitlines() if line.startswith("[default")]
    assert not any("Traceback" in line for line in ranks), result.report()
    assert not (tmp_path / "run").exists()
