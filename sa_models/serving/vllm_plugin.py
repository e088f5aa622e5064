"""The entry point that makes vLLM serve compact exports (group ``vllm.general_plugins``).

vLLM calls it in each of its processes, where postshare is installed. The model itself is imported
when one is served.
"""

from __future__ import annotations

from typing import Any

from sa_models.errors import PostshareError


def register() -> None:
    """Tell transformers and vLLM of the compact model. May be called more than once."""
    import transformers.models.auto.modeling_auto  # noqa: F401
    from vllm import ModelRegistry

    import sa_models  # noqa: F401 - registers with the Auto classes

    ModelRegistry.register_model(
        "SharedLlamaForCausalLM", "sa_models.serving.vllm_model:ServedSharedLlama"
    )


def check_supported(vllm_config: Any) -> None:
    """Refuse what would compute something else, or fail late.

    Raises:
        PostshareError: several devices for one model, or quantized weights.
    """
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise PostshareError(
            "a compact model is served on one device, since layers read each other's weights; "
            "remove --tensor-parallel-size and --pipeline-parallel-size, or serve the dense export"
        )
    if vllm_config.quant_config is not None:
        raise PostshareError(
            "the compact model is not served with quantized weights; serve the compact export "
            "itself, or the quantized dense one"
        )
