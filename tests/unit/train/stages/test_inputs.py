"""The stamp of a run's inputs: a run does not go on with another base or another text."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sa_models.errors import PostshareError
from tests.support.demo_runs import recipe
from train.demo import demo_base_path
from train.recipe.recipe import Recipe
from train.stages import inputs, pipeline
from train.stages.inputs import INPUTS_FILE, changed, stamp_weights
from train.stages.pipeline import export, plan, run
from train.stages.run import Run
from train.stages.start import begin
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("sketched")

WORDS = np.array(["the", "same", "words", "in", "another", "order", "make", "another", "text"])


def write_text(file: Path, first: int = 0) -> Path:
    rows = [" ".join(np.roll(WORDS, first + i)) + f" {i}" for i in range(200)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def inputs_of(tmp_path: Path) -> Recipe:
    base = tmp_path / "base"
    shutil.copytree(demo_base_path(), base)
    text = str(write_text(tmp_path / "text.jsonl"))
    data = {"train": text, "validation": text, "sequence_length": 64}
    return recipe(tmp_path / "run", "none", model={"path": str(base)}, data=data)


def change_weights(base: Path, name: str = "model.norm.weight") -> None:
    weights = load_file(base / "model.safetensors")
    weights[name] = weights[name] * 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_the_stamp_is_of_what_the_files_hold(inputs_of: Recipe) -> None:
    with begin(inputs_of) as current:
        stamp = json.loads((current.folder / INPUTS_FILE).read_text())
        tokens = current.blocks[0]
    base = Path(inputs_of.model.path)
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert stamp["model"]["files"]["model.safetensors"]["sha256"] == digest
    assert stamp["model"]["path"] == str(base)
    assert stamp["data.train.0"]["path"] == inputs_of.data.train[0].path
    assert 0 <= stamp["data.train.0"]["tokens"] - len(tokens) * tokens.length < tokens.length
    assert stamp.keys() == {"model", "data.train.0", "data.validation.0"}


def test_another_text_is_refused_by_a_run_that_has_begun(inputs_of: Recipe) -> None:
    run(inputs_of)
    rows = read_rows(inputs_of.folder / "metrics.jsonl")
    text = Path(inputs_of.data.train[0].path)
    before = text.read_text()
    write_text(text, first=3)  # of as many words
    with pytest.raises(PostshareError, match=r"other inputs \(data\.train\.0 ") as caught:
        run(inputs_of)
    assert "\n" not in str(caught.value)
    assert read_rows(inputs_of.folder / "metrics.jsonl") == rows
    text.write_text(before)  # written again, it is the same text
    run(inputs_of)


def test_another_held_out_text_is_told_of_and_used(
    inputs_of: Recipe, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    held_out = str(write_text(tmp_path / "other.jsonl", first=1))
    data = inputs_of.data.model_copy(
        update={"validation": (inputs_of.data.train[0].model_copy(update={"path": held_out}),)}
    )
    made = inputs_of.model_copy(update={"data": data})
    run(made)
    before = json.loads((made.folder / "summary.json").read_text())["perplexity"]
    write_text(Path(held_out), first=5)
    capfd.readouterr()
    run(made)
    assert "note: data.validation.0 " in capfd.readouterr().err
    after = json.loads((made.folder / "summary.json").read_text())["perplexity"]
    assert after["base"] != before["base"]
    run(made)
    assert "data.validation" not in capfd.readouterr().err


def test_a_shorter_text_is_told_by_its_tokens(inputs_of: Recipe) -> None:
    run(inputs_of)
    text = Path(inputs_of.data.train[0].path)
    known = json.loads((inputs_of.folder / INPUTS_FILE).read_text())["data.train.0"]["tokens"]
    text.write_text("".join(line for line in text.open() if "9" not in line))
    with pytest.raises(PostshareError, match=f"{known:,} tokens then, [0-9,]+ now"):
        run(inputs_of)


def test_another_base_is_refused_by_a_run_that_has_begun(inputs_of: Recipe) -> None:
    run(inputs_of)
    base = Path(inputs_of.model.path)
    change_weights(base)
    with pytest.raises(PostshareError, match=r"model .*base has another model\.safetensors\)"):
        run(inputs_of)
    shutil.copytree(demo_base_path(), base, dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    run(inputs_of)  # saved again, it is the same base
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(PostshareError, match=r"has another config\.json\)"):
        run(inputs_of)


def test_what_has_only_been_planned_is_planned_again(inputs_of: Recipe) -> None:
    plan(inputs_of)
    found = (inputs_of.folder / "plan.json").read_text()
    base = Path(inputs_of.model.path)
    change = load_file(base / "model.safetensors")
    for name in [name for name in change if name.endswith("q_proj.weight")]:
        change[name] = change[name].flip(0)
    save_file(change, base / "model.safetensors", metadata={"format": "pt"})
    plan(inputs_of)
    assert (inputs_of.folder / "plan.json").read_text() != found


def test_a_run_of_an_earlier_version_goes_on_with_what_is_there(
    inputs_of: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    run(inputs_of)
    stamp = (inputs_of.folder / INPUTS_FILE).read_text()
    (inputs_of.folder / INPUTS_FILE).unlink()
    assert "earlier version" not in capfd.readouterr().err
    run(inputs_of)
    assert "was begun by an earlier version, which kept no stamp" in capfd.readouterr().err
    assert (inputs_of.folder / INPUTS_FILE).read_text() == stamp
    run(inputs_of)
    assert "earlier version" not in capfd.readouterr().err


def test_a_damaged_stamp_is_told_of(inputs_of: Recipe) -> None:
    with begin(inputs_of):
        pass
    (inputs_of.folder / INPUTS_FILE).write_text("{")
    with pytest.raises(PostshareError, match=r"inputs\.json is damaged; delete it"):
        begin(inputs_of)


def test_a_file_is_read_again_only_when_it_looks_changed(
    inputs_of: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(inputs_of.model.path)
    first = stamp_weights(base, {})
    read: list[str] = []

    def file_hash(file: Path) -> str:
        read.append(file.name)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(inputs, "file_hash", file_hash)
    assert stamp_weights(base, first) == first
    assert read == []
    os.utime(base / "model.safetensors")
    assert changed({"model": first}, {"model": stamp_weights(base, first)}) == {}
    assert read == ["model.safetensors"]


def test_a_file_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    base = demo_base_path()
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    shutil.copy(base / "model.safetensors", blobs / digest)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    shutil.copy(base / "config.json", snapshot)
    stamp = stamp_weights(snapshot, {})
    assert stamp["files"]["model.safetensors"]["sha256"] == digest
    assert changed({"model": stamp_weights(base, {})}, {"model": stamp}) == {}


def test_an_export_that_still_has_to_read_text_reads_that_of_the_run(
    inputs_of: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was stopped before it merged: another text is refused, as a run refuses it. What
    was merged needs no text any more."""
    text, base = Path(inputs_of.data.train[0].path), Path(inputs_of.model.path)
    data = {"train": str(text), "validation": str(text), "sequence_length": 64}
    made = recipe(
        inputs_of.folder,
        model={"path": str(base)},
        data=data,
        plan={"strategy": "random", "share": ["q", "k"], "budget": {"ratio": 0.1}},
        materialize={"merge": "least_squares", "calibration_blocks": 4},
        train={"steps": 1, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
    )

    def stop(current: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(pipeline, "materialize_on_text", stop)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    write_text(text, first=3)
    for command in (run, export):
        with pytest.raises(PostshareError, match="began with other inputs"):
            command(made)
    assert not (made.folder / "export").exists()
    write_text(text)
    export(made)
    shutil.rmtree(made.folder / "export")
    text.unlink()
    export(made)
    assert (made.folder / "export" / "compact").is_dir()
