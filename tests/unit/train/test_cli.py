from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import train.stages
from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from train.cli import app, launched, main
from train.common.signals import TrainingStopped
from train.recipe.recipe import Recipe

STAGES = ("run", "plan", "export", "evaluate", "prepare")


class FakePipeline(SimpleNamespace):
    """Stands in for train.stages.pipeline: notes what is called, or raises."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.calls: list[tuple[str, Recipe]] = []

        def stage(name: str, recipe: Recipe) -> None:
            self.calls.append((name, recipe))
            if raises is not None:
                raise raises

        super().__init__(**{n: lambda recipe, n=n: stage(n, recipe) for n in STAGES})


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    return install(monkeypatch, FakePipeline())


def install(monkeypatch: pytest.MonkeyPatch, fake: FakePipeline) -> FakePipeline:
    monkeypatch.setitem(sys.modules, "train.stages.pipeline", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(train.stages, "pipeline", fake, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return fake


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("name", STAGES)
def test_a_command_calls_its_stage_with_the_resolved_recipe(
    pipeline: FakePipeline, name: str
) -> None:
    assert exit_code(name, "demo_postshare", "train.steps=7", "plan.budget.ratio=0.2") == 0
    ((called, recipe),) = pipeline.calls
    assert called == name
    assert recipe.train.steps == 7
    assert recipe.plan.budget is not None
    assert recipe.plan.budget.ratio == 0.2


def test_python_m_train_is_postshare_run(pipeline: FakePipeline) -> None:
    with pytest.raises(SystemExit) as caught:
        launched(["recipes/demo.yaml", "seed=3"])
    assert caught.value.code == 0
    assert [(name, recipe.seed) for name, recipe in pipeline.calls] == [("run", 3)]


def test_bad_input_is_one_line_and_exit_code_2(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("run", "demo", "train.lerning_rate=1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: demo: unknown key train.lerning_rate; did you mean train.learning_rate?\n"
    )
    assert pipeline.calls == []


def test_several_faults_are_a_line_each_and_exit_code_2(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("run", "demo", "train.lerning_rate=1", "train.batch_size=0", "seed") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: demo: 3 faults",
        "  'seed' is no override; write key=value, such as train.steps=10",
        "  unknown key train.lerning_rate; did you mean train.learning_rate?",
        "  train.batch_size is 0; allowed: a whole number >= 1",
    ]
    assert pipeline.calls == []


def test_an_error_of_a_stage_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, FakePipeline(PostshareError("the disk is full; free some space")))
    assert exit_code("run", "demo") == 2
    assert capsys.readouterr().err == "error: the disk is full; free some space\n"


def test_every_rank_fails_and_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, FakePipeline(PostshareError("cause; cure")))
    monkeypatch.setenv("RANK", "1")
    assert exit_code("run", "demo_postshare", "penalty.projections=[q, k]") == 2
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = TrainingStopped(step=3, steps=9, checkpoint=Path("runs/x/step-3"), world=1)
    install(monkeypatch, FakePipeline(stop))
    assert exit_code("run", "demo") == 130
    assert capsys.readouterr().err.startswith("stopped after step 3 of 9, saved runs/x/step-3; ")
    install(monkeypatch, FakePipeline(KeyboardInterrupt()))
    assert exit_code("run", "demo") == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePipeline(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "demo"])


def test_warnings_come_before_the_run(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("run", "demo_postshare", "penalty.projections=[q, k]") == 0
    assert capsys.readouterr().err.startswith("warning: v will be shared without having been")


@pytest.mark.parametrize("command", ["run", "prepare"])
def test_a_train_of_ones_own_is_warned_about(
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    for variable in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    assert exit_code(command, "demo") == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "train.py").touch()
    assert exit_code(command, "demo") == 0
    assert capsys.readouterr().err == (
        "warning: train.py is what `-m train` runs in this folder, not postshare; to start several "
        "processes here: accelerate launch ... --no_python postshare run RECIPE\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher has started us
    assert exit_code(command, "demo") == 0
    assert capsys.readouterr().err == ""


def test_a_dry_run_needs_no_network_and_writes_nothing(
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert exit_code("run", "llama2-7b-postshare-30", "--dry-run", "seed=5") == 0
    out = capsys.readouterr().out
    assert "seed: 5" not in out
    assert "6,738,415,616" in out
    assert "307 of 1,024 units" in out
    assert exit_code("run", "llama2-7b-postshare-30", "--dry-run", "--full", "seed=5") == 0
    assert "seed: 5" in capsys.readouterr().out
    assert (pipeline.calls, list(tmp_path.iterdir())) == ([], [])


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, FakePipeline(OSError(errno.ENOSPC, "No space left on device", "run.log")))
    assert exit_code("run", "demo") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no space is left ([Errno 28] No space left on device: 'run.log'")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run"], "RECIPE"),
        (["rnu", "demo"], "No such command 'rnu'"),
        (["run", "demo", "--gpus", "2"], "--gpus goes with --dry-run"),
        (["run", "demo", "--dry-run", "--gpus", "0"], "--gpus"),
        (["run", "demo", "--full"], "--full, --speed, --chip and --mfu go with --dry-run"),
        (["run", "demo", "--fast"], "--fast"),
        (["run", "demo", "--dry-run", "--chip", "H100", "--speed", "5"], "give one of them"),
        (["run", "demo", "model.path=my model", "--dry-run"], "is no hub name (owner/name)"),
        (["quantize", "", "--output", "q"], "MODEL is empty"),
        (["pack", "nope", "p", "--bytes", "9"], "give the folder of one, such as RUN/export/ad"),
    ],
)
def test_misuse_is_exit_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert part in capsys.readouterr().err


def test_alone_it_says_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code() == 0
    assert capsys.readouterr().out.startswith("postshare run demo ")


def test_recipes_lists_every_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("recipes") == 0
    out = capsys.readouterr().out
    for file in (REPOSITORY / "recipes").rglob("*.yaml"):
        assert f"{file.stem} " in out
    assert "DirectShare on Llama-2-7B, 10 % of the heads" in out


def test_a_recipe_is_printed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("recipes", "demo") == 0
    printed = capsys.readouterr().out
    written = (REPOSITORY / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    assert printed == written.split("\n", 1)[1]  # without the first line, the editor's
    mine = tmp_path / "mine.yaml"
    assert exit_code("recipes", "demo", "--copy", str(mine)) == 0
    assert mine.read_text(encoding="utf-8") == printed
    assert str(mine) in capsys.readouterr().out
    latin, plain = tmp_path / "latin.yaml", tmp_path / "plain"
    latin.write_bytes("# für\n".encode("latin-1"))
    plain.write_text(printed)
    for arguments, said in (
        (("demo", "--copy", str(mine)), "exists; choose another name"),
        (("demo", "--copy", str(tmp_path / "no" / "mine.yaml")), "cannot be written (No such file"),
        (("demp",), "did you mean demo?"),
        ((str(mine)[:-5],), f"did you mean {mine}?"),
        ((str(latin),), "cannot be read ('utf-8' codec"),
        ((str(plain),), "the name of a recipe file ends in .yaml; rename it"),
        (("--copy", str(mine)), "name the recipe"),
    ):
        assert exit_code("recipes", *arguments) == 2
        assert said in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert capsys.readouterr().out == f"postshare {pyproject['project']['version']}\n"


@pytest.mark.parametrize("name", [command.callback.__name__ for command in app.registered_commands])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(name, "--help") == 0
    assert f"Example: postshare {name}" in capsys.readouterr().out


def test_help_is_immediate() -> None:
    code = (
        "import sys; from train import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.splitlines()[-1] == "[]"
    # 0.2 s of a core, whatever else the machine does; torch alone takes several times the bound.
    assert min(seconds) < 1.0


def test_the_wheel_carries_all_that_a_user_needs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the wheel is built without the network")
    wheel = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*wheel, *options, str(REPOSITORY)], check=True, timeout=120)
    (built,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(built).extractall(site)

    def files(folder: Path) -> set[str]:
        return {
            f.relative_to(folder).as_posix()
            for f in folder.rglob("*")
            if f.is_file() and "__pycache__" not in f.parts
        }

    for kind in ("recipes", "launch"):
        assert files(site / "train" / "_shipped" / kind) == files(REPOSITORY / kind)
    for folder in ("demo", "report"):
        assert files(site / "train" / folder) == files(REPOSITORY / "train" / folder)
    assert (site / "train" / "_shipped" / "docs" / "recipe.schema.json").is_file()
    assert "postshare = train.cli:main" in next(site.glob("*/entry_points.txt")).read_text()
    # Outside a checkout; the unpacked wheel comes before the editable installation.
    code = (
        "from train import cli\nfrom train.recipe import load as recipe_source\n"
        "print(recipe_source.locate('recipes/demo.yaml'))\n"
        "cli.main(['recipes'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found, *lines = done.stdout.splitlines()
    assert Path(found) == site / "train" / "_shipped" / "recipes" / "demo.yaml"
    assert any(line.startswith("llama2-13b-postshare-30 ") for line in lines)
