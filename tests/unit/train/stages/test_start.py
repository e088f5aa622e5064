"""The start of a run: what is said, refused and locked before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from tests.support.demo_runs import recipe
from train.common.run_files import PLAN_FILE
from train.recipe.recipe import Recipe, load_recipe
from train.stages import precision
from train.stages.lock import LOCK_FILE, lock, unlock
from train.stages.start import begin

LOCKING = """
from pathlib import Path
from train.stages.lock import announce, lock
lock(Path({folder!r}))
announce(Path({folder!r}))
print("held", flush=True)
input()
"""


def test_a_second_start_in_a_folder_is_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    made.folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKING.format(folder=str(made.folder))],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(PostshareError, match=f"in use by process {holder.pid} on"):
        begin(made)
    assert [file.name for file in made.folder.iterdir()] == [LOCK_FILE]
    holder.communicate("\n")
    with begin(made):
        assert (made.folder / "recipe.yaml").is_file()


def test_the_folder_is_free_after_the_command(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    for _ in range(2):
        with begin(made):
            assert held_by_this_process(made.folder)
        assert not held_by_this_process(made.folder)
    with pytest.raises(PostshareError, match="no finished training"), begin(made, requires=refuse):
        pass
    assert not held_by_this_process(made.folder)


def refuse(_: object) -> None:
    raise PostshareError("no finished training")


def held_by_this_process(folder: Path) -> bool:
    code = LOCKING.format(folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, input=b"\n"
    )
    assert done.returncode == 0 or b"is in use by process" in done.stderr
    return done.returncode != 0


def test_a_lock_that_is_held_already_is_kept(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    made.folder.mkdir()
    lock(made.folder)
    with begin(made):
        pass
    assert held_by_this_process(made.folder)
    unlock(made.folder)


def test_a_sequence_longer_than_the_model_is_warned_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = str(tmp_path / "text.txt")
    data = {"train": text, "validation": text, "sequence_length": 513}
    with begin(recipe(tmp_path / "run", data=data)):
        pass
    assert "warning: data.sequence_length 513 exceeds the 512 positions" in capfd.readouterr().err
    data["sequence_length"] = 512
    with begin(recipe(tmp_path / "other", data=data)):
        pass
    assert "exceeds" not in capfd.readouterr().err


# --- what it computes in --------------------------------------------------------------------------


def in_precision(folder: Path, name: str) -> Recipe:
    section = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    return recipe(folder, train={**section, "precision": name})


def on_hardware(monkeypatch: pytest.MonkeyPatch, has: bool, factor: float = 16.24) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    monkeypatch.setattr(precision, "bf16_factor", lambda device: factor)


@pytest.mark.parametrize(
    ("has", "becomes", "said"),
    [
        (False, "fp32", "train.precision fp32, the hardware has no bf16 instructions"),
        (True, "bf16", "train.precision bf16, the hardware has bf16 instructions"),
    ],
    ids=["without", "with"],
)
def test_auto_is_what_the_hardware_has_and_the_recipe_says_so(
    has: bool,
    becomes: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on_hardware(monkeypatch, has)
    with begin(in_precision(tmp_path / "run", "auto"), trains=True) as current:
        assert current.recipe.train.precision == becomes
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.precision == becomes
    assert capfd.readouterr().err.count(f"note: precision auto: {said}\n") == 1


def test_a_run_keeps_what_auto_was_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = in_precision(tmp_path / "run", "auto")
    on_hardware(monkeypatch, has=True)
    with begin(asked, trains=True):
        (asked.folder / "run.json").write_text("{}")
    on_hardware(monkeypatch, has=False)  # another machine goes on
    for trains in (True, False):
        capfd.readouterr()
        with begin(asked, trains=trains) as current:
            assert current.recipe.train.precision == "bf16"
        said = capfd.readouterr().err
        assert f"train.precision bf16, as in the run that {asked.folder} holds" in said
        assert ("bf16 is emulated" in said) is trains
    with pytest.raises(PostshareError, match=r"train\.precision was 'bf16', now 'fp32'"):
        begin(in_precision(asked.folder, "fp32"), trains=True)


def test_a_plan_that_was_found_elsewhere_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = in_precision(tmp_path / "run", "auto")
    on_hardware(monkeypatch, has=False)
    with begin(asked) as current:  # `postshare plan`: another machine may train it
        assert current.recipe.train.precision == "auto"
    (asked.folder / PLAN_FILE).write_text("{}")
    on_hardware(monkeypatch, has=True)
    for trains in (True, False):
        with begin(asked, trains=trains):
            assert (asked.folder / PLAN_FILE).is_file()


@pytest.mark.parametrize(
    ("asked", "has", "factor", "warned"),
    [
        ("bf16", False, 16.24, True),
        ("bf16", False, 1.1, False),
        ("bf16", True, 16.24, False),
        ("fp32", False, 16.24, False),
    ],
    ids=["slow", "emulated-and-quick", "native", "fp32"],
)
def test_emulated_bf16_is_one_warning_with_the_factor(
    asked: str,
    has: bool,
    factor: float,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on_hardware(monkeypatch, has, factor)
    with begin(in_precision(tmp_path / "run", asked), trains=True):
        pass
    said = (
        "warning: bf16 is emulated (train.precision), the hardware has no bf16 instructions: a "
        "linear layer takes 16.2 times as long as in fp32; set train.precision=fp32, or auto\n"
    )
    assert capfd.readouterr().err.count(said) == warned
