"""`postshare quantize`, and what `postshare evaluate` says of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import small_models
from train.cli import main
from train.evaluation.models import find_models

pytest.importorskip("torchao", reason="pip install 'postshare[quantize]'")


def command(*arguments: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_a_quantized_folder_is_judged_by_the_values_and_bytes_that_it_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_models.dense(tmp_path / "base")
    folder, text, output = tmp_path / "int8", tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(20 * small_models.TEXT)
    assert command("quantize", base, "--output", folder) == 0
    stored = load_file(folder / "model.safetensors")
    size = sum(tensor.nbytes for tensor in stored.values())
    whole = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    said = " ".join(capsys.readouterr().out.split())
    assert f"{size:,} bytes ({size / whole:.1%} of {whole:,})" in said

    weight = find_models([str(folder)])[0].load(torch.float32, torch.device("cpu"))
    name = "model.layers.1.mlp.down_proj."
    expected = stored[f"{name}_weight_qdata"].float() * stored[f"{name}_weight_scale"]
    assert torch.equal(weight.get_submodule(name[:-1]).weight, expected)

    options = ("--text", text, "--output", output, "--cache", tmp_path / "cache")
    assert command("evaluate", base, folder, *options) == 0
    of_base, of_int8 = (model["scores"] for model in json.loads(output.read_text())["models"])
    values = {score["metric"]: score["value"] for score in of_int8}
    assert values["bytes"] == size
    assert values["parameters"] == of_base[0]["value"]
    assert 0 < abs(values["token-level"] / of_base[2]["value"] - 1) < 0.02

    assert command("evaluate", folder, "--tasks", "speed") == 2
    assert "remove speed from --tasks" in capsys.readouterr().err
