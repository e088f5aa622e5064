"""Ways of gradient checkpointing: the same gradients, what is computed again, what is kept."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.training import LENGTH, VOCABULARY, Setting, build
from train.estimate.gpu_memory import kept_products
from train.estimate.llama_shapes import LlamaShape
from train.models.checkpointing import enable_checkpointing
from train.recipe.sections.training import Checkpointing

MODES: list[Checkpointing] = [True, 2, 3, "selective"]


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.count[torch.ops.aten.mm]

    @property
    def attentions(self) -> int:
        return self.count[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]


def step(setting: Setting, mode: Checkpointing) -> tuple[dict[str, Tensor], Operations]:
    """The gradients of a micro-batch, and what its forward and backward compute."""
    model, _ = build(setting)
    enable_checkpointing(model, mode)
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    with Operations() as computed:
        model(ids, labels=ids, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}
    return found, computed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "setting",
    [
        Setting("ties"),
        Setting("both"),
        Setting("owned", heal=True),
        Setting("basis", heal=True),
        Setting("ties", lora=3),
    ],
    ids=["mha", "spans", "compact", "basis", "lora"],
)
def test_gradients_are_the_same_bits(setting: Setting, mode: Checkpointing) -> None:
    expected, _ = step(setting, False)
    found, _ = step(setting, mode)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_what_is_computed_again() -> None:
    """Of a layer its attention and all products but the last, which nothing needs; `selective`
    computes its norms alone."""
    plain, *others = (step(Setting("ties"), mode)[1] for mode in (False, *MODES))
    again = [(o.products - plain.products, o.attentions - plain.attentions) for o in others]
    assert again == [(24, 4), (12, 2), (12, 2), (0, 0)]  # of 4 layers: 4, 2, 2 (0 and 3), none
    roots = [o.count[torch.ops.aten.rsqrt] for o in (plain, *others)]
    assert roots == [9, 17, 13, 13, 17]


def alive() -> dict[int, int]:
    """Bytes of the storage of every tensor, by its place."""
    gc.collect()
    held = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, Parameter):
            # What other tests leave behind, such as those of vmap, may have no storage.
            with contextlib.suppress(NotImplementedError):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return held


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_kept_is_what_was_estimated(attention: str) -> None:
    """Between forward and backward of two layers more: each keeps its input and its products."""
    shape, tokens = LlamaShape(97, 128, 352, 2, 8, 4, 16, 128), 2 * 64
    held = []
    for layers in (2, 4):
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            attn_implementation=attention,
        )
        model = LlamaForCausalLM(config).train()
        enable_checkpointing(model, "selective")
        before = alive()
        out = model(torch.zeros(2, 64, dtype=torch.long), use_cache=False)
        held.append(sum(size for at, size in alive().items() if at not in before))
        del out, model
    expected = 2 * (4 * tokens * 128 + kept_products(shape, tokens, 4, attention == "eager"))
    assert held[1] - held[0] == pytest.approx(expected, rel=0.01)
