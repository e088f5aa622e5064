from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM

import train.training.loop as loop
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from tests.support import tiny
from tests.support.interruption import KilledError, at_step, stop
from train.common.signals import resume_command
from train.data.blocks import permutation
from train.recipe.recipe import Recipe
from train.tracking.metrics_log import read_rows
from train.training.checkpoint import steps_in
from train.training.job import TrainJob
from train.training.loop import TrainingStopped, train

# --- what a step computes -------------------------------------------------------------------------


def test_a_step_is_the_documented_update(tmp_path: Path) -> None:
    """Two steps against a plain re-implementation: autograd on the whole loss, torch's AdamW."""
    recipe = tiny.recipe(
        tmp_path, steps=2, warmup_steps=0, schedule="constant", clip_norm=0.5, batch_size=4
    )
    job = tiny.job(recipe)
    train(job, recipe)

    model, blocks = tiny.model(), job.train_blocks
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if "norm" in name or "embed" in name else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    order = permutation(len(blocks), recipe.seed, 0)
    expected = []
    for step in range(2):
        ids = torch.stack([blocks[i]["input_ids"] for i in order[4 * step : 4 * step + 4]])
        logits = model(ids).logits
        lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        distances = []
        for tie in tiny.PLAN.ties:
            for p in "qkv":
                rows = [
                    model.get_parameter(f"model.layers.{layer}.self_attn.{p}_proj.weight")[
                        8 * unit : 8 * unit + 8
                    ]
                    for layer, unit in (tie.target, tie.source)
                ]
                distances.append(torch.linalg.norm(rows[0] - rows[1]))
        penalty = sum(distances) / 2
        (0.5 * lm + 0.5 * penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((lm.item(), penalty.item(), norm.item()))

    rows = tiny.curve(tmp_path)
    for row, (lm, penalty, norm) in zip(rows, expected, strict=True):
        assert row["lm_loss"] == pytest.approx(lm, rel=1e-5)
        assert row["penalty"] == pytest.approx(penalty, rel=1e-5)
        assert row["total_loss"] == pytest.approx(0.5 * lm + 0.5 * penalty, rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            tiny.weights(tmp_path)[name], parameter.detach(), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("document_mask", [False, True])
def test_factorization_invariance(tmp_path: Path, document_mask: bool) -> None:
    """8 x 1 = 4 x 2 = 1 x 8, also where micro-batches predict unequal numbers of tokens."""
    results = {}
    for micro in (8, 4, 1):
        recipe = tiny.recipe(tmp_path / str(micro), steps=4, micro_batch_size=micro)
        # A small epsilon would magnify rounding where a gradient is almost 0.
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"eps": 1e-3})})
        job = tiny.job(recipe, train_blocks=tiny.blocks(document_mask=document_mask))
        train(job, recipe)
        results[micro] = tiny.curve(recipe.folder), tiny.weights(recipe.folder)
    rows, values = results[8]
    predicted = [row["tokens"] for row in rows]
    assert (predicted[0] < 8 * 15) == document_mask
    for micro in (4, 1):
        other_rows, other_values = results[micro]
        assert [row["tokens"] for row in other_rows] == predicted
        for key in ("lm_loss", "penalty", "gradient_norm"):
            assert [r[key] for r in other_rows] == pytest.approx([r[key] for r in rows], rel=1e-5)
        for name in values:
            torch.testing.assert_close(other_values[name], values[name], rtol=1e-5, atol=1e-6)


def test_unequal_label_counts_are_averaged_over_tokens(tmp_path: Path) -> None:
    """The loss of a window is the mean over its tokens, not the mean of micro-batch means."""
    recipe = tiny.recipe(tmp_path, steps=1, micro_batch_size=1)
    blocks = tiny.blocks(8, document_mask=True)
    train(tiny.job(recipe, plan=None, train_blocks=blocks), recipe)
    model = tiny.model()
    sums, counts = [], []
    for index in range(8):
        block = {name: tensor[None] for name, tensor in blocks[index].items()}
        labels = block.pop("labels")[:, 1:]
        logits = model(**block, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        sums.append(loss.item())
        counts.append(int((labels != -100).sum()))
    assert len(set(counts)) > 1
    (row,) = tiny.curve(tmp_path)
    assert row["tokens"] == sum(counts)
    assert row["lm_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for on in (False, True):
        recipe = tiny.recipe(tmp_path / str(on), steps=3, gradient_checkpointing=on)
        train(tiny.job(recipe), recipe)
    tiny.assert_same_run(tmp_path / "False", tmp_path / "True")


def test_without_a_plan_the_loss_weight_is_one(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=1, penalty={"loss_weights": [0.25, 0.75]})
    train(tiny.job(recipe, plan=None), recipe)
    (row,) = tiny.curve(tmp_path)
    assert row["total_loss"] == row["lm_loss"]
    assert row["penalty"] is None


def test_the_penalty_pulls_and_its_ramp_counts_steps(tmp_path: Path) -> None:
    penalty = {"loss_weights": [0.0, 2.0], "schedule": "linear", "ramp_steps": 4}
    recipe = tiny.recipe(tmp_path, penalty, steps=5, warmup_steps=0, weight_decay=0.0)
    train(tiny.job(recipe), recipe)
    rows = tiny.curve(tmp_path)
    for row, factor in zip(rows, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert row["total_loss"] == pytest.approx(2 * factor * row["penalty"])
    # At step 1 the coefficient is 0: nothing moves, so step 2 measures the same.
    assert rows[1]["penalty"] == rows[0]["penalty"]
    assert rows[4]["penalty"] < 0.95 * rows[1]["penalty"]
    assert rows[4]["pair_cosine_mean"] > rows[1]["pair_cosine_mean"]
    assert rows[0]["pair_distance_mean"] <= rows[0]["pair_distance_worst"]
    # Every pair is in pairs.jsonl: l2 sums the distances of the projections, over the pairs.
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert [pair["step"] for pair in pairs] == [1, 2, 3, 4, 5]
    for row, pair in zip(rows, pairs, strict=True):
        each = [sum(distances) for distances in pair["distance"]]
        assert sum(each) / len(tiny.PLAN.ties) == pytest.approx(row["penalty"])


def test_bf16_computes_in_bf16_and_updates_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state()  # a process has one precision; this one has had fp32
        recipe = tiny.recipe(tmp_path / precision, steps=3, precision=precision)
        train(tiny.job(recipe), recipe)
        losses[precision] = [row["lm_loss"] for row in tiny.curve(recipe.folder)]
        assert {w.dtype for w in tiny.weights(recipe.folder).values()} == {torch.float32}
    AcceleratorState._reset_state()
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)


# --- what it leaves -------------------------------------------------------------------------------


def test_the_weights_load_in_transformers(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    job = tiny.job(recipe)
    result = train(job, recipe)
    assert (result.steps, result.tokens) == (2, 2 * 8 * 15)
    loaded, info = LlamaForCausalLM.from_pretrained(result.weights, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, parameter in job.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert not torch.equal(loaded.model.norm.weight, tiny.model().model.norm.weight)
    assert json.loads((result.weights / "config.json").read_text())["dtype"] == "float32"


def test_zero_steps_leave_the_model_as_it_was(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=0, warmup_steps=0)
    result = train(tiny.job(recipe), recipe)
    assert result.tokens == 0
    for name, parameter in tiny.model().named_parameters():
        assert torch.equal(tiny.weights(tmp_path)[name], parameter)


def test_a_finished_training_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    result = train(tiny.job(recipe), recipe)
    monkeypatch.setattr(loop, "start", lambda recipe: pytest.fail("started again"))
    assert train(tiny.job(recipe), recipe) == result


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2, trainable=["*.self_attn.*"])
    train(tiny.job(recipe), recipe)
    for name, parameter in tiny.model().named_parameters():
        assert torch.equal(tiny.weights(tmp_path)[name], parameter) == ("self_attn" not in name), (
            name
        )


def test_evaluation_rows(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=4, evaluate_every=2, learning_rate=1e-9)
    job = tiny.job(recipe)
    train(job, recipe)
    rows = tiny.curve(tmp_path)
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
    ids = torch.stack([job.validation_blocks[i]["input_ids"] for i in range(5)])
    with torch.no_grad():
        expected = float(tiny.model()(ids, labels=ids).loss)
    assert rows[1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_rank_blocks_cover_every_block_once() -> None:
    blocks = tiny.blocks(5)
    seen = []
    for rank in range(2):
        mine = loop.RankBlocks(blocks, 5, rank, 2)
        assert len(mine) == 3
        seen += [b["input_ids"] for i in range(3) if (b := mine[i])["labels"].max() >= 0]
    assert len(seen) == 5
    for index in range(5):
        assert any(torch.equal(blocks[index]["input_ids"], ids) for ids in seen)


# --- stopping and resuming ------------------------------------------------------------------------


@pytest.fixture
def unstopped(tmp_path: Path) -> Path:
    recipe = small_recipe(tmp_path / "unstopped")
    train(tiny.job(recipe), recipe)
    return recipe.folder


def small_recipe(folder: Path, **fields: Any) -> Recipe:
    return tiny.recipe(folder, steps=7, evaluate_every=3, micro_batch_size=2, **fields)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_the_next_start_resumes_exactly(
    tmp_path: Path, unstopped: Path, number: signal.Signals
) -> None:
    recipe = small_recipe(tmp_path / "stopped")
    with (
        at_step(4, lambda: stop(number)),
        pytest.raises(TrainingStopped, match=r"step 4 of 7.*resume with") as stopped,
    ):
        train(tiny.job(recipe), recipe)
    assert stopped.value.checkpoint == recipe.folder / "checkpoints/step-000004"
    assert not (recipe.folder / "weights").exists()
    train(tiny.job(recipe, model=tiny.model(seed=9)), recipe)
    tiny.assert_same_run(recipe.folder, unstopped)


def test_killed_twice_resumes_exactly(tmp_path: Path, unstopped: Path) -> None:
    """A kill leaves rows beyond the checkpoint, half a row, and half a checkpoint."""
    recipe = small_recipe(tmp_path / "killed", checkpoint_every=2)
    for step in (4, 6):
        with at_step(step), pytest.raises(KilledError):
            train(tiny.job(recipe), recipe)
        with (recipe.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lm')
        half = recipe.folder / "checkpoints" / "step-000099.tmp"
        half.mkdir()
        (half / "model.safetensors").write_text("half")
    train(tiny.job(recipe), recipe)
    assert steps_in(recipe.folder / "checkpoints") == [4, 6]
    assert not list(recipe.folder.glob("checkpoints/*.tmp"))
    tiny.assert_same_run(recipe.folder, unstopped)


def test_resuming_in_another_factorization(tmp_path: Path, unstopped: Path) -> None:
    recipe = small_recipe(tmp_path / "stopped")
    with at_step(4, stop), pytest.raises(TrainingStopped):
        train(tiny.job(recipe), recipe)
    section = recipe.train.model_copy(update={"micro_batch_size": 8})
    train(tiny.job(recipe), recipe.model_copy(update={"train": section}))
    mine, theirs = tiny.curve(recipe.folder)[-1], tiny.curve(unstopped)[-1]
    assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
    assert mine["tokens"] == theirs["tokens"]


def test_another_recipe_or_plan_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, checkpoint_every=3)
    train(tiny.job(recipe), recipe)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = recipe.train.model_copy(update={"betas": (0.8, 0.95)})
    with pytest.raises(PostshareError, match=r"train\.betas was \[0\.9, 0\.95\], now \[0\.8"):
        train(tiny.job(recipe), recipe.model_copy(update={"train": other}))
    with pytest.raises(PostshareError, match=r"holds another run .plan was"):
        train(tiny.job(recipe, plan=SharingPlan(tiny.PLAN.ties[:1])), recipe)
    with pytest.raises(PostshareError, match=r"resume is never"):
        train(tiny.job(recipe), recipe.model_copy(update={"resume": "never"}))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_nan_stops_the_training_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, checkpoint_every=2)
    job = tiny.job(recipe)
    calls = 0

    def poison(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += module.training
        if calls > 4 * 4:  # four micro-batches a step: the first of step 5
            output.logits = output.logits * float("nan")
        return output

    job.model.register_forward_hook(poison)
    with pytest.raises(PostshareError, match=r"step 5: the lm loss is nan.*step-000004"):
        train(job, recipe)
    assert steps_in(tmp_path / "checkpoints") == [2, 4]
    assert [row["step"] for row in tiny.curve(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "weights").exists()


def test_an_infinite_gradient_stops_the_training(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    job = tiny.job(recipe)
    job.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        PostshareError, match=r"step 1: the gradient norm is (inf|nan).*no checkpoint"
    ):
        train(job, recipe)
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_to_predict(tmp_path: Path) -> None:
    class Silent(type(tiny.blocks())):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            block = super().__getitem__(index)
            return {**block, "labels": torch.full_like(block["labels"], -100)}

    blocks = tiny.blocks()
    blocks.__class__ = Silent
    recipe = small_recipe(tmp_path)
    with pytest.raises(PostshareError, match=r"step 1: no token is predicted"):
        train(tiny.job(recipe, train_blocks=blocks), recipe)


def test_an_error_of_the_data_reaches_the_caller(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    job: TrainJob = tiny.job(recipe)
    broken = tiny.blocks()
    broken._sources = []
    with pytest.raises(IndexError):
        train(replace(job, train_blocks=broken), recipe)


def test_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/venv/bin/postshare", "run", "demo", "model.path=a b"])
    assert resume_command(1) == "postshare run demo 'model.path=a b'"
    several = "accelerate launch <the same options> --no_python postshare run demo 'model.path=a b'"
    assert resume_command(2) == several
    monkeypatch.setattr("sys.argv", ["/repo/train/__main__.py", "demo"])
    assert resume_command(1) == "python -m train demo"
    assert resume_command(2) == "accelerate launch <the same options> -m train demo"
