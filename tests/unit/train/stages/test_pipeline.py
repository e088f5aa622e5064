"""The whole pipeline on small and on real models, run as `postshare run` runs it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.atomic_files import beside
from sa_models.errors import PostshareError
from sa_models.plan import HeadTie, SharingPlan
from tests.support import outputs
from tests.support.interruption import KilledError, kill
from train.demo import demo_base_path
from train.distributed.engines.start import start
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_dense
from train.recipe.identity import run_identity
from train.recipe.recipe import Recipe, validate
from train.stages.outcome import next_step
from train.stages.pipeline import evaluate, export, plan, run
from train.stages.run import Run
from train.stages.start import begin
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)


def recipe(folder: Path, base: str | Path, text: str | Path, **sections: Any) -> Recipe:
    value: dict[str, Any] = {
        "name": "test",
        "output_dir": str(folder),
        "model": {"path": str(base)},
        "data": {"train": str(text), "validation": str(text), "sequence_length": 64},
        "plan": {"budget": {"ratio": 0.3}},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
        },
        "evaluate": {"blocks": 4},
    }
    for name, section in sections.items():
        merged = value.get(name, {}) | section if isinstance(section, dict) else section
        value[name] = {k: v for k, v in merged.items() if v is not ...}
    return validate(value)


TEXT = """
Importing the package registers the compact model with the Auto classes of the library, so that a
call of from_pretrained loads a compact folder. What sharing is: plans, units, similarity,
materializing, compact models, exporting. Every stage reads files and writes files.
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents of plain English."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = TEXT.split()
    rows = [" ".join(words[i % len(words) :] + words[: i % len(words)]) for i in range(120)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Recipe:
    """One run of the demo base with healing, and with pictures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    made = recipe(folder, "demo-base", text, materialize={"heal_steps": 2, "merge": "mean"})
    with outputs.rendered():
        run(made)
    return made


def check_run(made: Recipe) -> dict[str, Any]:
    """What every finished run must show; returns its summary."""
    folder = made.folder
    for name in ("recipe.yaml", "plan.json", "metrics.jsonl", "evaluation.json", "summary.json"):
        assert (folder / name).is_file(), name
    page = (folder / "report.html").read_text()
    assert 'class="verdict"' in page
    (*_, start) = json.loads((folder / "provenance.json").read_text())["starts"]
    assert start["versions"]["torch"] in page
    assert not list(folder.rglob("*.tmp*"))
    summary = json.loads((folder / "summary.json").read_text())
    manifest = json.loads((folder / "export/compact/manifest.json").read_text())
    assert manifest["notes"]["numbers"]["perplexity"] == summary["perplexity"]
    compact = AutoModelForCausalLM.from_pretrained(folder / "export/compact", dtype=torch.float32)
    dense, info = LlamaForCausalLM.from_pretrained(
        folder / "export/dense", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    difference = (compact.eval()(ids).logits - dense.eval()(ids).logits).abs().max()
    assert float(difference.detach()) <= 1e-5
    stored = sum(p.numel() for p in compact.parameters())
    assert stored == summary["parameters"]["stored"]
    assert sum(p.numel() for p in dense.parameters()) == summary["parameters"]["base"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(compact.generate(ids, **options), dense.generate(ids, **options))
    return summary


def test_the_demo_base_through_all_stages(finished: Recipe) -> None:
    summary = check_run(finished)
    assert set(summary["perplexity"]) == {"base", "continued", "direct", "post"}
    assert all(value > 1 for value in summary["perplexity"].values())
    assert summary["heads"]["requested_ratio"] == 0.3
    assert summary["heads"]["effective_ratio"] == 19 / 64
    # 3 steps and 2 healing steps of 4 blocks, all but the first token of a block predicted.
    assert summary["tokens"] == 5 * 4 * 63
    weights = finished.folder / "export" / "compact" / "model.safetensors"
    assert summary["bytes"]["compact"] == weights.stat().st_size
    saved = summary["bytes"]["dense"] - summary["bytes"]["compact"]
    assert saved == pytest.approx(2 * 19 * 3 * 16 * 128, abs=200)
    rows = read_rows(finished.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["penalty"] > 0 for row in rows)
    # Every model that a run leaves says its rotation in the keys of transformers 4 as well.
    configs = list(finished.folder.rglob("config.json"))
    assert len(configs) >= 4
    for file in configs:
        config = json.loads(file.read_text())
        assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None), file
        assert config["torch_dtype"] == config["dtype"], file
    for picture in ("plan-similarity.png", "plan-ties.png"):
        assert (finished.folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_nothing_on_a_second_start(
    finished: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(finished.folder.rglob("*.safetensors"))
    before = {f: f.stat().st_mtime_ns for f in files}
    monkeypatch.setattr(
        "train.evaluation.summary.block_losses", lambda *_, **__: pytest.fail("evaluated again")
    )
    monkeypatch.setattr(
        "sa_models.scores.weight_cosine.unit_scores", lambda *_: pytest.fail("planned again")
    )
    run(finished)
    assert {f: f.stat().st_mtime_ns for f in files} == before


def copied(finished: Recipe, folder: Path, **sections: Any) -> Recipe:
    """A finished run in a folder of its own, whose recipe has other sections."""
    shutil.copytree(finished.folder, folder)
    value = finished.model_dump(mode="json") | {"output_dir": str(folder)}
    return validate(value | {name: value[name] | section for name, section in sections.items()})


def losses(folder: Path) -> dict[str, float]:
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    return {name: value["loss"] for name, value in models.items()}


def test_another_export_is_measured_again(
    finished: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by reading: the old perplexity stood in the summary and on the new export's card."""
    made = copied(finished, tmp_path / "run", export={"dtype": "float32"})  # the base is in bf16
    before = losses(made.folder)
    shutil.rmtree(made.folder / "export")
    export(made)
    assert not (made.folder / "summary.json").exists()  # it was of the other one
    assert "summary.json was of an earlier export" in capsys.readouterr().out.replace("\n", "")
    evaluate(made)
    assert "measured again: continued, post" in capsys.readouterr().out.replace("\n", " ")
    after = losses(made.folder)
    assert (after["base"], after["direct"]) == (before["base"], before["direct"])
    summary = json.loads((made.folder / "summary.json").read_text())
    blocks = begin(made).blocks[1]
    for name, folder in (("post", "export/dense"), ("continued", "continued/weights")):
        model = load_dense(made.folder / folder, "sdpa")
        expected = perplexity(model, blocks, 8, limit=4, progress=False)
        assert after[name] == pytest.approx(expected.loss, rel=1e-6)
        assert after[name] != before[name]
        assert summary["perplexity"][name] == pytest.approx(expected.perplexity, rel=1e-6)
    card = (made.folder / "export/compact/README.md").read_text()
    assert f"| perplexity of this model | {summary['perplexity']['post']:.2f} |" in card
    # The compact folder of another dtype, which the recipe no longer asks for, is not judged.
    only = validate(made.model_dump(mode="json") | {"export": {"formats": ["dense"]}})
    shutil.rmtree(made.folder / "export" / "dense")
    run(only)
    assert losses(only.folder)["post"] == pytest.approx(before["post"], rel=1e-5)


def test_other_held_out_text_of_as_many_blocks_is_measured_again(
    finished: Recipe, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(text.read_bytes())
    data = {"validation": str(other)}
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        data=data,
        train={"steps": 0},
        export={"formats": ["dense"]},
    )
    run(made)
    before = losses(made.folder)
    rows = text.read_text().splitlines()
    other.write_text("\n".join(rows[::-1]) + "\n")
    evaluate(made)
    after = losses(made.folder)
    assert all(abs(after[name] - before[name]) > 1e-4 for name in ("base", "direct"))


def test_the_losses_of_an_older_run_folder_are_measured_again(
    finished: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its entries do not say what they are of."""
    made = copied(finished, tmp_path / "run")
    file = made.folder / "evaluation-blocks.json"
    value = json.loads(file.read_text())
    old = {n: {"nats": [9.0] * len(b["nats"]), "tokens": b["tokens"]} for n, b in value.items()}
    file.write_text(json.dumps(old))
    run(made)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "measured again: base, continued, direct, post" in said
    assert losses(made.folder) == losses(finished.folder)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_unfinished_healing_is_no_finished_training(
    steps: int, text: Path, tmp_path: Path
) -> None:
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        train={"steps": steps},
        materialize={"heal_steps": 2},
        evaluate={"blocks": 1, "continued": False},
    )
    with pytest.raises(PostshareError, match="holds no finished training; start it with"):
        export(made)
    assert not made.folder.exists()
    plan(made)
    if steps:
        shutil.copytree(demo_base_path(), made.folder / "weights")
    for command in (export, evaluate):
        with pytest.raises(PostshareError, match="heal holds no finished training; start it with"):
            command(made)
    assert not (made.folder / "export").exists()


def test_an_evaluation_without_an_export_is_refused_before_anything_is_measured(
    finished: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copied(finished, tmp_path / "run")
    shutil.rmtree(made.folder / "export" / "dense")
    (made.folder / "evaluation-blocks.json").unlink()
    for name in ("train.evaluation.summary.block_losses", "train.stages.run.prepare_data"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work before the check"))
    with pytest.raises(PostshareError, match="export/dense is not there; run `postshare export`"):
        evaluate(made)


def test_the_folder_of_another_run_is_refused_before_its_model_is_fetched(
    finished: Recipe, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.stages.run.base_folder", lambda *_: pytest.fail("fetched"))
    with pytest.raises(PostshareError, match="holds another run"):
        run(recipe(finished.folder, "someone/llama", text))


def test_residuals_of_a_plan_without_ties_are_refused_before_training(
    text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    SharingPlan(removed=((1, 0),)).save(file)
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={"strategy": "file", "path": str(file), "budget": ...},
        residual={"rank": 2},
    )
    with pytest.raises(PostshareError, match="the plan ties nothing; remove residual"):
        run(made)
    assert not (made.folder / "run.json").exists()
    assert not (made.folder / "continued").exists()


def test_a_plan_file_that_has_changed_is_read_again_until_a_run_has_begun_with_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={"strategy": "file", "path": str(file), "budget": ...},
        train={"steps": 0},
        evaluate={"blocks": 1},
    )
    plans = [SharingPlan((HeadTie((1, head), (0, 0), ("q",)),)) for head in range(3)]
    plans[0].save(file)
    plan(made)
    plans[1].save(file)
    run(made)
    assert SharingPlan.load(made.folder / "plan.json") == plans[1]
    plans[2].save(file)
    capsys.readouterr()
    run(made)
    assert SharingPlan.load(made.folder / "plan.json") == plans[1]
    assert "has changed since; the run keeps" in capsys.readouterr().out.replace("\n", " ")


def test_what_a_plan_file_shares_and_the_penalty_leaves_out_is_warned_about(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    SharingPlan((HeadTie((1, 0), (0, 1), ("q", "v")),)).save(file)
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={"strategy": "file", "path": str(file), "budget": ...},
        penalty={"projections": ["q", "k"]},
    )
    stages = "train.stages.pipeline.post_train"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stages, lambda current: (_ for _ in ()).throw(PostshareError("stop")))
        with pytest.raises(PostshareError, match="stop"):
            run(made)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == 2
    assert "v will be shared without having been pulled" in lines[0]
    assert "k will be pulled and not shared" in lines[1]


def test_stages_are_numbered(finished: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run(finished)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stage ")]
    names = ["plan", "continued, done before", "post, done before", "heal, done before"]
    names += ["export", "evaluate", "report"]
    assert lines == [f"stage {number} of 7: {name}" for number, name in enumerate(names, 1)]


def test_another_recipe_in_the_same_folder_is_refused(finished: Recipe, text: Path) -> None:
    other = recipe(
        finished.folder,
        "demo-base",
        text,
        materialize={"heal_steps": 2, "merge": "mean"},
        plan={"budget": {"ratio": 0.2}},
    )
    with pytest.raises(PostshareError, match="ratio"):
        run(other)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, text: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PostshareError, match="not empty"):
        run(recipe(tmp_path, "demo-base", text))
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_before_it_had_a_recipe_is_started_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a kill from outside: what it left made the folder that of something else."""

    of = recipe(tmp_path / "run", "demo-base", text, train={"steps": 0})
    with monkeypatch.context() as patched:
        patched.setattr("train.distributed.shared_folder._seen", kill)
        with pytest.raises(KilledError):
            begin(of)
    (left,) = of.folder.iterdir()
    assert left.name.startswith(".started-")
    begin(of)
    assert (of.folder / "recipe.yaml").is_file()


def test_a_start_that_was_killed_while_it_wrote_the_recipe_is_started_again(
    tmp_path: Path, text: Path
) -> None:
    of = recipe(tmp_path / "run", "demo-base", text, train={"steps": 0})
    of.folder.mkdir()
    left = beside(of.folder / "recipe.yaml")
    left.write_text("half")
    begin(of)
    assert (of.folder / "recipe.yaml").is_file()
    assert not left.exists()


def test_directshare_without_training(tmp_path: Path, text: Path) -> None:
    sections = {"plan": {"budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]}}
    how = dict.fromkeys(("batch_size", "micro_batch_size", "learning_rate"), ...)
    made = recipe(tmp_path / "run", "demo-base", text, train={"steps": 0} | how, **sections)
    run(made)
    stated = recipe(tmp_path / "run", "demo-base", text, train={"steps": 0}, **sections)
    run(stated)  # goes on in the same folder: how to train decides nothing
    summary = json.loads((made.folder / "summary.json").read_text())
    assert summary["perplexity"]["continued"] is None
    assert summary["perplexity"]["post"] is None
    assert summary["tokens"] == 0
    current = begin(made)
    exported = load_dense(made.folder / "export" / "dense", "sdpa")
    measured = perplexity(exported, current.blocks[1], 8, limit=4, progress=False).perplexity
    assert summary["perplexity"]["direct"] == pytest.approx(measured, rel=1e-6)
    assert summary["perplexity"]["base"] != pytest.approx(measured, rel=1e-3)
    assert (made.folder / "export" / "dense" / "model.safetensors").is_file()


def of_strategy(
    strategy: str, folder: Path, text: Path, base: str | Path = "demo-base", **model: Any
) -> Recipe:
    made = recipe(
        folder,
        base,
        text,
        model=model,
        train={"steps": 1},
        plan={"strategy": strategy, "budget": {"heads": 20}},
        evaluate={"blocks": 1, "continued": False},
    )
    run(made)
    return made


def test_the_released_strategy_ties_less_than_asked(tmp_path: Path, text: Path) -> None:
    made = of_strategy("released", tmp_path / "run", text)
    assert json.loads((made.folder / "summary.json").read_text())["heads"]["tied"] < 20


def test_the_random_strategy(tmp_path: Path, text: Path) -> None:
    """With a tokenizer from elsewhere: licence and generation config are still the base's."""
    base = shutil.copytree(demo_base_path(), tmp_path / "base")
    (base / "LICENSE").write_text("terms")
    (base / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": false}')
    made = of_strategy("random", tmp_path / "run", text, base, tokenizer="demo-base")
    assert check_run(made)["heads"]["tied"] == 20
    for form in ("compact", "dense"):
        export = made.folder / "export" / form
        assert (export / "LICENSE").read_text() == "terms"
        assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.7


def test_a_plan_for_another_shape_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path
) -> None:
    tie = {"target": [40, 0], "source": [0, 0], "projections": ["q"]}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": 1, "ties": [tie]}))
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        plan={"strategy": "file", "path": str(plan), "budget": ...},
    )
    with pytest.raises(PostshareError, match="layer 40 is out of range"):
        run(made)
    assert not (tmp_path / "run").exists()


def test_a_mistake_can_be_corrected_in_the_same_folder(tmp_path: Path, text: Path) -> None:
    """Nothing is written for a recipe that is refused; a plan that was only looked at is no run."""
    folder = tmp_path / "run"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    wrong = [
        {"plan": {"budget": {"ratio": 0.99}}},
        {"data": {"train": str(empty)}},
        {"wandb": {"mode": "online"}},
    ]
    for sections in wrong:
        with pytest.raises(PostshareError):
            run(recipe(folder, "demo-base", text, **sections))
        assert not folder.exists(), sections
    plan(recipe(folder, "demo-base", text, plan={"budget": {"ratio": 0.1}}))
    first = json.loads((folder / "plan.json").read_text())
    plan(recipe(folder, "demo-base", text, plan={"budget": {"ratio": 0.2}}))
    second = json.loads((folder / "plan.json").read_text())
    assert (len(first["ties"]), len(second["ties"])) == (6, 12)


def test_a_model_that_is_not_there_or_no_llama(tmp_path: Path, text: Path) -> None:
    with pytest.raises(PostshareError, match="no folder here"):
        run(recipe(tmp_path / "run", tmp_path / "nowhere", text))
    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PostshareError, match="'gpt2'"):
        run(recipe(tmp_path / "run", other, text))
    assert not (tmp_path / "run").exists()


def test_pretraining_from_random_weights(tmp_path: Path, text: Path) -> None:
    made = recipe(
        tmp_path / "run",
        "demo-base",
        text,
        model={
            "tokenizer": "demo-base",
            "config": {
                "vocab_size": 2048,
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "tie_word_embeddings": True,
            },
        },
        plan={"strategy": "none", "budget": ...},
    )
    run(made)
    dense = LlamaForCausalLM.from_pretrained(made.folder / "export" / "dense")
    assert dense.config.hidden_size == 32
    assert not (made.folder / "export" / "compact").exists()
    losses = [row["lm_loss"] for row in read_rows(made.folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2048), rel=0.02)
    assert losses[-1] < losses[0]


def test_gqa_with_tied_embeddings_and_real_weights(shared: Path, tmp_path: Path) -> None:
    made = recipe(
        tmp_path / "run",
        shared / "models" / "stories260K",
        shared / "text" / "mixed-validation.jsonl",
        plan={"budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]},
    )
    run(made)
    summary = json.loads((made.folder / "summary.json").read_text())
    # 5 layers x 4 KV groups of 2 heads of 8: 6 units of (16 + 8 + 8 + 16) x 64 parameters.
    assert summary["heads"] == {
        "requested_ratio": 0.3,
        "effective_ratio": 0.3,
        "total": 40,
        "tied": 12,
        "removed": 0,
    }
    assert summary["parameters"]["base"] - summary["parameters"]["stored"] == 6 * 48 * 64
    check_run(made)


@pytest.mark.more  # the test above has real weights, and this one many of them
def test_real_text_and_a_real_base(shared: Path, tmp_path: Path) -> None:
    """mixed7M has 60.4 (its README); DirectShare is recomputed here by slices and indices."""
    base = shared / "models" / "mixed7M"
    validation = str(shared / "text" / "mixed-validation.jsonl")
    made = recipe(
        tmp_path / "run",
        base,
        validation,
        data={"sequence_length": 256},
        train={"steps": 0},
        plan={"budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]},
        evaluate={"blocks": 96},
    )
    run(made)
    summary = json.loads((made.folder / "summary.json").read_text())
    assert summary["perplexity"]["base"] == pytest.approx(60.39, abs=0.01)
    assert summary["heads"]["tied"] == 19
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    for tie in json.loads((made.folder / "plan.json").read_text())["ties"]:
        (layer, head), (at, source) = tie["target"], tie["source"]
        mine, theirs = slice(32 * head, 32 * head + 32), slice(32 * source, 32 * source + 32)
        for p in "qkvo":
            name = "model.layers.{}.self_attn." + p + "_proj.weight"
            target, origin = model.get_parameter(name.format(layer)).data, original[name.format(at)]
            if p == "o":
                target[:, mine] = origin[:, theirs]
            else:
                target[mine] = origin[theirs]
    blocks = Run(made, start(made)).blocks[1]
    ids = torch.stack([blocks[i]["input_ids"] for i in range(96)])
    with torch.no_grad():
        loss = sum(model(part, labels=part).loss.item() for part in ids.split(8)) / 12
    assert summary["perplexity"]["direct"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert summary["perplexity"]["direct"] > 1.1 * summary["perplexity"]["base"]


def test_the_resume_of_a_run_folder_ignores_what_changes_nothing(finished: Recipe) -> None:
    changed = finished.model_copy(update={"name": "renamed"})
    assert run_identity(changed) == run_identity(finished)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"strategy": "cosine"}, "half the budget: plan.budget.ratio=0.125 "),
        # Half of the units of whole layers may be no whole layers.
        ({"strategy": "magnitude", "action": "drop"}, "load it: see "),
    ],
    ids=["ties", "layers"],
)
def test_the_next_step_is_one_that_can_be_taken(
    tmp_path: Path, text: Path, section: dict[str, Any], said: str
) -> None:
    steps = {"train": {"steps": 0, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}}
    more = steps | {"plan": section | {"budget": {"ratio": 0.25}}}
    made = recipe(tmp_path / "run", demo_base_path(), text, **more)
    made.folder.mkdir()
    SharingPlan(removed=((1, 0),)).save(made.folder / "plan.json")
    assert said in next_step(Run(made, start(made)))
