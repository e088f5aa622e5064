"""Compiled layers: the numbers of layers that are not, what is compiled, what is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from sa_models.calibration import logit_chunks
from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.interruption import at_step, stop
from tests.support.training import VOCABULARY, Setting, build
from tests.support.training import train as train_setting
from train.distributed.engines.start import start
from train.distributed.watchdog import Watchdog
from train.models.compiled_layers import compile_errors, compile_layers, release_compiled
from train.tracking.metrics_log import read_rows
from train.training.loop import TrainingStopped, train


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    counters.clear()
    yield
    torch.compiler.reset()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each weight's norm."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = float((found[name] - weight).norm())
        assert difference <= 1e-5 * float(weight.norm()), f"{name}: {difference:.1e}"


def test_a_training_is_the_same_to_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a penalty and accumulation; validated, in other shapes, without being compiled."""
    phases, real, models = [], Watchdog.note, {}

    def note(self: Watchdog, phase: str, *arguments: Any, **options: Any) -> None:
        phases.append(phase)
        real(self, phase, *arguments, **options)

    monkeypatch.setattr(Watchdog, "note", note)
    for on in (False, True):
        recipe = tiny.recipe(tmp_path / str(on), steps=4, eps=1e-4, compile=on, evaluate_every=2)
        models[on] = tiny.model()
        phases.clear()
        began = time.perf_counter()
        train(tiny.job(recipe, model=models[on]), recipe)
        if not on:
            assert "compil" not in capsys.readouterr().err
            assert not counters["stats"]
    took = time.perf_counter() - began
    assert phases[:2] == ["compiling the layers", "reading data"]
    assert read_rows(tmp_path / "True" / "metrics.jsonl")[-1]["seconds"] < took / 2
    assert counters["stats"]["unique_graphs"] == 1  # of two layers of one structure
    assert not counters["graph_break"]
    said = capsys.readouterr().err
    assert "post: layers compiled in " in said
    assert said.index("compiled in") < said.index("post 1/4")
    assert_close(tiny.weights(tmp_path / "True"), tiny.weights(tmp_path / "False"))
    for one, other in zip(
        tiny.curve(tmp_path / "True"), tiny.curve(tmp_path / "False"), strict=True
    ):
        validated = ("validation_loss",) if one["step"] % 2 == 0 else ()
        for key in ("lm_loss", "penalty", "gradient_norm", *validated):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
    for model in models.values():
        assert not any("forward" in vars(module) for module in model.modules())


class Doubled(GradientCheckpointingLayer):
    """The smallest layer that there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    layer = Doubled().train()
    compile_layers(layer)
    with pytest.raises(PostshareError) as caught, absent, compile_errors():
        layer(torch.ones(3))
    text = str(caught.value)
    assert text.startswith("train.compile: a layer cannot be compiled (InvalidCxxCompiler: No work")
    assert text.endswith("; install what it needs, or set train.compile=false")
    assert "\n" not in text


def test_a_shape_too_many_is_an_error() -> None:
    """Not a layer that silently goes on without being compiled; in evaluation any shape goes."""
    layer = Doubled().train()
    compile_layers(layer)
    limited = torch._dynamo.config.patch(recompile_limit=1)
    with limited, compile_errors():
        assert torch.equal(layer(torch.ones(3)), torch.full((3,), 2.0))
    too_many = r"again and again.*train\.compile=false"
    with limited, pytest.raises(PostshareError, match=too_many), compile_errors():
        layer(torch.ones(4))
    layer.eval()
    assert torch.equal(layer(torch.ones(5)), torch.full((5,), 2.0))
    assert counters["stats"]["unique_graphs"] == 1
    release_compiled(layer)
    assert torch.equal(layer.train()(torch.ones(6)), torch.full((6,), 2.0))


def test_what_cannot_be_compiled_is_an_error() -> None:
    class Printing(Doubled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    layer = Printing().train()
    compile_layers(layer)
    reason = r"cannot be compiled \(Unsupported"
    with pytest.raises(PostshareError, match=reason) as caught, compile_errors():
        layer(torch.ones(3))
    assert "\n" not in str(caught.value)


SETTINGS = {
    "mha": Setting("ties", accumulation=2, checkpointing=True),
    "spans": Setting("both", checkpointing="selective"),
    "untied": Setting("spans", checkpointing=2),
    "compact": Setting("owned", heal=True, checkpointing="selective"),
    "removed": Setting("removed", heal=True),
    "dropped": Setting("dropped", heal=True, checkpointing=True),
    "basis": Setting("basis", heal=True),
    "basis, selective": Setting("basis", heal=True, checkpointing="selective"),
    "healed spans": Setting("both", heal=True),
    "residuals": Setting("owned", heal=True, residual="both", checkpointing=True),
    "lora": Setting("ties", lora=3, checkpointing="selective"),
    "chunked": Setting("both", chunk=7),
    "taught": Setting("ties", distill=(("temperature", 2.0), ("hidden_weight", 0.3))),
}


def chunked(setting: Setting) -> AbstractContextManager[Any]:
    if not setting.chunk:
        return nullcontext()
    return patch.object(logit_chunks, "CHUNK_ELEMENTS", setting.chunk * VOCABULARY)


@pytest.mark.more
@pytest.mark.timeout(600)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_plan_and_way_of_checkpointing(setting: Setting) -> None:
    """Three steps of each, in sizes that divide by nothing."""
    found = {}
    for on in (False, True):
        engine = start(setting.recipe())
        model, optimizer = build(setting)
        if on:
            compile_layers(model)
        engine.prepare(model, optimizer)
        with chunked(setting):  # a teacher is compiled as the recipe says
            rows = train_setting(engine, replace(setting, compiled=on))
        found[on] = rows, {n: w.clone() for n, w in engine.full_weights()}
        engine.close()
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(found[True][1], found[False][1])
    for one, other in zip(found[True][0], found[False][0], strict=True):
        for key in ("lm", "penalty", "norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)


@pytest.mark.more
@pytest.mark.timeout(600)
def test_resuming_is_exact(tmp_path: Path) -> None:
    """With dropout too, whose random numbers are those of layers that are not compiled."""
    for name in ("whole", "stopped"):
        recipe = tiny.recipe(
            tmp_path / name, steps=4, eps=1e-4, compile=True, gradient_checkpointing=True
        )
        job = tiny.job(recipe, model=tiny.model(attention_dropout=0.1))
        if name == "stopped":
            with at_step(2, stop), pytest.raises(TrainingStopped):
                train(job, recipe)
            job = replace(job, load=lambda: tiny.model(attention_dropout=0.1))
        train(job, recipe)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    recipe = tiny.recipe(tmp_path / "eager", steps=4, eps=1e-4, gradient_checkpointing=True)
    train(tiny.job(recipe, model=tiny.model(attention_dropout=0.1)), recipe)
    assert_close(tiny.weights(tmp_path / "eager"), tiny.weights(tmp_path / "whole"))


@pytest.mark.more
def test_a_run_may_go_on_compiled(tmp_path: Path) -> None:
    """What it began without: the numbers differ by rounding alone."""
    ways = {"eager": (False, False), "then": (False, True), "back": (True, False)}
    for name, (first, second) in ways.items():
        recipe = tiny.recipe(tmp_path / name, steps=4, eps=1e-4, compile=first)
        job = tiny.job(recipe)
        with at_step(3, stop), pytest.raises(TrainingStopped):
            train(job, recipe)
        recipe = tiny.recipe(tmp_path / name, steps=4, eps=1e-4, compile=second)
        train(tiny.job(recipe), recipe)
    for name in ("then", "back"):
        assert_close(tiny.weights(tmp_path / name), tiny.weights(tmp_path / "eager"))
