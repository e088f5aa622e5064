"""Liger's kernels: the numbers of plain modules, whose forwards are replaced, and refusals.

By a stand-in; by Liger's own kernels in Triton's interpreter where TRITON_INTERPRET is set and both
can be imported (`make test-liger`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.liger import stand_in
from tests.support.training import LENGTH, VOCABULARY, Setting, build
from train.doctor.inputs import check_start
from train.models.liger import (
    ROTATION,
    check_kernels,
    token_sums,
    use_liger_,
    with_global,
)
from train.recipe.sections.training import Checkpointing
from train.stages.pipeline import run
from train.training import chunked_loss, loop

FUNCTIONS = "liger_kernel.transformers.functional"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted() -> None:
    """Give Triton's interpreter what it lacks: scalars that are floats, and rsqrt."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    others = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return others(value)

    if others.__name__ != converted.__name__:
        interpreter._implicit_cvt = converted
        rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)


@pytest.fixture(params=["stand-in", "liger"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str] | None:
    """How often each kernel was called, which Liger itself does not count."""
    if request.param == "liger":
        if not INTERPRETED:
            pytest.skip("Liger's kernels need Triton's interpreter: make test-liger")
        importlib.import_module(FUNCTIONS)
        interpreted()
        return None
    module, counted = stand_in()
    monkeypatch.setitem(sys.modules, FUNCTIONS, module)
    return counted


def step(setting: Setting, liger: bool, mode: Checkpointing = False, copies: bool = True) -> Any:
    """The loss and the gradients of a micro-batch with positions of documents."""
    model, _ = build(Setting(**{**vars(setting), "checkpointing": mode}))
    names = list(model.state_dict())
    if liger:
        use_liger_(model, rotates_copies=mode == "selective" and copies)
    assert list(model.state_dict()) == names
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(3, -1)
    loss = model(ids, labels=ids, position_ids=positions, use_cache=False).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}
    return loss.detach(), found


SETTINGS = {
    "mha": Setting("ties"),
    "spans": Setting("both"),  # GQA; followers of both kinds
    "compact": Setting("owned", heal=True),
    "dropped": Setting("dropped", heal=True),
    "basis": Setting("basis", heal=True),
    "lora": Setting("ties", lora=3),
}


QUICK: list[tuple[str, Checkpointing]] = [
    ("mha", "selective"),
    ("spans", False),
    ("compact", True),
]
OTHERS = [(name, mode) for name in SETTINGS for mode in (False, True, "selective")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *QUICK,
        *(pytest.param(*c, marks=pytest.mark.more) for c in OTHERS if c not in QUICK),
    ],
)
def test_gradients_are_those_of_plain_modules(
    calls: Counter[str] | None, name: str, mode: Checkpointing
) -> None:
    if calls is None and (mode is True or name in ("dropped", "basis")):
        pytest.skip("an interpreted step takes seconds")
    expected, gradients = step(SETTINGS[name], liger=False, mode=mode)
    loss, found = step(SETTINGS[name], liger=True, mode=mode)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert found.keys() == gradients.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-4, atol=1e-6, msg=key)


def test_each_kernel_is_called_where_its_module_was(calls: Counter[str] | None) -> None:
    if calls is None:
        pytest.skip("Liger counts nothing")
    step(SETTINGS["mha"], liger=True)
    assert calls == {"norm": 9, "swiglu": 4, "rope": 4}
    calls.clear()
    step(SETTINGS["spans"], liger=True)  # of 5 layers one has no rotation, one queries alone
    assert calls == {"norm": 11, "swiglu": 5, "rope": 3}
    calls.clear()
    step(SETTINGS["dropped"], liger=True)  # 2 of 4 layers without attention and the norm before it
    assert calls == {"norm": 7, "swiglu": 4, "rope": 2}
    calls.clear()
    step(SETTINGS["mha"], liger=False)  # another model of the same classes
    assert not calls


def test_products_that_are_kept_are_not_rotated_in_place(calls: Counter[str] | None) -> None:
    """What would be wrong without a copy: the second forward rotates what is rotated."""
    if calls is None:
        pytest.skip("the stand-in shows it")
    _, right = step(SETTINGS["mha"], liger=True, mode="selective")
    _, wrong = step(SETTINGS["mha"], liger=True, mode="selective", copies=False)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert (right[name] - wrong[name]).norm() > 0.1 * right[name].norm()


@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_those_of_plain_torch(calls: Counter[str] | None, tied: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 35, requires_grad=True)
    weight = torch.randn(101, 35, requires_grad=not tied)  # a frozen one has no gradient
    labels = torch.randint(101, (3, 7))
    labels[:, -1] = chunked_loss.IGNORED
    results = []
    for sums in (chunked_loss.token_sums, token_sums):
        total = sums(hidden, weight, labels)
        (total[0] / 18).backward()
        assert total[1].item() == total[0].item()
        results.append((total[0].detach(), hidden.grad, weight.grad))
        hidden.grad = weight.grad = None
    for one, other in zip(*results, strict=True):
        if tied and one is None:
            assert other is None
            continue
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_losses_are_computed_in_the_precision_of_autocast(calls: Counter[str] | None) -> None:
    if calls is None:
        pytest.skip("bf16 is for a GPU")
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_sums(hidden, weight, labels)
    logits = (hidden.bfloat16() @ weight.detach().bfloat16().T).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-6)
    found[0].backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# --- a training -----------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A training with the stand-in, where there is no GPU."""
    module, counted = stand_in()
    monkeypatch.setitem(sys.modules, FUNCTIONS, module)
    monkeypatch.setattr(loop, "check_kernels", lambda recipe, on_gpu: None)
    return counted


def test_a_training_computes_with_it_and_ends_where_another_ends(
    anywhere: Counter[str], tmp_path: Path
) -> None:
    for kernels in ("torch", "liger"):
        # Near-zero gradients must not decide a sign: sums differ in their order.
        recipe = tiny.recipe(tmp_path / kernels, kernels=kernels, eps=1e-4)
        loop.train(tiny.job(recipe), recipe)
    assert anywhere["entropy"] == 12  # of 6 steps of 2 micro-batches
    one, other = (tiny.curve(tmp_path / kernels) for kernels in ("torch", "liger"))
    for row, like in zip(one, other, strict=True):
        assert like == pytest.approx(row, rel=1e-5, nan_ok=True)
    expected, found = (tiny.weights(tmp_path / kernels) for kernels in ("torch", "liger"))
    assert list(found) == list(expected)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_kernels_belong_to_a_training_and_older_ones_had_none(
    anywhere: Counter[str], tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path)
    assert "kernels" not in loop.identity(tiny.job(recipe), recipe)["train"]
    other = tiny.recipe(tmp_path, kernels="liger")
    loop.train(tiny.job(other), other)
    with pytest.raises(PostshareError, match=r"train.kernels was 'liger', now None"):
        loop.train(tiny.job(recipe), recipe)


def test_losses_of_a_teacher_are_by_chunks(anywhere: Counter[str], tmp_path: Path) -> None:
    from train.distributed.engines.start import start
    from train.training.objective import Lessons, Objective

    setting = Setting("ties", distill=(("weight", 0.5),))
    recipe = setting.recipe()
    fast = recipe.model_copy(update={"train": recipe.train.model_copy(update={"kernels": "liger"})})
    ids = torch.randint(VOCABULARY, (48, LENGTH), generator=torch.Generator().manual_seed(2))
    totals: list[Tensor] = []
    for asked in (recipe, fast):
        model, optimizer = build(setting)
        if asked is fast:
            use_liger_(model)
        engine = start(asked)
        engine.prepare(model, optimizer)
        lessons = Lessons(asked, engine, None, 0)  # type: ignore[arg-type]
        total, _ = Objective(engine, model, asked, 1.0, lessons)({"input_ids": ids, "labels": ids})
        totals.append(total.detach())
        engine.close()
    assert anywhere["norm"] == 9
    assert anywhere["entropy"] == 0
    torch.testing.assert_close(*totals)


# --- refusals -------------------------------------------------------------------------------------


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_kernels(tiny.recipe(tmp_path), on_gpu=False)
    asked = tiny.recipe(tmp_path / "run", kernels="liger")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = r"needs an NVIDIA GPU.*use train.kernels=torch"
    with pytest.raises(PostshareError, match=without):
        run(asked)  # its model is no folder: that would be the error of loading it
    with pytest.raises(PostshareError, match=without):
        loop.train(tiny.job(asked), asked)
    assert not asked.folder.exists()
    assert any("NVIDIA GPU" in finding.found + finding.cure for finding in check_start(asked, 1))
    # The training's device decides, not the machine's.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PostshareError, match=without):
        check_kernels(asked, on_gpu=False)
    monkeypatch.setitem(sys.modules, FUNCTIONS, None)
    with pytest.raises(PostshareError, match=r"needs liger-kernel.*pip install 'postshare.gpu.'"):
        check_kernels(asked, on_gpu=True)


def test_an_activation_that_it_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUNCTIONS, stand_in()[0])
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, num_hidden_layers=1, hidden_act="gelu", **sizes)
    )
    with pytest.raises(PostshareError, match=r"the model's activation is gelu"):
        use_liger_(model)


def test_a_function_without_the_name_is_not_rebound() -> None:
    assert with_global(LlamaAttention.forward, ROTATION, None).__globals__[ROTATION] is None
    assert LlamaAttention.forward.__globals__[ROTATION] is not None
    with pytest.raises(AssertionError, match=r"does not call nothing"):
        with_global(LlamaAttention.forward, "nothing", None)
