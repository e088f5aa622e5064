from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.errors import PostshareError
from tests.support import tiny
from train.doctor.inputs import check_start
from train.recipe.recipe import TrainSection
from train.stages.pipeline import run
from train.training.loop import train
from train.training.optimizer import (
    build_optimizer,
    check_optimizer,
    learning_rate_factor,
    parameter_groups,
    select_trainable,
)


def section(**fields: Any) -> TrainSection:
    return tiny.recipe(Path("unused"), **{"steps": 100, "warmup_steps": 0, **fields}).train


def names_of(model: torch.nn.Module, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


# --- which parameters -----------------------------------------------------------------------------


def test_trainable_patterns() -> None:
    model = tiny.model()
    chosen = select_trainable(model, ["*.q_proj.weight", "*.o_proj.weight"])
    assert chosen == [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qo"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == chosen
    assert select_trainable(model, ["*"]) == [name for name, _ in model.named_parameters()]


def test_a_pattern_without_match_is_refused() -> None:
    with pytest.raises(PostshareError, match=r"'\*\.attn\.\*' matches no parameter"):
        select_trainable(tiny.model(), ["*", "*.attn.*"])
    with pytest.raises(PostshareError, match=r"weight_decay_exclude: '\*rmsnorm\*' matches no"):
        parameter_groups(tiny.model(), 0.1, ["*rmsnorm*"])


def test_weight_decay_leaves_out_norms_and_embeddings() -> None:
    model = tiny.model(tie_word_embeddings=False)
    decayed, kept = parameter_groups(model, 0.1, section().weight_decay_exclude)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert names_of(model, kept) == norms | {"model.embed_tokens.weight"}
    assert names_of(model, decayed) | names_of(model, kept) == {
        name for name, _ in model.named_parameters()
    }
    assert "lm_head.weight" in names_of(model, decayed)


def test_every_parameter_can_decay_and_frozen_ones_are_in_no_group() -> None:
    model = tiny.model()
    (group,) = parameter_groups(model, 0.1, [])
    assert len(group["params"]) == len(list(model.parameters()))
    select_trainable(model, ["*.self_attn.*"])
    (group,) = parameter_groups(model, 0.1, section().weight_decay_exclude)
    assert len(group["params"]) == 8


def test_fused_adamw_takes_the_recipes_numbers() -> None:
    optimizer = build_optimizer(tiny.model(), section(betas=[0.8, 0.9], eps=1e-7), 3e-4)
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert group["fused"]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-7)


def test_fused_adamw_equals_the_plain_one() -> None:
    models = [tiny.model(), tiny.model()]
    plain = torch.optim.AdamW(
        parameter_groups(models[1], 0.1, section().weight_decay_exclude),
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    optimizers = [build_optimizer(models[0], section(), 1e-2), plain]
    ids = torch.arange(32).view(2, 16)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_eight_bit_adamw_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_optimizer(section(), on_gpu=False)
    asked = tiny.recipe(tmp_path / "run", optimizer="adamw_8bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = r"needs a CUDA GPU; use train.optimizer=adamw"
    with pytest.raises(PostshareError, match=without):
        run(asked)  # its model is no folder: that would be the error of loading it
    with pytest.raises(PostshareError, match=without):
        train(tiny.job(asked), asked)
    assert not asked.folder.exists()
    assert any("CUDA GPU" in finding.found + finding.cure for finding in check_start(asked, 1))
    # On a machine with a GPU that the launch leaves idle.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PostshareError, match=without):
        check_optimizer(asked.train, on_gpu=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(PostshareError, match=r"needs bitsandbytes.*pip install 'postshare.gpu.'"):
        check_optimizer(asked.train, on_gpu=True)


# --- schedules ------------------------------------------------------------------------------------


def factors(**fields: Any) -> list[float]:
    asked = section(**fields)
    return [learning_rate_factor(step, 100, asked) for step in range(100)]


def test_warm_up_is_linear_and_wastes_no_step() -> None:
    for schedule in ("cosine", "linear", "constant", "wsd"):
        rates = factors(schedule=schedule, warmup_steps=10)
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert rates[10] == 1.0


def test_cosine_is_that_of_transformers() -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, min_lr_rate=0.2)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = factors(schedule="cosine", warmup_steps=10, min_learning_rate_ratio=0.2)
    assert ours[10:] == pytest.approx(theirs[10:])


def test_linear_constant_and_the_floor() -> None:
    rates = factors(schedule="linear", min_learning_rate_ratio=0.5)
    assert rates[50] == pytest.approx(0.75)
    assert rates[99] == pytest.approx(0.505)
    assert factors(schedule="constant", warmup_steps=0) == [1.0] * 100


def test_wsd_is_stable_then_decays() -> None:
    rates = factors(schedule="wsd", warmup_steps=10, decay_steps=20)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert factors(schedule="wsd")[89:92] == pytest.approx([1, 1, 0.9])


def test_a_training_shorter_than_its_warm_up_stays_below_the_peak() -> None:
    asked = section(warmup_steps=50)
    assert [learning_rate_factor(step, 3, asked) for step in range(3)] == [0.02, 0.04, 0.06]
    assert all(math.isfinite(learning_rate_factor(s, 50, asked)) for s in range(51))
