"""The command line. Heavy imports wait until a command needs them: `--help` answers at once."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from train.commands import options
from train.commands.completion import complete_recipe
from train.commands.options import OverridesArgument, RecipeArgument
from train.common.exit_codes import ExitCode
from train.common.imports import large_imports
from train.common.signals import Interrupted, TrainingStopped, exit_code, received, watching

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

app = typer.Typer(
    name="postshare",
    help="Post-train a Llama so that its attention heads can be shared; ship the smaller model.",
    epilog="First: postshare run demo   (the whole pipeline on a small model, minutes on a CPU)",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"postshare {metadata.version('postshare')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _welcome(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(
            "postshare run demo          the whole pipeline on a small model: start here\n"
            "postshare recipes           the shipped recipes\n"
            "postshare run R --dry-run   what a recipe will do, save and need\n"
            "postshare --help            all commands"
        )


@app.command(epilog="Example: postshare run demo train.steps=50 output_dir=runs/short")
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print what it saves, needs and takes."),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: GPUs to estimate for (default: up to 8)."),
    ] = None,
    speed: options.Speed = None,
    chip: options.Chip = None,
    mfu: options.Utilization = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --dry-run: also the whole resolved recipe.")
    ] = False,
) -> None:
    """Run all stages: plan, train, export, evaluate, report. Finished stages are skipped."""
    if gpus is not None and not dry_run:
        raise typer.BadParameter("--gpus goes with --dry-run; accelerate launch sets the processes")
    if speed is not None and chip is not None:
        raise typer.BadParameter("--speed is of your machine, --chip of another; give one of them")
    if not dry_run and (full or (speed, chip, mfu) != (None, None, None)):
        raise typer.BadParameter("--full, --speed, --chip and --mfu go with --dry-run")
    loaded = _load(recipe, overrides)
    if dry_run:
        from train.estimate.dry_run import print_dry_run
        from train.estimate.throughput import Assumed

        print_dry_run(loaded, gpus, full=full, assumed=Assumed(speed, chip, mfu))
        return
    _warn(loaded)
    _warn_of_hiding()
    _stage("run", loaded)


@app.command(epilog="Example: postshare plan demo plan.budget.ratio=0.2")
def plan(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Find the sharing plan, print it and draw it. Nothing is trained."""
    loaded = _load(recipe, overrides)
    _stage("plan", loaded)


@app.command(epilog="Example: postshare export demo export.dtype=bfloat16")
def export(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Export a finished training: compact and dense, verified."""
    loaded = _load(recipe, overrides)
    _stage("export", loaded)


@app.command(
    epilog="Example: postshare evaluate runs/demo --tasks perplexity,speed   (or: postshare "
    "evaluate demo evaluate.blocks=64)"
)
def evaluate(
    arguments: options.ModelsOrRecipe,
    tasks: options.Tasks = None,
    text: options.PerplexityText = None,
    context: options.Window = None,
    stride: options.Stride = None,
    data: options.TaskData = None,
    limit: options.Limit = None,
    fewshot: options.FewShot = None,
    batch_size: options.BatchSize = None,
    dtype: options.DType = None,
    device: options.Device = None,
    output: options.Results = None,
    cache: options.Cache = None,
) -> None:
    """Compare models side by side. With a RECIPE: evaluate the models of its own run."""
    given = {
        "--tasks": tasks, "--text": text, "--context": context, "--stride": stride, "--data": data,
        "--limit": limit, "--fewshot": fewshot, "--batch-size": batch_size, "--dtype": dtype,
        "--device": device, "--output": output, "--cache": cache,
    }  # fmt: skip
    from train.commands.evaluate.command import is_stage

    if is_stage(arguments, given):
        _stage("evaluate", _load(arguments[0], arguments[1:]))
        return
    from train.commands.evaluate.side_by_side import compare_models, read_options

    compare_models(arguments, read_options(given))


@app.command(epilog='Example: postshare generate runs/demo --prompt "def main():" --tokens 50')
def generate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Run folders, model folders or hub names."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to go on with; may be repeated (default: three)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most to add to a prompt.")] = 32,
    device: options.Device = None,
) -> None:
    """Let models continue prompts, before and after sharing. Each takes the likeliest token."""
    from train.commands.generate import generate

    generate(models, prompt, tokens, device)


@app.command(
    epilog="Example: postshare quantize runs/demo/export/compact --to int8 --output runs/demo/int8"
)
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a Llama or an export, or a hub name.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    to: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(min=2, help="Of int4: inputs of a row that share a scale (default: 32)."),
    ] = None,
) -> None:
    """Round the weights of a model to int8 or int4. `evaluate` compares the result."""
    from train.commands.quantize import quantize_model

    quantize_model(model, output, to, group_size)


@app.command(epilog="Example: postshare gguf runs/mine/export/compact --to q8_0")
def gguf(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a Llama or an export, or a hub name.")
    ],
    to: Annotated[str, typer.Option(help="f32, f16, bf16, q8_0, q4_0 or q4_1.")] = "f16",
    output: Annotated[
        Path | None, typer.Option(help="File to make (default: MODEL-TO.gguf).")
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of how text is cut, where it is not found."),
    ] = None,
) -> None:
    """Write a model as one GGUF file for llama.cpp, verified. Removed heads are not in it."""
    from train.commands.gguf import write_gguf

    write_gguf(model, output, to, pre)


@app.command(epilog="Example: postshare report runs/demo runs/twenty --output report.html")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Run folders; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (default: RUN/report.html; of several, report.html)."),
    ] = None,
) -> None:
    """Write report.html of a run, or one that compares several. They need not be finished."""
    from train.report.page import write_report

    typer.echo(f"report    {write_report(runs, output)}")


@app.command(epilog="Example: postshare analyze demo-base --text stdlib --sensitivity")
def analyze(
    model: options.AnalyzedModel,
    text: options.AnalyzedText = None,
    output: options.AnalysisFolder = None,
    blocks: options.Blocks = None,
    context: options.BlockTokens = None,
    score: options.Score = "qk",
    sensitivity: options.Sensitivity = False,
    device: options.Device = None,
) -> None:
    """Measure how alike heads and layers of a Llama are. No training: a table and pictures."""
    from train.commands.analyze.command import AnalyzeOptions
    from train.commands.analyze.command import analyze as run_analysis

    run_analysis(model, AnalyzeOptions(text, output, blocks, context, score, sensitivity, device))


@app.command(epilog="Example: postshare push runs/demo/export/compact me/small-llama --dry-run")
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An export; of a run, its compact export.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Such as me/small-llama.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Verify and list what would be uploaded; needs no network."),
    ] = False,
) -> None:
    """Upload an export and its model card to the hub. Every hash is compared first."""
    from train.commands.push import push as upload

    upload(folder, repo_id, private, dry_run)


@app.command(epilog="Example: postshare compare demo --seeds 3")
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings of each model, each with another seed.")
    ] = 1,
    controls: Annotated[
        str | None,
        typer.Option(help="Only these, separated by commas (default: all that exist)."),
    ] = None,
) -> None:
    """Train a recipe and its controls on the same tokens. One table, one Pareto plot."""
    loaded = _load(recipe, overrides)
    from train.commands.compare.command import compare

    compare(loaded, seeds, None if controls is None else controls.split(","))


@app.command(epilog="Example: postshare pack runs/mine/export/adapter small --bytes 25%")
def pack(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Folder of an adapter, such as RUN/export/adapter."),
    ],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")],
    size: Annotated[
        str,
        typer.Option("--bytes", help="Most bytes of the file: a number, or a share such as 25%."),
    ],
) -> None:
    """Store a residual's adapter in mixed precision. Larger singular values get more bits."""
    from train.commands.pack import pack_folder

    typer.echo(pack_folder(adapter, output, size))


@app.command(epilog="Example: postshare unpack small adapter")
def unpack(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="What pack has written.")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")],
) -> None:
    """Write a packed adapter as PEFT reads it."""
    from train.commands.pack import unpack_folder

    typer.echo(unpack_folder(packed, output))


@app.command(epilog="Example: postshare prepare llama3.2-1b-postshare-30")
def prepare(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Download and cache model and data, once per node. Then HF_HUB_OFFLINE=1 works."""
    loaded = _load(recipe, overrides)
    _warn_of_hiding()
    _stage("prepare", loaded)


@app.command(
    epilog="Example: postshare doctor demo   "
    "(or: accelerate launch ... --no_python postshare doctor demo)"
)
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A .yaml file, or a shipped recipe's name."),
    ] = None,
    overrides: OverridesArgument = None,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds that a process may be late.")
    ] = 60.0,
    speed: options.Speed = None,
    chip: options.Chip = None,
    mfu: options.Utilization = None,
) -> None:
    """Say whether a job would start, fit and save here. Exit code 0: go, 2: no-go."""
    with large_imports():
        from train.doctor.diagnosis import diagnose
        from train.estimate.throughput import Assumed

    if not diagnose(recipe, overrides or [], patience, assumed=Assumed(speed, chip, mfu)):
        sys.exit(ExitCode.BAD_INPUT)


@app.command(
    epilog="Example: postshare dashboard --entity me --project postshare   (or: --json panels.json)"
)
def dashboard(
    entity: Annotated[
        str | None, typer.Option(help="User or team of wandb (not needed with --json).")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Project (default: postshare); its first run makes it.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the panels as JSON; no network."),
    ] = None,
) -> None:
    """Make a wandb dashboard of a project. Loss, penalty, pairs, systems, evaluation."""
    from train.commands.dashboard import dashboard

    typer.echo(dashboard(entity, project, json))


@app.command(epilog="Example: postshare recipes llama3-8b-postshare-30 --copy mine.yaml")
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this recipe.", autocompletion=complete_recipe),
    ] = None,
    copy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the recipe to FILE, to make it your own."),
    ] = None,
) -> None:
    """List the shipped recipes, or print or copy one."""
    from train.commands.recipes import copy_one, list_all, print_one

    if copy is None:
        print_one(name) if name is not None else list_all()
    elif name is None:
        raise typer.BadParameter("name the recipe that is to be copied", param_hint="--copy")
    else:
        copy_one(name, copy)


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from train.recipe.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


def _stage(name: Literal["run", "plan", "export", "evaluate", "prepare"], recipe: Recipe) -> None:
    """Call the function of `train.stages.pipeline` of this name."""
    with large_imports():
        from train.stages import pipeline

    getattr(pipeline, name)(recipe)


def _warn(recipe: Recipe) -> None:
    from train.recipe.warnings import recipe_warnings

    if _main_process():
        for line in recipe_warnings(recipe):
            typer.echo(f"warning: {line}", err=True)


def _warn_of_hiding() -> None:
    from train.common.shadowing import NO_PYTHON, hiding

    # What a launcher sets, accelerate's for one process the second alone: it has started us.
    launched = {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if not launched and (own := hiding(Path.cwd())) is not None:
        typer.echo(
            f"warning: {own.name} is what `-m train` runs in this folder, not postshare; to start "
            f"several processes here: {NO_PYTHON}",
            err=True,
        )


def _main_process() -> bool:
    """Whether this is the process that speaks; read from the launcher, before torch is there."""
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `postshare` command; every expected end is an exit code and one line on stderr.

    See :class:`train.common.exit_codes.ExitCode`. A bug shows its traceback.
    """
    with watching():
        sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> ExitCode:
    try:
        app(arguments)
    except (TrainingStopped, Interrupted) as stop:
        _say(str(stop))
        return exit_code(received())
    except Exception as error:
        # Imported late, so that --help stays fast: whatever raised it has imported it before.
        from sa_models.errors import PostshareError
        from train.distributed.lost_rank import START_AGAIN, RankLostError, lost_connection

        if isinstance(error, RankLostError):
            if error.speaks:
                typer.echo(f"error: {error}", err=True)
            return ExitCode.RANK_LOST
        if number := received():
            # Another rank has heard the signal first and is gone, or Interrupted went through a
            # library's C++, which raises an error of its own instead.
            _say(str(Interrupted(number, error)))
            return exit_code(number)
        if lost := lost_connection(error):
            rank = os.environ.get("RANK", "0")
            typer.echo(
                f"error: rank {rank} has lost another rank ({lost}); {START_AGAIN}", err=True
            )
            return ExitCode.RANK_LOST
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say(f"error: no space is left ({error}); free some, and give the same command again")
            return ExitCode.BAD_INPUT
        if not isinstance(error, PostshareError):
            raise
        _say(f"error: {error}")
        return ExitCode.BAD_INPUT
    return ExitCode.DONE


def _say(line: str) -> None:
    if _main_process():
        typer.echo(line, err=True)


def launched(arguments: list[str] | None = None) -> NoReturn:
    """`python -m train`, as `accelerate launch ... -m train` calls it.

    `RECIPE key=value` is `postshare run`; a command's name first, such as doctor, is that command.
    """
    rest = sys.argv[1:] if arguments is None else arguments
    commands = {
        str(command.callback.__name__) for command in app.registered_commands if command.callback
    }
    main(rest if rest and rest[0] in commands else ["run", *rest])
