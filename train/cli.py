"""The command line. Heavy imports wait until a command needs them: `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from train.commands.completion import complete_override, complete_recipe
from train.common.exit_codes import ExitCode
from train.common.imports import large_imports
from train.common.signals import Interrupted, TrainingStopped, exit_code, watching

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

app = typer.Typer(
    name="postshare",
    help="Post-train a Llama so that its attention heads can be shared; ship the smaller model.",
    epilog="First: postshare run demo   (the whole pipeline on a small model, minutes on a CPU)",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A .yaml file, or a shipped recipe's name.",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, such as train.steps=100.",
        autocompletion=complete_override,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"postshare {metadata.version('postshare')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _welcome(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
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
    speed: Annotated[
        float | None,
        typer.Option(
            min=1e-3,
            metavar="TOKENS",
            help="With --dry-run: tokens per second (default: as an earlier run in its folder).",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --dry-run: also the whole resolved recipe.")
    ] = False,
) -> None:
    """Plan, post-train, materialize, export, evaluate, report; finished stages are skipped."""
    if gpus is not None and not dry_run:
        raise typer.BadParameter("--gpus goes with --dry-run; accelerate launch sets the processes")
    if not dry_run and (full or speed is not None):
        raise typer.BadParameter("--full and --speed go with --dry-run")
    loaded = _load(recipe, overrides)
    if dry_run:
        from train.estimate.dry_run import print_dry_run

        print_dry_run(loaded, gpus, full=full, tokens_per_second=speed)
        return
    _warn(loaded)
    _warn_of_hiding()
    _stage("run", loaded)


@app.command(epilog="Example: postshare plan demo plan.budget.ratio=0.2")
def plan(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Find the sharing plan, print it, and draw the similarity of heads and the ties."""
    loaded = _load(recipe, overrides)
    _stage("plan", loaded)


@app.command(epilog="Example: postshare export demo export.dtype=bfloat16")
def export(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Write the compact and dense folders of a finished training, verified."""
    loaded = _load(recipe, overrides)
    _stage("export", loaded)


@app.command(
    epilog="Example: postshare evaluate runs/demo --tasks perplexity,speed   (or: postshare "
    "evaluate demo evaluate.blocks=64)"
)
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, model folders or hub names; or a RECIPE and KEY=VALUE overrides.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="perplexity (default), speed, and lm-eval's, separated by commas: "
            "perplexity,mmlu,rte,sst2,hellaswag,gsm8k."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text of perplexity: .txt, .jsonl (default: what the run held out)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a window (default: 2048, if it fits).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window moves (default: the context).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of local task data, FOLDER/TASK/SPLIT.jsonl.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first questions of each lm-eval task.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question (default: the task's).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows or requests in a forward (default: 8).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default on the CPU), bfloat16 (default elsewhere), float16."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1 (default: a GPU if there is one).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results, as JSON.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Results by content (default: ~/.cache/postshare).")
    ] = None,
) -> None:
    """Compare models side by side; with a RECIPE: evaluate the models of its own run."""
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
        typer.Option(help="A text to go on with; may be given often (default: three)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most to add to a prompt.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1 (default: a GPU if there is one).")
    ] = None,
) -> None:
    """Print how models continue the same prompts, before and after sharing; greedily."""
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
    """Round the projections of an export to int8 or int4; `evaluate` compares the result."""
    from train.commands.quantize import quantize_model

    quantize_model(model, output, to, group_size)


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
    """Write report.html of a run, finished or not; of several, one that compares them."""
    from train.report.page import write_report

    typer.echo(f"report    {write_report(runs, output)}")


@app.command(epilog="Example: postshare analyze demo-base --text stdlib --sensitivity")
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A hub name, a dense or compact model folder, or a run folder."
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure on: .txt, .jsonl; stdlib: the demo's "
            "(default: what a run held out)."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write (default: analysis/MODEL).")
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks of text, the first ones (default: 16, or what there is)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a block (default: 512, if they fit).")
    ] = None,
    score: Annotated[
        str, typer.Option(help="Similarity of two heads, as plan.score (docs/scores.md).")
    ] = "qk",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also the loss without each head and layer.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1 (default: a GPU if there is one).")
    ] = None,
) -> None:
    """Isotropy and similarity of any Llama, without training: a table, JSON, pictures."""
    from train.commands.analyze.command import AnalyzeOptions
    from train.commands.analyze.command import analyze as run_analysis

    options = AnalyzeOptions(text, output, blocks, context, score, sensitivity, device)
    run_analysis(model, options)


@app.command(epilog="Example: postshare push runs/demo/export/compact me/small-llama --dry-run")
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An export (or a run: its compact export).")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Such as me/small-llama.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Verify and list what would be uploaded; needs no network."),
    ] = False,
) -> None:
    """Upload an export and its model card to the hub, once every hash is that of its manifest."""
    from train.commands.push import push as upload

    upload(folder, repo_id, private, dry_run)


@app.command(epilog="Example: postshare compare demo --seeds 3")
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with other seeds.")] = 1,
    controls: Annotated[
        str | None,
        typer.Option(help="Only these, separated by commas (default: all that exist)."),
    ] = None,
) -> None:
    """Train the recipe and its controls on the same tokens: one table, one Pareto plot."""
    loaded = _load(recipe, overrides)
    from train.commands.compare.command import compare

    compare(loaded, seeds, None if controls is None else controls.split(","))


@app.command(epilog="Example: postshare pack runs/mine/export/adapter small --bytes 25%")
def pack(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Of an export.")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Not there yet.")],
    size: Annotated[
        str, typer.Option("--bytes", help="Most bytes of the file, or 25% of the adapter's.")
    ],
) -> None:
    """Store a residual's adapter in mixed precision, bits by singular value."""
    from train.commands.pack import pack_folder

    typer.echo(pack_folder(adapter, output, size))


@app.command(epilog="Example: postshare unpack small adapter")
def unpack(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="What pack has written.")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Not there yet.")],
) -> None:
    """Write a packed adapter as PEFT reads it."""
    from train.commands.pack import unpack_folder

    typer.echo(unpack_folder(packed, output))


@app.command(epilog="Example: postshare prepare llama3.2-1b-postshare-30")
def prepare(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Download and cache model and data, once per node; then HF_HUB_OFFLINE=1 works."""
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
) -> None:
    """Before a big job: would it start, run and save here? Exit code 0: go, 2: no-go."""
    with large_imports():
        from train.doctor.diagnosis import diagnose

    if not diagnose(recipe, overrides or [], patience):
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
    """Make the wandb workspace of a project: loss, penalty, pairs, systems, evaluation."""
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
        typer.Option(metavar="FILE", help="Write it there, to make it your own."),
    ] = None,
) -> None:
    """List the shipped recipes, or print or copy one."""
    from rich.table import Table

    from train.common.console import plain_console
    from train.recipe.load import copy_recipe, description, text_of
    from train.recipe.shipped import shipped_recipes

    if name is not None and copy is not None:
        copy_recipe(name, copy)
        typer.echo(f"{copy} is a copy of {name}: postshare run {copy}")
        return
    if copy is not None:
        raise typer.BadParameter("name the recipe that is to be copied", param_hint="--copy")
    if name is not None:
        typer.echo(text_of(name), nl=False)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name, file in shipped_recipes().items():
        table.add_row(name, description(file))
    plain_console().print(table)


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
        return exit_code() or ExitCode.INTERRUPTED
    except Exception as error:
        # Imported late, so that --help stays fast: whatever raised it has imported it before.
        from sa_models.errors import PostshareError
        from train.distributed.lost_rank import START_AGAIN, RankLostError, lost_connection

        if isinstance(error, RankLostError):
            if error.speaks:
                typer.echo(f"error: {error}", err=True)
            return ExitCode.RANK_LOST
        if stopped := exit_code():  # another rank has heard the signal first, and is gone
            _say(f"stopped by a signal ({type(error).__name__}: {error}); start again to go on")
            return stopped
        if lost := lost_connection(error):
            rank = os.environ.get("RANK", "0")
            typer.echo(
                f"error: rank {rank} has lost another rank ({lost}); {START_AGAIN}", err=True
            )
            return ExitCode.RANK_LOST
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
