"""Short runs of the shipped recipes on two processes: the losses and weights of a single one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sa_models.export.peft_adapter import load_adapter
from tests.distributed.conftest import Alone, Together
from tests.distributed.runs import SHORT
from tests.support.launcher import launch
from train.tracking.metrics_log import read_rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]


@pytest.mark.more
def test_the_demo_itself_on_two_processes(alone: Alone, together: Together) -> None:
    """Searched, pulled together with a span in place, healed and distilled: as on one process."""
    folder, printed = together("zero3", "demo")
    assert printed.count("what auto would do") == 1, "below the table"
    for training, steps in (("", 1), ("continued", 3), ("heal", 2)):
        assert_same_curve(folder / training, alone("demo") / training, not training, steps)
    one, two = (json.loads((f / "summary.json").read_text()) for f in (alone("demo"), folder))
    assert one["heads"] == two["heads"]
    assert one["heads"]["tied"] == 12
    assert one["parameters"]["base"] - one["parameters"]["stored"] == 52 * 16 * 128
    assert two["directshare"] == pytest.approx(one["directshare"], rel=1e-4)
    for model in ("base", "continued", "direct", "post"):
        assert two["perplexity"][model] == pytest.approx(one["perplexity"][model], rel=1e-4)
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    "config", ["ddp", pytest.param("zero2", marks=pytest.mark.more), "zero3", "fsdp2"]
)
def test_two_processes_give_the_single_process_losses(
    config: str, alone: Alone, together: Together
) -> None:
    folder, printed = together(config, "post")
    single = alone("post")
    assert printed.count("PostShare") == 1, "the table is printed once, by the main process"
    assert_same_curve(folder, single, penalized=True)
    assert_same_curve(folder / "continued", single / "continued", penalized=False)
    assert_same_results(folder, single)


def assert_same_curve(folder: Path, single: Path, penalized: bool, steps: int = 3) -> None:
    rows, expected = read_rows(folder / "metrics.jsonl"), read_rows(single / "metrics.jsonl")
    assert len(rows) == len(expected) == steps
    keys = ["lm_loss", "total_loss", "gradient_norm"]
    keys += ["penalty", "pair_distance_mean"] if penalized else []
    for row, wanted in zip(rows, expected, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=1e-4), (row["step"], key)
        assert row["tokens"] == wanted["tokens"]
    if steps < 3:  # train.evaluate_every
        assert "validation_loss" not in rows[-1] | expected[-1]
        return
    last, wanted = rows[-1]["validation_loss"], expected[-1]["validation_loss"]
    assert last == pytest.approx(wanted, rel=1e-4)


def assert_same_weight(own: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal within 1e-5 of the norm, but for one entry in 4,000.

    Adam moves an entry by the learning rate however small its gradient is: where the terms of a
    gradient cancel, the order of an fp32 sum decides the entry's sign. Such an entry is at most
    two steps of 1e-3 away on either side.
    """
    apart = (own - expected).abs().flatten()
    assert float(apart.max()) <= 4e-3, name
    alike = apart.sort().values[: apart.numel() - apart.numel() // 4000]
    assert float(alike.norm()) <= 1e-5 * float(expected.norm()), name


def assert_same_results(folder: Path, single: Path) -> None:
    own = load_file(folder / "weights" / "model.safetensors")
    expected = load_file(single / "weights" / "model.safetensors")
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_weight(own[name], value, name)
        assert float((own[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    summary, wanted = (json.loads((f / "summary.json").read_text()) for f in (folder, single))
    for name, value in wanted["perplexity"].items():
        found = summary["perplexity"][name]
        assert found is value is None or found == pytest.approx(value, rel=2e-4), name
    assert (folder / "export" / "compact" / "manifest.json").is_file()


GONE = {
    "attention-spans": {(5, "q"), (5, "k"), (6, "q"), (6, "k")},
    "kv-spans": {(3, "k"), (3, "v"), (5, "k"), (5, "v"), (7, "q"), (7, "k")},
}
"""Projections that followers have not."""


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_spans_on_two_processes_give_the_single_process_losses(
    config: str, name: str, alone: Alone, together: Together
) -> None:
    folder, printed = together(config, name)
    single = alone(name)
    assert printed.count("post-trained") == 1, "the table is printed once, by the main process"
    assert (folder / "plan.json").read_bytes() == (single / "plan.json").read_bytes()
    assert_same_curve(folder, single, penalized=name == "kv-spans")
    assert_same_results(folder, single)
    # Followers have no projections that would only lie idle; nothing is missing, either.
    names = load_file(folder / "weights" / "model.safetensors").keys()
    kept = {(layer, p) for layer in range(8) for p in "qkvo"} - GONE[name]
    assert {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer, p in kept} == {
        name for name in names if ".self_attn." in name
    }


def assert_healed_alike(folder: Path, single: Path) -> None:
    one, two = (load_file(f / "heal/weights/model.safetensors") for f in (single, folder))
    before = load_file(single / "weights" / "model.safetensors")
    moved = 0.0
    for name, value in one.items():
        assert_same_weight(two[name], value, name)
        if value.shape == before[name].shape:
            moved += float((value - before[name]).norm())
    assert moved > 0.1


def test_healing_of_a_sharded_model_equals_one_process(alone: Alone, together: Together) -> None:
    folder, _ = together("fsdp2", "healed")
    assert_healed_alike(folder, alone("healed"))
    # The exported dense model holds every tie exactly.
    dense = load_file(folder / "export" / "dense" / "model.safetensors")
    plan = json.loads((folder / "plan.json").read_text())
    for tie in plan["ties"]:
        (layer, unit), (at, source) = tie["target"], tie["source"]
        for p in tie["projections"]:
            mine = dense[f"model.layers.{layer}.self_attn.{p}_proj.weight"].unflatten(0, (8, -1))
            theirs = dense[f"model.layers.{at}.self_attn.{p}_proj.weight"].unflatten(0, (8, -1))
            assert torch.equal(mine[unit], theirs[source])


def test_healing_with_residuals_equals_one_process(alone: Alone, together: Together) -> None:
    folder, _ = together("zero3", "residual")
    single = alone("residual")
    assert_healed_alike(folder, single)
    first, second = (load_adapter(f / "heal/weights/adapter") for f in (single, folder))
    begun = load_adapter(single / "residual")
    for where, pair in first.items():
        assert float((pair.b - begun[where].b).norm()) > 1e-4
        # Of A and B alone the directions of nearly equal sizes may differ.
        ours, theirs = pair.product(), second[where].product()
        assert float((ours - theirs).norm()) <= 1e-3 * float(ours.norm()), where


def test_all_ranks_heal_what_was_merged(alone: Alone, together: Together) -> None:
    """On calibration text: once, on one rank, and read by all."""
    found = {}
    for config, folder in (("cpu", alone("merged")), ("zero3", together("zero3", "merged")[0])):
        found[config] = [
            load_file(folder / name / "model.safetensors") for name in ("merged", "heal/weights")
        ]
    for one, other in zip(found["cpu"], found["zero3"], strict=True):
        assert one.keys() == other.keys()
        for name, weight in one.items():
            difference = float((other[name] - weight).norm())
            assert difference <= 1e-4 * float(weight.norm()), name
    merged, healed = found["zero3"]
    assert healed["model.norm.weight"].shape == merged["model.norm.weight"].shape
    assert not healed["model.norm.weight"].equal(merged["model.norm.weight"])


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_factors_train_alike_on_every_backend(
    config: str, alone: Alone, together: Together
) -> None:
    folder, _ = together(config, "basis")
    first = load_file(alone("basis") / "merged" / "model.safetensors")
    single, found = (
        load_file(f / "heal" / "weights" / "model.safetensors") for f in (alone("basis"), folder)
    )
    shared = "model.layers.2.self_attn.k_proj.basis.weight"
    assert shared in first
    assert found.keys() == single.keys()
    for name, weight in single.items():
        difference = float((found[name] - weight).norm())
        assert difference <= 1e-4 * float(weight.norm()), name
        moved = float((weight - first[name]).norm())
        assert difference <= 1e-2 * moved + 1e-7, name
    assert not single[shared].equal(first[shared])


def test_an_error_of_the_main_process_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """A tokenizer that is not there is found on the main process, while the others wait."""
    result = launch(
        "ddp", "-m", "train", "recipes/demo_postshare.yaml", *SHORT, f"model.tokenizer={tmp_path}",
        f"output_dir={tmp_path / 'run'}", timeout=120,
    )  # fmt: skip
    assert result.failed
    assert not result.timed_out, result.report()
    assert result.output.count(f"error: {tmp_path} has no tokenizer") == 1, result.report()
    ranks = [line for line in result.output.splitlines() if line.startswith("[default")]
    assert not any("Traceback" in line for line in ranks), result.report()
    assert not (tmp_path / "run").exists()
