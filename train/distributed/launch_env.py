"""The launch: what the launcher asks for in the environment, and what is refused of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

_MPI_SIZES = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}


def launched_stage() -> int | None:
    """The ZeRO stage that the launch asks for; None without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    # Accelerate's launcher states the stage of the launch file, and 2 for a file without one.
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def launched_fsdp() -> bool:
    """Whether the launch asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@dataclass(frozen=True)
class Place:
    """Where a process stands among the nodes of a launch."""

    node: int = 0
    nodes: int = 1
    first: bool = True
    """Whether it is the first process of its node."""


def launched_place() -> Place:
    """As torchrun says it, and `accelerate launch`, which starts through it."""
    variable = os.environ.get
    return Place(
        int(variable("GROUP_RANK", "0")),
        int(variable("GROUP_WORLD_SIZE", "1")),
        variable("LOCAL_RANK", "0") == "0",
    )


@dataclass(frozen=True)
class Offload:
    """What ZeRO-3 keeps in the host's memory."""

    optimizer: bool = False
    parameters: bool = False


def launched_offload() -> Offload:
    """What the launch asks to be kept in the host's memory; see `check_launch`."""
    return Offload(_offload_device("OPTIMIZER") == "cpu", _offload_device("PARAM") == "cpu")


def _offload_device(what: str) -> str:
    device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "").lower()
    return device or "none"


def check_launch(recipe: Recipe, stage: int | None) -> None:
    """Refuse launch settings that would be ignored: the recipe states them, in one place.

    Args:
        stage: ZeRO stage of the launch, None without DeepSpeed.

    Raises:
        PostshareError: names the setting.
    """
    setting = os.environ.get
    mixed = setting("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", recipe.train.precision):
        raise PostshareError(
            f"the launch asks for mixed_precision {mixed}, the recipe for "
            f"{recipe.train.precision}; drop it from the launch file, train.precision decides"
        )
    check_plugins()
    if launched_fsdp():
        check_fsdp()
    if recipe.lora is not None and (launched_fsdp() or stage is not None):
        raise PostshareError(
            "lora trains adapters that every process holds whole, and the launch asks for "
            + ("FSDP2" if launched_fsdp() else f"ZeRO-{stage}")
            + "; launch with launch/accelerate/ddp.yaml, or remove lora"
        )
    if recipe.train.optimizer == "adamw_8bit" and (launched_fsdp() or stage):
        raise PostshareError(
            "train.optimizer adamw_8bit quantizes whole parameters, which ZeRO and FSDP2 split; "
            "use train.optimizer=adamw, or one process or DDP"
        )
    if stage is None:
        return
    if stage not in (0, 1, 2, 3):
        raise PostshareError(f"the launch asks for ZeRO stage {stage}; use 0, 1, 2 or 3")
    steps = setting("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "none").lower()
    if steps not in ("none", "auto", "1"):
        raise PostshareError(
            f"the launch sets deepspeed_config.gradient_accumulation_steps: {steps}, which would "
            "be ignored; remove it: train.batch_size and train.micro_batch_size decide"
        )
    ignored = {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
        "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model",
    }
    for variable, key in ignored.items():
        if setting(variable, "none").lower() not in ("none", "false", ""):
            raise PostshareError(
                f"the launch sets deepspeed_config.{key}, which would be ignored; remove it: the "
                "DeepSpeed configuration is generated from the recipe"
            )
    check_offload(stage)
    if stage == 3 and recipe.train.compile:
        raise PostshareError(
            "train.compile: under ZeRO-3 the weights of a layer are gathered module by module, so "
            "that it cannot be compiled as a whole; launch with launch/accelerate/fsdp2.yaml, "
            "which spreads the same, or set train.compile=false"
        )


def check_plugins() -> None:
    """Refuse what Accelerate would do to a model, and what shapes of parallelism we do not have.

    Raises:
        PostshareError: names the setting.
    """
    setting = os.environ.get
    compiler = setting("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise PostshareError(
            f"the launch sets dynamo_config.dynamo_backend: {compiler.upper()}, which would be "
            "ignored; remove dynamo_config from the launch file, train.compile decides"
        )
    refused = {
        "ACCELERATE_USE_MEGATRON_LM": "megatron_lm_config (Megatron-LM)",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (tensor or context parallelism)",
    }
    for variable, name in refused.items():
        if setting(variable, "false").lower() == "true":
            raise PostshareError(
                f"the launch asks for {name}, which is not supported; use a file of "
                "launch/accelerate/: ddp.yaml, zero0..3.yaml or fsdp2.yaml"
            )
    # Accelerate's launcher for one process says where the others would meet, and starts none.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    by_mpi = _MPI_SIZES & os.environ.keys()
    if alone and not by_mpi and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise PostshareError(
            "accelerate launch was asked for several processes and has started one (with --cpu, "
            "use_cpu or distributed_type NO it always does); launch with "
            "launch/accelerate/ddp.yaml, which without GPUs runs on the CPU, or, where one process "
            "is meant, with --num_processes 1 and without MASTER_ADDR in the environment"
        )


def check_offload(stage: int) -> None:
    """Refuse an offload that is not tested for exactness. Raises PostshareError."""
    for what, key in (("OPTIMIZER", "offload_optimizer_device"), ("PARAM", "offload_param_device")):
        device = _offload_device(what)
        if device == "none":
            continue
        if device != "cpu":
            raise PostshareError(
                f"the launch sets deepspeed_config.{key}: {device}, and only cpu is supported "
                "(on a disk the penalty would have no weights to read); use "
                "launch/accelerate/zero3-offload.yaml"
            )
        if stage != 3:
            raise PostshareError(
                f"the launch sets deepspeed_config.{key} with ZeRO-{stage}, "
                + (
                    "whose clipping would miss the penalty's gradient"
                    if stage
                    else "which has none"
                )
                + "; use launch/accelerate/zero3-offload-optimizer.yaml"
            )
    offload = launched_offload()
    if offload.parameters and not offload.optimizer:
        raise PostshareError(
            "the launch offloads parameters and leaves the optimizer, which is larger, on the "
            "device; use launch/accelerate/zero3-offload.yaml, which offloads both"
        )


def check_fsdp() -> None:
    """Refuse settings of Accelerate's FSDP that ours would ignore. Raises PostshareError.

    Its launcher states every setting, so that only values other than its defaults can be told.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise PostshareError(
            f"the launch asks for FSDP {version}; use FSDP2, launch/accelerate/fsdp2.yaml"
        )
    ignored = {
        "OFFLOAD_PARAMS": "false",
        "ACTIVATION_CHECKPOINTING": "false",  # train.gradient_checkpointing decides
        "RESHARD_AFTER_FORWARD": "true",
        "AUTO_WRAP_POLICY": "no_wrap",
        "TRANSFORMER_CLS_TO_WRAP": "",
        "STATE_DICT_TYPE": "sharded_state_dict",
        "IGNORED_MODULES": "",
        "SHARDING_STRATEGY": "full_shard",
        "MIN_NUM_PARAMS": "100000000",
        "BACKWARD_PREFETCH": "",
        "FORWARD_PREFETCH": "false",
        "USE_ORIG_PARAMS": "true",
        "SYNC_MODULE_STATES": "true",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }
    for name, default in ignored.items():
        if os.environ.get(f"FSDP_{name}", default).lower() not in (default, "none"):
            raise PostshareError(
                f"the launch sets fsdp_config.fsdp_{name.lower()}, which would be ignored; remove "
                "it: every decoder layer is sharded, and the recipe decides the rest"
            )
