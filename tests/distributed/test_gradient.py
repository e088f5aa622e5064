"""One gradient on every backend: penalty and LM loss, clipped, against a single process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.gradient_worker import SETTINGS
from tests.distributed.harness import run
from tests.distributed.training import build

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("gradient_worker.py")
BACKENDS = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3", 3)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run("cpu", WORKER, folder)
    return folder


@pytest.mark.parametrize(("config", "processes"), BACKENDS)
def test_weights_equal_those_of_one_process(
    config: str, processes: int, single: Path, tmp_path: Path
) -> None:
    output = run(config, WORKER, tmp_path, processes=processes)
    assert output.count("divergence found") == (0 if config == "zero3" else processes)
    rows = json.loads((tmp_path / "rows.json").read_text())
    expected = json.loads((single / "rows.json").read_text())
    for name, setting in SETTINGS.items():
        own, reference = load_file(tmp_path / name), load_file(single / name)
        start = dict(build(setting)[0].named_parameters())
        assert own.keys() == reference.keys() == start.keys()
        for key, value in reference.items():
            difference = float((own[key] - value).norm())
            assert difference <= 1e-4 * float(value.norm()), f"{name} {key}: {difference}"
            # Relative to how far training has moved the weight, so that no update can hide.
            moved = float((value - start[key].detach()).norm())
            assert difference <= 1e-2 * moved + 1e-7, f"{name} {key}: {difference} of {moved}"
        if setting.precision == "bf16":
            continue
        for one, other in zip(rows[name], expected[name], strict=True):
            for quantity in ("lm", "penalty", "norm"):
                assert one[quantity] == pytest.approx(other[quantity], rel=1e-4), quantity
        torch.testing.assert_close(
            torch.tensor([row["distance"] for row in rows[name]]),
            torch.tensor([row["distance"] for row in expected[name]]),
            rtol=1e-4,
            atol=1e-6,
            equal_nan=True,
        )


def test_clipping_and_penalty_matter_in_these_settings(single: Path) -> None:
    """The comparison above would pass for anything if the norm never exceeded the threshold."""
    rows = json.loads((single / "rows.json").read_text())["clipped"]
    assert all(row["norm"] > 0.5 for row in rows)
    assert rows[-1]["penalty"] < rows[0]["penalty"]
