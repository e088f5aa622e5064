"""A run of Basis Sharing: its stages, what is counted, and that it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sa_models.basis import BasisFolder, load_basis
from sa_models.errors import PostshareError
from train import basis as stage
from train import compare as comparing
from train.pipeline import export, run
from train.recipe import Recipe, validate
from train.tracking import read_rows

torch.set_num_threads(1)

WHOLE = 8 * 3 * 128 * 128
"""q, k and v of the demo base."""


def recipe(folder: Path, steps: int = 3, **sections: Any) -> Recipe:
    text = folder.parent / "text.txt"
    if not text.is_file():
        text.write_text("def sum_of(values):\n    return sum(values)  # of all\n" * 400)
    value: dict[str, Any] = {
        "name": "small",
        "output_dir": str(folder),
        "model": {"path": "demo-base"},
        "data": {"train": str(text), "validation": str(text), "sequence_length": 64},
        "basis": {"parameters": WHOLE // 2, "calibration_blocks": 3},
        "train": {"steps": steps, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
        "evaluate": {"blocks": 4, "continued": False},
    }
    return validate(value | sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = recipe(tmp_path_factory.mktemp("basis") / "run")
    run(made)
    return made


def test_a_run_counts_its_factors(finished: Recipe) -> None:
    folder = finished.folder
    summary = json.loads((folder / "summary.json").read_text())
    trained = load_basis(folder / "weights", "sdpa")
    stored = sum(p.numel() for p in trained.parameters())
    assert summary["parameters"]["stored"] == stored
    base = summary["parameters"]["base"]
    # The last rank of any factor does not fit: 2 layers of 128 x 128 have 384 parameters a rank.
    assert base - WHOLE // 2 - 384 < stored <= base - WHOLE // 2
    assert summary["bytes"]["factored"] == 2 * stored
    assert summary["bytes"]["compact"] is None
    assert set(summary["perplexity"]) == {"base", "continued", "direct", "post"}
    first, last = load_basis(folder / "basis", "sdpa"), BasisFolder(folder / "weights")
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    changed = [n for n, p in first.named_parameters() if not p.equal(last.files.read(n))]
    assert "model.layers.6.self_attn.v_proj.basis" in changed
    dense = LlamaForCausalLM.from_pretrained(folder / "export" / "dense")
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, last.read(name).to(torch.bfloat16)), name


def test_the_untrained_factors_are_the_row_direct(finished: Recipe) -> None:
    """Above the base's perplexity, and far below that of chance."""
    found = json.loads((finished.folder / "summary.json").read_text())["perplexity"]
    assert found["base"] < found["direct"] < 500


def test_resuming_is_exact(finished: Recipe, tmp_path: Path) -> None:
    """Stopped after two of three steps: the same weights."""
    stopped = recipe(
        tmp_path / "run",
        data=finished.data.model_dump(mode="json"),
        train=finished.train.model_dump(mode="json") | {"checkpoint_every": 2},
    )
    run(stopped)
    expected = load_file(stopped.folder / "weights" / "model.safetensors")
    for name in ("weights", "export"):
        shutil.rmtree(stopped.folder / name)
    (stopped.folder / "result.json").unlink()
    steps = sorted(path.name for path in (stopped.folder / "checkpoints").iterdir())
    assert steps[0].endswith("2")
    for path in (stopped.folder / "checkpoints").iterdir():
        if path.name != steps[0]:
            shutil.rmtree(path)
    run(stopped)
    again = load_file(stopped.folder / "weights" / "model.safetensors")
    whole = load_file(finished.folder / "weights" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, whole[name]), name


def test_a_second_start_does_nothing(finished: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "factorized", None)
    monkeypatch.setattr("train.loop._train", None)
    monkeypatch.setattr("train.summary.block_losses", None)
    run(finished)
    export(finished)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"plan": {"budget": {"ratio": 0.3}}}, "factors have no heads to tie"),
        ({"heads": {"kv_heads": 2}}, "factors have no heads to tie"),
        ({"export": {"formats": ["compact"]}}, r"export\.formats"),
        ({"basis": {"parameters": 1000, "layers": 1}}, r"basis\.layers is 1"),
        ({"penalty": {"coefficient": 2.0}}, "nothing to pull"),
    ],
)
def test_options_without_effect(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(PostshareError, match=message):
        recipe(tmp_path / "run", **sections)


def test_a_size_that_cannot_be_is_refused_before_anything(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", basis={"parameters": WHOLE})
    with pytest.raises(PostshareError, match=r"change basis\.parameters"):
        run(made)
    assert not made.folder.exists()


def test_the_control_is_no_larger_than_the_plan(tmp_path: Path) -> None:
    sections = {"basis": None, "plan": {"budget": {"ratio": 0.3}}}
    made = recipe(tmp_path / "run", 2, **sections)
    comparing.compare(made, 1, ["basis"])
    rows = json.loads((tmp_path / "run-compare" / "comparison.json").read_text())
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == ["base", "continued", "direct", "recipe", "basis"]
    own, basis = by_name["recipe"], by_name["basis"]
    assert own["parameters"] - 384 < basis["parameters"] <= own["parameters"]
    assert basis["bytes"] == 2 * basis["parameters"]
    assert basis["perplexities"] != own["perplexities"]
    run_folder = tmp_path / "run-compare" / "basis" / "seed-0"
    assert read_rows(run_folder / "metrics.jsonl")[-1]["step"] == 2
