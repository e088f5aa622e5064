"""The whole pipeline with spans, KV heads, and both together with ties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sa_models.attention import SharedAttention
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from tests.support import tiny
from tests.support.interruption import KilledError, at_step, stop
from tests.support.reference import Reference
from tests.support.spans_base import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    LENGTH,
    base_model,
    ids,
    read,
    recipe,
    reference_loss,
)
from train.data.blocks import permutation
from train.distributed.engines.start import start
from train.recipe.recipe import Recipe
from train.stages.pipeline import evaluate, export, plan, run
from train.stages.run import Run
from train.tracking.metrics_log import read_rows
from train.training.loop import TrainingStopped

pytestmark = pytest.mark.usefixtures("sketched")

SA = [{"leader": 2, "followers": [3, 4], "share": "attention"}]
CLA = [
    {"leader": 0, "followers": [1], "share": "kv"},
    {"leader": 3, "followers": [4, 5], "share": "kv"},
]
BOTH = [{"leader": 1, "followers": [2], "head_map": [[1, 0, 3, 3]]}, CLA[1]]
TIES = {"budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]}
KINDS: dict[str, dict[str, Any]] = {
    "sa": {"spans": SA},
    "cla, mean": {"spans": CLA},
    "cla, copy": {"spans": {"spans": CLA, "leaders": "copy"}},
    "pooled": {"heads": {"kv_heads": 2}},
    "mqa": {"heads": {"kv_heads": 1}},
    "all": {"spans": BOTH, "heads": {"kv_heads": 2}, "plan": TIES},
}


def less(*more: str) -> list[Any]:
    """All kinds, of which some are left to `make test-more`."""
    return [pytest.param(kind, marks=[pytest.mark.more] * (kind in more)) for kind in KINDS]


def exported(made: Recipe) -> Any:
    """The shipped model, through the Auto class; every weight is there."""
    kind = "dense" if made.spans is None else "compact"
    model, info = AutoModelForCausalLM.from_pretrained(
        made.folder / "export" / kind, dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def check_summary(home: Path, made: Recipe) -> dict[str, Any]:
    """What the summary says, against the files and against counts by hand."""
    summary, found = read(made.folder, "summary.json"), SharingPlan.load(made.folder / "plan.json")
    kv_heads = made.heads.kv_heads or HEADS
    assert summary["structure"]["kv_heads"] == made.heads.kv_heads
    assert [s["followers"] for s in summary["structure"]["spans"]] == [
        list(s.followers) for s in found.spans
    ]
    width = kv_heads * HEAD_DIM
    gone = sum(
        len(s.followers) * (width if s.share == "attention" else 2 * width) for s in found.spans
    )
    assert summary["cache"] == {
        "base_elements_per_token": LAYERS * 2 * HEADS * HEAD_DIM,
        "stored_elements_per_token": LAYERS * 2 * width - gone,
    }
    model = exported(made)
    assert summary["parameters"]["stored"] == sum(p.numel() for p in model.parameters())
    assert summary["parameters"]["base"] == sum(p.numel() for p in base_model(home).parameters())
    kinds = {"dense"} if made.spans is None else {"compact"}
    assert {p.name for p in (made.folder / "export").iterdir()} == kinds
    for kind in ("compact", "dense"):
        size = summary["bytes"][kind]
        file = made.folder / "export" / kind / "model.safetensors"
        assert size == (file.stat().st_size if kind in kinds else None)
        if kind in kinds:
            manifest = read(made.folder / "export" / kind, "manifest.json")
            assert manifest["notes"]["numbers"] == summary
    # What the model caches for 7 tokens and one more, in fp32.
    cache = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert sum(t.numel() for t in held) == 7 * summary["cache"]["stored_elements_per_token"]
    return summary


# --- direct application ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", less("mqa"))
def test_without_training_the_export_is_what_the_papers_define(
    home: Path, tmp_path: Path, kind: str
) -> None:
    made = recipe(home, tmp_path / "run", train={"steps": 0}, **KINDS[kind])
    run(made)
    found = SharingPlan.load(made.folder / "plan.json")
    assert bool(found.ties) == (kind == "all")
    mode = "mean" if made.spans is None else made.spans.leaders
    base, tokens = base_model(home), ids(made, 4, validation=True)
    summary = check_summary(home, made)
    assert summary["perplexity"]["post"] is None
    losses = {k: v["loss"] for k, v in read(made.folder, "evaluation.json")["models"].items()}
    assert losses["direct"] == pytest.approx(reference_loss(base, found, tokens, mode), abs=1e-5)
    dense = reference_loss(base, SharingPlan(), tokens)
    assert losses["base"] == pytest.approx(dense, abs=1e-5)
    assert abs(losses["direct"] - dense) > 1e-3
    with torch.no_grad():
        expected = Reference.of(base, found, mode)
        model = exported(made)
        assert largest_difference(model(tokens).logits, expected(tokens).logits) < 2e-5
        written = model.generate(tokens[:1, :5], max_new_tokens=8, do_sample=False)
        assert written[0].tolist() == expected.greedy(tokens[0, :5].tolist(), 8)


def test_a_second_start_of_a_direct_run_does_nothing(home: Path, tmp_path: Path) -> None:
    made = recipe(home, tmp_path / "run", train={"steps": 0}, spans=SA)
    run(made)
    files = [f for f in made.folder.rglob("*") if f.suffix in (".safetensors", ".png", ".jsonl")]
    before = {f: f.stat().st_mtime_ns for f in files}
    plans = (made.folder / "plan.json").read_text()
    run(made)
    assert {f: f.stat().st_mtime_ns for f in files} == before
    assert (made.folder / "plan.json").read_text() == plans


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", less("mqa", "cla, copy"))
def test_what_is_exported_is_what_was_trained(home: Path, tmp_path: Path, kind: str) -> None:
    sections = dict(KINDS[kind]) | ({"materialize": {"heal_steps": 2}} if kind == "all" else {})
    made = recipe(home, tmp_path / "run", train={"steps": 3}, **sections)
    run(made)
    weights = made.folder / ("heal/weights" if kind == "all" else "weights")
    trained = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    tokens = ids(made, 4, validation=True)
    model = exported(made)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(tokens).logits
        assert largest_difference(logits, trained(tokens).logits) < 1e-5
        untrained = Reference.of(base_model(home), SharingPlan.load(made.folder / "plan.json"))
        assert largest_difference(logits, untrained(tokens).logits) > 1e-2
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
    post = read(made.folder, "evaluation.json")["models"]["post"]["loss"]
    assert post == pytest.approx(float(loss), abs=1e-5)
    prompt = {"input_ids": tokens[:2, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    summary = check_summary(home, made)
    assert summary["tokens"] == (5 if kind == "all" else 3) * 4 * (LENGTH - 1)
    if kind in ("pooled", "mqa"):
        assert type(model) is LlamaForCausalLM
        assert model.config.num_key_value_heads == made.heads.kv_heads
        assert not (made.folder / "export" / "dense" / "modeling.py").exists()
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    assert len(tokenizer("sharing heads")["input_ids"]) > 1


def test_the_first_step_trains_the_model_that_the_plan_defines(home: Path, tmp_path: Path) -> None:
    """Loss and gradient norm of step 1, against autograd through the reference."""
    for kind in ("sa", "cla, mean", "pooled"):
        made = recipe(home, tmp_path / kind, train={"steps": 1, "clip_norm": None}, **KINDS[kind])
        run(made)
        (row,) = read_rows(made.folder / "metrics.jsonl")
        blocks = len(Run(made, start(made)).blocks[0])
        tokens = ids(made, blocks)[permutation(blocks, made.seed, 0)[:4]]
        found = SharingPlan.load(made.folder / "plan.json")
        base = base_model(home)
        if kind != "sa":
            assert row["lm_loss"] == pytest.approx(reference_loss(base, found, tokens), abs=1e-5)
            continue  # means are taken before training: the norm is that of the means
        reference = Reference.of(base, found, requires_grad=True)
        logits = reference(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients = [w.grad for w in reference.weights.values() if w.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert row["lm_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        missing = {n for n, w in reference.weights.items() if w.grad is None}
        trained = load_file(made.folder / "weights" / "model.safetensors")
        assert missing == set(reference.weights) - set(trained)
        assert len(missing) == 4  # q and k of two followers


def test_the_control_has_no_spans(home: Path, tmp_path: Path) -> None:
    made = recipe(
        home, tmp_path / "run", spans=SA, train={"steps": 2}, evaluate={"continued": True}
    )
    run(made)
    plain = recipe(home, tmp_path / "plain", plan={"strategy": "none"}, train={"steps": 2})
    run(plain)
    assert tiny.curve(made.folder / "continued") == tiny.curve(plain.folder)
    summary = read(made.folder, "summary.json")
    assert None not in summary["perplexity"].values()


@pytest.mark.more
def test_gradient_checkpointing_changes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = SharedAttention.forward

    def counted(self: SharedAttention, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += self.training
        return forward(self, *arguments, **options)

    monkeypatch.setattr(SharedAttention, "forward", counted)
    for kind in ("sa", "cla, mean", "all"):
        counts = {}
        for on in (False, True):
            calls = 0
            made = recipe(
                home,
                tmp_path / kind / str(on),
                train={"steps": 3, "gradient_checkpointing": on},
                **KINDS[kind],
            )
            run(made)
            counts[on] = calls
        assert counts[True] == 2 * counts[False] == 2 * 3 * 2 * LAYERS
        tiny.assert_same_run(tmp_path / kind / "False", tmp_path / kind / "True")


# --- stopping and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("sa", marks=pytest.mark.more), "all"])
def test_resume_is_exact(home: Path, tmp_path: Path, kind: str) -> None:
    def made_in(folder: str) -> Recipe:
        train = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3}
        return recipe(home, tmp_path / folder, train=train, **KINDS[kind])

    run(made_in("whole"))
    made = made_in("stopped")
    with at_step(3, stop), pytest.raises(TrainingStopped, match="step 3 of 6"):
        run(made)
    found = (made.folder / "plan.json").read_bytes()
    # After the checkpoint of step 4: step 5 is done again.
    with at_step(6), pytest.raises(KilledError):
        run(made)
    assert not (made.folder / "weights").exists()
    run(made)
    assert (made.folder / "plan.json").read_bytes() == found
    tiny.assert_same_run(made.folder, tmp_path / "whole")
    summaries = [read(tmp_path / name, "summary.json") for name in ("stopped", "whole")]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


def test_resume_of_healing_is_exact(home: Path, tmp_path: Path) -> None:
    """Healing trains the compact model, whose o lies transposed in memory when it is loaded."""

    def made_in(folder: str) -> Recipe:
        heal = {"heal_steps": 4, "heal_learning_rate": 5e-3}
        return recipe(home, tmp_path / folder, train={"steps": 1}, materialize=heal, **KINDS["all"])

    run(made_in("whole"))
    made = made_in("stopped")
    with at_step(2, stop), pytest.raises(TrainingStopped, match="step 2 of 4"):
        run(made)
    run(made)
    tiny.assert_same_run(made.folder / "heal", tmp_path / "whole" / "heal")


def test_a_checkpoint_of_another_plan_is_refused(home: Path, tmp_path: Path) -> None:
    made = recipe(home, tmp_path / "run", spans=SA, train={"steps": 4, "checkpoint_every": 1})
    with at_step(3, stop), pytest.raises(TrainingStopped):
        run(made)
    before = {f: f.stat().st_mtime_ns for f in made.folder.rglob("*") if f.is_file()}
    others: list[dict[str, Any]] = [
        {"spans": [SA[0] | {"followers": [3]}]},
        {"spans": [SA[0] | {"share": "kv"}]},
        {"spans": {"strategy": "late", "layers": 2}},
        {"spans": SA, "heads": {"kv_heads": 2}},
        {"spans": SA, "plan": TIES},
        {"heads": {"kv_heads": 2}},
    ]
    for sections in others:
        other = recipe(home, made.folder, train={"steps": 4, "checkpoint_every": 1}, **sections)
        for stage in (run, plan, export, evaluate):
            with pytest.raises(PostshareError, match=r"another run \((spans|heads|plan)") as caught:
                stage(other)
            assert "\n" not in str(caught.value)
            assert "choose another output_dir" in str(caught.value)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    # The recipe is the same, and somebody has changed the plan beside the checkpoints.
    SharingPlan(spans=(AttentionSpan(0, (1, 2)),)).save(made.folder / "plan.json")
    with pytest.raises(PostshareError, match=r"another run \(plan was '"):
        run(made)
    assert not (made.folder / "weights").exists()


def test_leaders_decide_the_run_too(home: Path, tmp_path: Path) -> None:
    made = recipe(home, tmp_path / "run", spans=CLA, train={"steps": 1})
    run(made)
    other = recipe(home, made.folder, spans={"spans": CLA, "leaders": "copy"}, train={"steps": 1})
    with pytest.raises(PostshareError, match="leaders was 'mean', now 'copy'"):
        run(other)


# --- formats --------------------------------------------------------------------------------------


def test_formats(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both formats are the default: with spans the run says that it writes one."""
    made = recipe(home, tmp_path / "both", spans=SA, train={"steps": 0})
    run(made)
    lines = capsys.readouterr().out.replace("\n", "")
    assert "spans have no dense form" in lines
    assert "export/compact/README.md" in lines
    made = recipe(
        home, tmp_path / "compact", spans=SA, train={"steps": 0}, export={"formats": ["compact"]}
    )
    run(made)
    assert "no dense form" not in capsys.readouterr().out.replace("\n", "")
    made = recipe(home, tmp_path / "pooled", heads={"kv_heads": 2}, train={"steps": 0})
    run(made)
    lines = capsys.readouterr().out.replace("\n", "")
    assert "export/dense/README.md" in lines
    assert "export/compact" not in lines
    assert (made.folder / "export" / "dense" / "README.md").is_file()
    assert json.loads((made.folder / "plan.json").read_text())["kv_heads"] == 2


# --- instructions ---------------------------------------------------------------------------------


def test_instructions_with_spans_that_are_found(home: Path, tmp_path: Path) -> None:
    """Records are documents of their own and prompts are masked, in measuring and judging too."""
    records = [
        {"instruction": "Say what sharing is.", "output": "Plans and " + "units " * (i % 9 + 1)}
        for i in range(40)
    ]
    file = tmp_path / "alpaca.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = recipe(
        home,
        tmp_path / "run",
        data={
            "train": str(file),
            "validation": str(file),
            "sequence_length": 128,
            "format": "alpaca",
        },
        spans={"strategy": "loss", "layers": 2, "max_followers": 2, "calibration_blocks": 2},
        train={"steps": 2},
    )
    run(made)
    base, found = base_model(home), SharingPlan.load(made.folder / "plan.json")

    def loss(plan: SharingPlan, validation: bool, count: int) -> float:
        blocks = Run(made, start(made)).blocks[validation]
        some = [blocks[i * len(blocks) // count] for i in range(count)]  # at equal distances
        tokens, labels, positions = (
            torch.stack([block[name] for block in some])
            for name in ("input_ids", "labels", "position_ids")
        )
        assert (positions == 0).sum() > count  # several records in a block
        assert 0 < (labels != -100).sum() < labels.numel() / 2
        documents = (positions == 0).cumsum(1)
        with torch.no_grad():
            out = Reference.of(base, plan)(tokens, positions=positions, documents=documents)
        logits = out.logits[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))

    measured = read(made.folder, "spans.json")
    assert measured["base_loss"] == pytest.approx(loss(SharingPlan(), False, 2), abs=1e-5)
    assert measured["choices"][0]["loss"] == pytest.approx(loss(found, False, 2), abs=1e-5)
    count = read(made.folder, "evaluation.json")["blocks"]
    direct = read(made.folder, "evaluation.json")["models"]["direct"]["loss"]
    assert direct == pytest.approx(loss(found, True, count), abs=1e-5)
    assert read(made.folder, "summary.json")["perplexity"]["post"] < math.exp(direct)
