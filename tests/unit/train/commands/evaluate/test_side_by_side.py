"""`postshare evaluate A B C`: which models, which numbers, and what is computed again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from tests.support import small_models
from train.cli import main
from train.commands.evaluate import side_by_side
from train.evaluation.models import Judged, find_models
from train.evaluation.speed import SpeedSettings, resident_bytes
from train.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.run(tmp_path_factory.mktemp("small"))


def evaluate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def compare(output: Path, *arguments: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What the JSON says: {model: {task and metric: score}}."""
    cache = str(output.parent / "cache")
    assert evaluate(*arguments, "--output", str(output), "--cache", cache) == 0
    value = json.loads(output.read_text())
    return {
        m["name"]: {f"{s['task']} {s['metric']}": s for s in m["scores"]} for m in value["models"]
    }


def nats_by_hand(model: LlamaForCausalLM, text: str, context: int) -> tuple[float, int]:
    """Disjoint windows of one text, cut by hand."""
    ids = load_tokenizer("demo-base")(text, add_special_tokens=False)["input_ids"]
    prefixed, total = [1, *ids], 0.0
    for start in range(0, len(ids), context):
        predicted = ids[start : start + context]
        stop = start + len(predicted)
        begin = max(0, stop - context)
        logits = model(torch.tensor([prefixed[begin:stop]]), use_cache=False).logits[0].double()
        chosen = logits.log_softmax(-1)[start - begin :]
        total -= chosen[range(len(predicted)), predicted].sum().item()
    return total, len(ids)


# --- which models ---------------------------------------------------------------------------------


def test_a_run_is_its_four_models(run: Path) -> None:
    models = {model.name: model for model in find_models([str(run)])}
    assert list(models) == ["base", "continued", "direct", "post"]
    base = models["base"].load(torch.float32, CPU)
    direct = models["direct"].load(torch.float32, CPU)
    expected = LlamaForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base(ids).logits, expected(ids).logits)
    materialize_(
        dict(expected.named_parameters()),
        HeadLayout.from_config(expected.config),
        small_models.PLAN,
    )
    assert float((direct(ids).logits - expected(ids).logits).abs().max().detach()) <= 1e-5
    dense = LlamaForCausalLM.from_pretrained(run / "export" / "dense", dtype=torch.float32)
    post = models["post"].load(torch.float32, CPU)
    assert float((post(ids).logits - dense(ids).logits).abs().max().detach()) <= 1e-5


def test_sizes_are_what_is_stored(run: Path) -> None:
    """One KV group of two query heads of 8: 16 + 8 + 8 rows of 32 are stored once."""
    models = find_models([str(run), str(run / "export" / "dense")])
    sizes = {model.name: model.size() for model in models}
    dense = sum(p.numel() for p in models[0].load(torch.float32, CPU).parameters())
    saved = 32 * 32
    prefix = f"{run}:"
    assert sizes[prefix + "base"] == (dense, 2 * dense)
    assert sizes[prefix + "continued"] == (dense, 2 * dense)  # as it would be exported
    assert (
        sizes[prefix + "direct"] == sizes[prefix + "post"] == (dense - saved, 2 * (dense - saved))
    )
    assert sizes[str(run / "export" / "dense")] == (dense, 2 * dense)


def test_continued_is_rounded_as_its_export_would_be(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = copy / "continued" / "weights"
    model = LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight += 1e-4  # less than bf16 can hold beside 1
    model.save_pretrained(weights)
    continued = find_models([str(copy)])[1]
    assert continued.through == "bfloat16"
    assert torch.equal(continued.load(torch.float32, CPU).model.norm.weight, torch.ones(32))


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        with pytest.raises(PostshareError) as caught:
            find_models([str(argument) for argument in arguments])
        return str(caught.value)

    assert "is neither a run folder" in refused(tmp_path)
    assert f"did you mean {run / 'export' / 'compact'}?" in refused(run / "export")
    assert "no hub name" in refused("./nothing")
    assert "are one model" in refused(run / "export" / "compact", run)
    other = small_models.dense(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "is a 'gpt2' model; evaluate compares Llamas" in refused(other)
    bare = small_models.dense(tmp_path / "bare", tokenizer=False)
    assert "has no tokenizer" in refused(bare)
    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "export")
    said = refused(half)
    assert "has not finished" in said
    assert f"name what there is: {run.parent / 'base'} {half / 'continued' / 'weights'}" in said


# --- which numbers --------------------------------------------------------------------------------


def test_perplexities_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the text that it held out; direct and post are one table with base."""
    found = compare(tmp_path / "out.json", str(run), "--context", "64", "--batch-size", "3")
    text = (run.parent / "text.txt").read_text()
    assert list(found) == ["base", "continued", "direct", "post"]
    losses = {}
    for model in find_models([str(run)]):
        loaded = model.load(torch.float32, CPU)
        nats, tokens = nats_by_hand(loaded, text, 64)  # type: ignore[arg-type]
        losses[model.name] = nats / tokens
        scores = found[model.name]
        assert scores["perplexity token-level"]["value"] == pytest.approx(
            math.exp(nats / tokens), rel=1e-5
        )
        words = 12 * 18
        assert scores["perplexity word-level"]["value"] == pytest.approx(
            math.exp(nats / words), rel=1e-5
        )
        assert scores["perplexity token-level"]["stated"]["words"] == words
        assert scores["perplexity token-level"]["count"] == math.ceil(tokens / 64)
    change = found["post"]["perplexity token-level"]["change"]
    assert change["value"] == pytest.approx(math.expm1(losses["post"] - losses["base"]), rel=1e-4)
    assert change["paired"]
    assert change["interval"][0] < change["value"] < change["interval"][1]
    out = capsys.readouterr().out
    assert "windows of 64, stride 64" in out
    assert "in float32 on" in out


def test_a_second_call_computes_what_is_new(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = Judged.load

    def noted(self: Judged, *arguments: Any) -> Any:
        loads.append(self.name)
        return load(self, *arguments)

    monkeypatch.setattr(Judged, "load", noted)
    text = tmp_path / "text.txt"
    text.write_text(small_models.TEXT * 12)
    base, compact = str(run.parent / "base"), str(run / "export" / "compact")
    output = tmp_path / "out.json"
    first = compare(output, base, "--text", str(text))
    assert loads == [base]
    loads.clear()
    second = compare(output, base, compact, "--text", str(text))
    assert loads == [compact]
    assert second[base] == first[base]
    loads.clear()
    moved = tmp_path / "moved"
    shutil.copytree(compact, moved)  # the same content elsewhere
    assert compare(output, str(moved), "--text", str(text))
    assert loads == []
    third = compare(output, base, "--text", str(text), "--stride", "16", "--context", "64")
    assert loads == [base]
    assert (
        third[base]["perplexity token-level"]["value"]
        != first[base]["perplexity token-level"]["value"]
    )
    loads.clear()
    text.write_text(small_models.TEXT * 12 + "Other words.")
    compare(output, base, "--text", str(text))
    assert loads == [base]


def test_other_weights_of_the_same_name_are_other_results(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(small_models.TEXT)
    folder, output = tmp_path / "model", tmp_path / "out.json"
    values = []
    for seed in (0, 1):
        small_models.dense(folder, seed=seed)
        found = compare(output, str(folder), "--text", str(text))
        values.append(found[str(folder)]["perplexity token-level"]["value"])
    assert values[0] != values[1]


def test_speed_is_measured_of_both(run: Path, tmp_path: Path) -> None:
    base, compact = str(run.parent / "base"), str(run / "export" / "compact")
    output = tmp_path / "out.json"
    found = compare(output, base, compact, "--tasks", "speed", "--dtype", "float32")
    for scores in found.values():
        assert scores["speed prefill tokens/s"]["value"] > 0
        assert scores["speed decode tokens/s"]["count"] == 7
        # 2 layers x keys and values x 2 KV heads x 8 x 4 bytes
        assert scores["speed cache bytes/token"]["value"] == 2 * 2 * 2 * 8 * 4
        first = scores["speed first token, ms"]
        assert first["stated"]["prompt"] == 96
        assert scores["speed prefill tokens/s"]["value"] == pytest.approx(
            96_000 / first["value"], rel=1e-6
        )
    assert found[compact]["speed decode tokens/s"]["change"]["paired"]


def test_resident_memory_is_that_of_the_model(tmp_path: Path) -> None:
    folder = small_models.dense(
        tmp_path / "model", hidden_size=512, intermediate_size=4096, num_hidden_layers=4
    )
    model = Judged("model", folder, folder)
    held = 4 * model.size()[0]
    settings = SpeedSettings(rounds=1, prompt=8, new_tokens=2)
    assert held > 100_000_000
    # Files are mapped while they are read: half as much again in bf16.
    assert 0.9 * held < resident_bytes(model, settings, torch.float32, CPU) < 1.8 * held


# --- what the arguments mean ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--tasks", "speed"], "--tasks is for comparing models, and demo is a recipe"),
        (["demo", "runs/x"], "runs/x is no override"),
        (["./nothing", "train.steps=3"], "train.steps=3 is an override, which goes with a recipe"),
        (["dmeo"], "did you mean demo?"),
        (["./nothing.yaml"], "no such recipe file"),
        (["BASE", "--tasks", "speed", "--text", "x.txt"], "--text has no effect on speed"),
        (["BASE", "--tasks", "perplexity,perplexity"], "name each task once"),
        (["BASE", "--limit", "3"], "--limit has no effect on perplexity"),
        (["BASE"], "perplexity needs a text, and no run is given"),
        (["demo-base"], "perplexity needs a text, and no run is given"),
        (["BASE", "--text", "nothing.txt"], "nothing.txt: no such file"),
        (["BASE", "--text", "TEXT", "--context", "129"], "has 128 positions"),
        (["BASE", "--text", "TEXT", "--context", "64", "--stride", "65"], "stride 65"),
        (["BASE", "--text", "TEXT", "--dtype", "int8"], "--dtype int8: unknown"),
        (["BASE", "--text", "TEXT", "--device", "nowhere"], "--device nowhere"),
        (["BASE", "--tasks", "rte", "--data", "nothing"], "--data nothing: no such folder"),
        (["BASE", "--tasks", "perplexty"], "no task 'perplexty'; did you mean perplexity?"),
        (["BASE", "--tasks", "speed,"], "no task ''; name one, such as perplexity"),
        (["BASE", "--text", "TEXT", "--output", "BASE"], "is a folder; give a file"),
        (["BASE", "--text", "TEXT", "--cache", "TEXT"], "text.txt is a file, no folder"),
        (["BASE", "--text", "BASE"], "base: is a folder; give a file"),
        (["BASE", "--text", "BLANK"], "blank.jsonl: holds no text"),
    ],
)
def test_bad_arguments_are_one_line(
    run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = run.parent / "blank.jsonl"
    blank.write_text('{"text": null}\n{"text": " "}\n')
    known = {"BASE": str(run.parent / "base"), "TEXT": str(run.parent / "text.txt")}
    known["BLANK"] = str(blank)
    assert evaluate(*[known.get(a, a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_residuals_are_never_left_out(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "export" / "adapter").mkdir()
    post = {model.name: model.folder for model in find_models([str(copy)])}["post"]
    assert post == copy / "export" / "dense"  # it has them merged, the compact folder has not
    shutil.rmtree(post)
    with pytest.raises(PostshareError, match=r"residuals .* export.formats=\[compact, dense\]"):
        find_models([str(copy)])


def test_a_name_that_is_both_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert evaluate("demo") == 2
    assert "demo is a folder here and a shipped recipe; write ./demo" in capsys.readouterr().err


def test_without_lm_eval_its_tasks_say_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "train.commands.evaluate.lm_eval_tasks.importlib.util.find_spec", lambda name: None
    )
    assert evaluate(str(run), "--tasks", "rte") == 2
    assert "run `pip install 'postshare[eval]'`" in capsys.readouterr().err


def test_a_damaged_result_is_computed_again(run: Path, tmp_path: Path) -> None:
    base, output = str(run.parent / "base"), tmp_path / "out.json"
    text = str(run.parent / "text.txt")
    first = compare(output, base, "--text", text)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text()[:-30])
    assert compare(output, base, "--text", text) == first


def test_results_are_told_where_the_default_cache_cannot_be_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text, base = str(run.parent / "text.txt"), str(run.parent / "base")
    assert evaluate(base, "--text", text, "--context", "64") == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert "file is a file, no folder" in captured.err
    assert "pass --cache FOLDER; results are not kept" in captured.err


def test_options_that_name_no_task_are_refused() -> None:
    with pytest.raises(PostshareError, match="--tasks"):
        side_by_side.check_options(side_by_side.EvaluateOptions(tasks=()))
