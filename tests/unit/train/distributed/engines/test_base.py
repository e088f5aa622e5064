"""The engine of one process, what it refuses, and DeepSpeed's generated configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sa_models.errors import PostshareError
from train.distributed.engines import start as engine_module
from train.distributed.engines.start import start
from train.distributed.engines.zero import deepspeed_config
from train.distributed.launch_env import (
    Offload,
    check_launch,
    launched_fsdp,
    launched_offload,
    launched_stage,
)
from train.recipe.recipe import Recipe, validate

LAUNCH_VARIABLES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
    "ACCELERATE_MIXED_PRECISION",
    "WORLD_SIZE",
    "LOCAL_RANK",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def recipe(**train: Any) -> Recipe:
    section = {"steps": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.1, **train}
    return validate(
        {
            "name": "engine-test",
            "model": {"path": "unused"},
            "data": {"train": "unused", "validation": "unused", "sequence_length": 8},
            "plan": {"strategy": "none"},
            "train": section,
        }
    )


def line(width: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 1, bias=False)


def prepared(model: nn.Module, **train: Any) -> engine_module.Engine:
    engine = start(recipe(**train))
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine.prepare(model, torch.optim.SGD(trainable, lr=0.1))
    return engine


def test_gradients_add_up_over_micro_steps_and_the_norm_is_that_before_clipping() -> None:
    model = line()
    before = model.weight.detach().clone()
    engine = prepared(model, clip_norm=1.0)
    x = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
    for row in range(2):
        with engine.micro_step(boundary=row == 1):
            engine.backward(engine.model(x[row : row + 1]).sum())
    assert engine.step() == pytest.approx(5.0)
    torch.testing.assert_close(model.weight, before - 0.1 * torch.tensor([[0.6, 0.8, 0.0]]))
    assert model.weight.grad is None
    engine.close()


def test_clipping_sees_what_is_written_to_a_shard() -> None:
    model = line()
    before = model.weight.detach().clone()
    engine = prepared(model, clip_norm=1.0)
    with engine.micro_step(boundary=True):
        engine.backward(engine.model(torch.tensor([[3.0, 0, 0]])).sum())
    shard = engine.shards()["weight"]
    gradient = shard.read_gradient()
    gradient[1] += 4
    shard.write_gradient(gradient)
    assert engine.step() == pytest.approx(5.0)
    torch.testing.assert_close(model.weight, before - 0.1 * torch.tensor([[0.6, 0.8, 0.0]]))
    engine.close()


def test_no_clipping_when_the_recipe_says_null() -> None:
    engine = prepared(model := line(), clip_norm=None)
    before = model.weight.detach().clone()
    with engine.micro_step(boundary=True):
        engine.backward(100 * engine.model(torch.ones(1, 3)).sum())
    assert engine.step() == pytest.approx(100 * 3**0.5)
    torch.testing.assert_close(model.weight, before - 10)
    engine.close()


def test_two_precisions_in_one_process() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) * 2:
        model = line()
        engine = prepared(model, precision=precision)
        assert engine.model(torch.ones(1, 3)).dtype == dtype
        engine.close()
        assert model(torch.ones(1, 3)).dtype == torch.float32
        assert model.weight.dtype == torch.float32


def test_learning_rate_reductions_and_weights() -> None:
    engine = prepared(model := line())
    engine.set_learning_rate(0.5)
    assert engine.optimizer.param_groups[0]["lr"] == 0.5
    assert engine.reduce_sum(3) == 3.0
    assert engine.reduce_max(torch.tensor([1, 2])).tolist() == [1, 2]
    ((name, weight),) = engine.full_weights()
    assert name == "weight"
    assert torch.equal(weight, model.weight)
    engine.close()
    engine.close()  # twice, as after an error


def test_frozen_parameters_have_no_shard() -> None:
    model = nn.Sequential(line(), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    engine = prepared(model)
    assert sorted(engine.shards()) == ["1.bias", "1.weight"]
    with pytest.raises(PostshareError, match=r"0\.weight is frozen or absent.*train\.trainable"):
        engine.shards(["0.weight"])
    engine.close()


def test_half_precision_parameters_are_refused() -> None:
    engine = start(recipe())
    with pytest.raises(PostshareError, match=r"weight is torch\.bfloat16; load the model"):
        engine.prepare(line().bfloat16(), torch.optim.SGD(line().parameters()))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision bf16, the recipe for fp32"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP 1; use FSDP2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_config.fsdp_offload_params, which would be ignored",
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
            },
            "fsdp_config.fsdp_auto_wrap_policy",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "deepspeed_config.gradient_clipping"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "ZeRO stage 4; use 0, 1, 2 or 3"),
        (
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
            },
            "offload_optimizer_device: nvme, and only cpu",
        ),
        *(
            (
                {
                    "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
                    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
                },
                f"offload_optimizer_device with ZeRO-{stage}, wh.*zero3-offload-optimizer.yaml",
            )
            for stage in "012"
        ),
        (
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
            "leaves the optimizer, which is larger",
        ),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "deepspeed_config.zero3_init_flag"),
    ],
)
def test_launch_settings_that_would_be_ignored_are_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"} & environment.keys():
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PostshareError, match=message) as caught:
        start(recipe())
    assert "\n" not in str(caught.value)


def test_what_the_launch_files_ask_for_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    check_launch(recipe(), launched_stage())
    assert launched_offload() == Offload()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    check_launch(recipe(), launched_stage())
    assert launched_offload() == Offload(optimizer=True)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    check_launch(recipe(), launched_stage())
    assert launched_offload() == Offload(optimizer=True, parameters=True)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(recipe(), launched_stage())
    assert launched_fsdp()


def test_a_world_of_one_where_two_were_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(engine_module, "_accelerator", lambda *_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        PostshareError, match="2 processes were launched but each sees a world of 1"
    ):
        start(recipe())


def test_batch_that_does_not_divide_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(engine_module, "_accelerator", lambda *_: three)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(PostshareError, match=r"nearest is train\.batch_size=6"):
        start(recipe())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_configuration_is_complete(stage: int) -> None:
    made = recipe(precision="bf16", clip_norm=0.7, batch_size=16)
    config = deepspeed_config(made, stage, world=2, on_cpu=True)
    assert "auto" not in str(config)
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 16
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": stage > 0}  # ZeRO-0: by autocast
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("stage3_param_persistence_threshold") == (0 if stage == 3 else None)
    assert deepspeed_config(recipe(clip_norm=None), stage, 1, True)["gradient_clipping"] == 0.0
    assert "offload_optimizer" not in zero


def test_where_nothing_trains_any_number_of_processes_will_do() -> None:
    config = deepspeed_config(recipe(steps=0), 1, world=3, on_cpu=True)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (6, 1)


def test_deepspeed_configuration_with_offload() -> None:
    def zero(on_cpu: bool, offload: Offload) -> dict[str, Any]:
        return deepspeed_config(recipe(), 3, 2, on_cpu, offload)["zero_optimization"]

    optimizer = zero(False, Offload(optimizer=True))
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer
    both = zero(True, Offload(optimizer=True, parameters=True))
    assert both["offload_optimizer"] == both["offload_param"]
    assert both["offload_param"] == {"device": "cpu", "pin_memory": False}
