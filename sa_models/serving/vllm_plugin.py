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
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    # Earlier versions know one number of heads for all layers: our modules then serve every plan.
    if hasattr(convertors.ModelArchConfigConvertorBase, "get_per_layer_hf_configs"):
        from sa_models.serving.vllm_geometry import PACKED, SharedLlamaGeometry

        ModelRegistry.register_model(PACKED, "sa_models.serving.vllm_packed:ServedPackedLlama")
        convertors.MODEL_ARCH_CONFIG_CONVERTORS["shared_llama"] = SharedLlamaGeometry


def check_supported(vllm_config: Any) -> None:
    """Refuse what would compute something else, or fail late, where our modules serve the plan.

    Raises:
        PostshareError: several devices for one model, or quantized weights.
    """
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise PostshareError(
            "a compact model with spans, or with layers without attention, is served on one "
            "device, since layers read each other's weights; remove --tensor-parallel-size and "
            "--pipeline-parallel-size, or serve the dense export"
        )
    _refuse_quantized(vllm_config)


def check_packed(vllm_config: Any) -> None:
    """As :func:`check_supported`, of a plan whose layers are vLLM's own.

    Raises:
        PostshareError: a layer's heads do not divide among the devices; pipeline stages, which
            were never run; or quantized weights.
    """
    from sa_models.serving.packed_llama import unsplittable

    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise PostshareError(
            "a compact model is not served in pipeline stages; remove --pipeline-parallel-size, or "
            "serve the dense export"
        )
    devices = parallel.tensor_parallel_size
    layer = unsplittable(vllm_config.model_config.hf_config, devices)
    if layer is not None:
        raise PostshareError(
            f"a layer has {layer.num_attention_heads} heads in {layer.num_key_value_heads} KV "
            f"groups left, which do not divide among {devices} devices; choose another "
            "--tensor-parallel-size, or serve the dense export"
        )
    _refuse_quantized(vllm_config)


def _refuse_quantized(vllm_config: Any) -> None:
    if vllm_config.quant_config is not None:
        raise PostshareError(
            "the compact model is not served with quantized weights; serve the compact export "
            "itself, or the quantized dense one"
        )
