"""The doctor under the launcher, as users start it, and with what only a cluster can have wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.launcher import Launch, launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("doctor_worker.py")


def doctor(config: str, folder: Path, *overrides: str) -> Launch:
    arguments = ("doctor", "recipes/demo_postshare.yaml", f"output_dir={folder}", *overrides)
    return launch(config, "-m", "train", *arguments, timeout=500)


def with_fault(fault: str, folder: Path, patience: float = 60) -> Launch:
    arguments = ("recipes/demo_postshare.yaml", "--patience", patience, f"output_dir={folder}")
    return launch("ddp", WORKER, fault, *map(str, arguments), timeout=120)


def text(result: Launch) -> str:
    """The table in one line: cells wrap, and every line begins with its rank."""
    lines = (re.sub(r"^\[default\d\]:", "", line) for line in result.output.splitlines())
    return " ".join(" ".join(lines).split())


@pytest.mark.more
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_sound_launch_is_go(config: str, tmp_path: Path) -> None:
    result = doctor(config, tmp_path / "x")
    assert not result.failed, result.report()
    said = text(result)
    assert said.count("go: 0 problems") == 1, "one table, by the main process"
    assert "2 ranks joined (gloo)" in said
    assert "the same folder on all ranks" in said
    assert "the same on all ranks: python" in said
    # The largest that was timed: on a busy machine the probe stops before 64 MiB.
    rate = re.search(r"\d MiB in [\d.]+ ms: ([\d.]+) (MB|GB)/s over each link", said)
    assert rate, result.report()
    seconds = re.search(r"gradients of a step: ([\d.]+) MB, ([\d.e-]+) s", said)
    assert seconds, result.report()
    # DDP: 2 (n - 1) / n x 4 bytes x 1,869,952; ZeRO-3 reduce-scatters half of it, for each forward.
    assert float(seconds[1]) == {"ddp": 7.5, "zero3": 3.7}[config]
    per_second = float(rate[1]) * {"MB": 1.0, "GB": 1e3}[rate[2]]
    assert float(seconds[2]) == pytest.approx(float(seconds[1]) / per_second, rel=0.1)
    assert list(tmp_path.iterdir()) == []


def test_node_local_folders_and_a_world_of_one_are_no_go_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "x-1").mkdir()
    result = with_fault("node_local_and_alone", tmp_path / "x")
    said = text(result)
    assert result.failed
    assert re.search(r"exitcode +: 2 ", result.output), result.report()
    assert "is not the same folder on rank 1" in said, result.report()
    assert "cure: set output_dir to an absolute path on a file system that all hosts mount" in said
    assert "2 processes were launched but each sees a world of 1" in said, result.report()
    assert "no-go: 2 problems, 0 warnings" in said
    assert [p.name for p in tmp_path.rglob("*")] == ["x-1"]
