"""What `accelerate launch` passes on, made by Accelerate's own launcher: accepted, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from train.distributed.launch_env import check_launch, launched_fsdp, launched_stage
from train.recipe.recipe import Recipe, validate

FILES = sorted((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))
OURS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MASTER_", "WORLD_SIZE")


def recipe(**train: Any) -> Recipe:
    return validate(
        {
            "name": "test",
            "plan": {"strategy": "none"},
            "model": {"path": "demo-base"},
            "data": {"train": "stdlib", "validation_fraction": 0.1, "sequence_length": 64},
            "train": {
                "steps": 1,
                "batch_size": 8,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                **train,
            },
        }
    )


def launched(*options: str) -> dict[str, str]:
    """The environment in which `accelerate launch OPTIONS script` starts a process."""
    arguments = launch_command_parser().parse_args([*options, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment: dict[str, str]
    if arguments.use_deepspeed and not arguments.cpu:
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif (arguments.use_fsdp or arguments.multi_gpu) and not arguments.cpu:
        environment = prepare_multi_gpu_env(arguments)
    else:
        return {**prepare_simple_launcher_cmd_env(arguments)[1]}
    return {**environment, "WORLD_SIZE": str(arguments.num_processes)}  # as torchrun states it


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def check(*options: str, **environment: str) -> None:
        for name in [name for name in os.environ if name.startswith(OURS)]:
            monkeypatch.delenv(name)
        passed = launched(*options).items()
        ours = {name: value for name, value in passed if name.startswith(OURS)}
        for name, value in {**ours, **environment}.items():
            monkeypatch.setenv(name, value)
        check_launch(recipe(), launched_stage())

    return check


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_files_are_accepted(file: Path, check: Callable[..., None]) -> None:
    check("--config_file", str(file))
    assert launched_fsdp() == (file.stem == "fsdp2")
    stage = launched_stage()
    assert (stage is not None) == file.stem.startswith("zero")
    assert stage is None or file.stem.startswith(f"zero{stage}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_compiled_layers_are_refused_under_zero3_alone(
    file: Path, check: Callable[..., None]
) -> None:
    check("--config_file", str(file))
    compiled = recipe(compile=True)
    if file.stem.startswith("zero3"):
        with pytest.raises(PostshareError, match=r"^train\.compile: .*; launch with .*fsdp2"):
            check_launch(compiled, launched_stage())
    else:
        check_launch(compiled, launched_stage())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_eight_bit_adamw_is_refused_where_parameters_are_split(
    file: Path, check: Callable[..., None]
) -> None:
    check("--config_file", str(file))
    asked = recipe(optimizer="adamw_8bit")
    if file.stem.startswith(("zero1", "zero2", "zero3", "fsdp2")):
        with pytest.raises(PostshareError, match=r"which ZeRO and FSDP2 split; use .*=adamw,"):
            check_launch(asked, launched_stage())
    else:
        check_launch(asked, launched_stage())


def file(folder: Path, **settings: Any) -> str:
    import yaml

    value = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": True,
        **settings,
    }
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(value))
    return str(path)


FSDP = {"distributed_type": "FSDP", "use_cpu": False, "num_processes": 2}
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config.dynamo_backend: INDUCTOR"),
    ({"dynamo_config": {"dynamo_backend": "EAGER"}}, "dynamo_config.dynamo_backend: EAGER"),
    ({"num_processes": 2}, "asked for several processes and has started one"),
    ({"mixed_precision": "fp16"}, "mixed_precision fp16"),
    ({**FSDP, "fsdp_config": {"fsdp_version": 1}}, "FSDP 1"),
    *[
        ({**FSDP, "fsdp_config": {"fsdp_version": 2, f"fsdp_{key}": value}}, f"fsdp_{key}")
        for key, value in {
            "offload_params": True,
            "activation_checkpointing": True,
            "activation_checkpointing_offload": True,
            "reshard_after_forward": False,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
            "sharding_strategy": "SHARD_GRAD_OP",
            "backward_prefetch": "BACKWARD_PRE",
            "forward_prefetch": True,
            "use_orig_params": False,
            "min_num_params": 5,
        }.items()
    ],
    (
        {
            **FSDP,
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_sync_module_states": False,
                "fsdp_cpu_ram_efficient_loading": False,
            },
        },
        "fsdp_sync_module_states",
    ),
    (
        {
            **FSDP,
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 4},
        },
        "gradient_accumulation_steps: 4",
    ),
    (
        {
            **FSDP,
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": 2, "deepspeed_moe_layer_cls_names": "Block"},
        },
        "deepspeed_moe_layer_cls_names",
    ),
]


@pytest.mark.parametrize(("settings", "named"), SETTINGS, ids=[named for _, named in SETTINGS])
def test_a_setting_that_we_would_ignore_is_refused(
    settings: dict[str, Any], named: str, tmp_path: Path, check: Callable[..., None]
) -> None:
    with pytest.raises(PostshareError) as caught:
        check("--config_file", file(tmp_path, **settings))
    assert named in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ],
)
def test_other_shapes_of_parallelism_are_refused(
    variable: str, named: str, check: Callable[..., None]
) -> None:
    """Accelerate makes these two on a machine with GPUs alone."""
    ddp = str(REPOSITORY / "launch" / "accelerate" / "ddp.yaml")
    with pytest.raises(PostshareError, match=named):
        check("--config_file", ddp, **{variable: "true"})


def test_one_process_on_the_cpu_is_accepted_and_two_are_not(
    tmp_path: Path, check: Callable[..., None]
) -> None:
    settings = file(tmp_path)
    check("--config_file", settings, "--cpu", "--num_processes", "1")
    with pytest.raises(PostshareError, match=r"has started one .*ddp\.yaml"):
        check("--config_file", settings, "--cpu", "--num_processes", "2")
    # Started by MPI they are two, each with its own number.
    check("--config_file", settings, "--num_processes", "2", OMPI_COMM_WORLD_SIZE="2")


def test_every_fsdp_setting_of_the_launcher_is_known(
    tmp_path: Path, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new Accelerate may pass on more: each variable is one that we refuse, or listed here."""
    harmless = {"FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"}
    settings = file(tmp_path, **FSDP, fsdp_config={"fsdp_version": 2})
    passed = {name for name in launched("--config_file", settings) if name.startswith("FSDP_")}
    assert len(passed) >= 11
    for name in passed - harmless:
        check("--config_file", settings)
        monkeypatch.setenv(name, "another")
        with pytest.raises(PostshareError, match=name.lower()):
            check_launch(recipe(), launched_stage())
