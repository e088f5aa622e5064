"""Arguments and options: those that several commands have, and those of commands with many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.commands.completion import complete_override, complete_recipe

# --- of several commands --------------------------------------------------------------------------

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
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1 (default: a GPU if there is one).")
]
Speed = Annotated[
    float | None,
    typer.Option(
        min=1e-3,
        metavar="TOKENS",
        help="For the time of a job: tokens per second of all GPUs together (default: as an "
        "earlier run in its folder, else as the chip's measured utilization says).",
    ),
]
Chip = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="For the time of a job: the GPU, such as H100 or A100."),
]
Utilization = Annotated[
    float | None,
    typer.Option(
        "--mfu",
        min=1e-4,
        max=1,
        metavar="SHARE",
        help="For the time of a job: the share of the GPU's dense bf16 peak that a training "
        "reaches, such as 0.3.",
    ),
]

# --- of evaluate ----------------------------------------------------------------------------------

ModelsOrRecipe = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Run folders, model folders or hub names; or a RECIPE and KEY=VALUE overrides.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="perplexity (default), speed, and lm-eval's, separated by commas: "
        "perplexity,mmlu,rte,sst2,hellaswag,gsm8k."
    ),
]
PerplexityText = Annotated[
    Path | None,
    typer.Option(help="Text of perplexity: .txt, .jsonl (default: what the run held out)."),
]
Window = Annotated[
    int | None, typer.Option(min=64, help="Tokens of a window (default: 2048, if it fits).")
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens by which a window moves on (default: the context)."),
]
TaskData = Annotated[
    Path | None, typer.Option(help="Folder of local task data, FOLDER/TASK/SPLIT.jsonl.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first questions of each lm-eval task.")
]
FewShot = Annotated[
    int | None, typer.Option(min=0, help="Examples before each question (default: the task's).")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows or requests per forward pass (default: 8).")
]
DType = Annotated[
    str | None,
    typer.Option(help="float32 (default on the CPU), bfloat16 (default elsewhere), float16."),
]
Results = Annotated[Path | None, typer.Option(help="Also write the results, as JSON.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of kept results (default: ~/.cache/postshare/evaluations)."),
]

# --- of analyze -----------------------------------------------------------------------------------

AnalyzedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub name, a dense or compact model folder, or a run folder."
    ),
]
AnalyzedText = Annotated[
    Path | None,
    typer.Option(
        help="Text to measure on: .txt, .jsonl; stdlib: the demo's (default: what a run held out)."
    ),
]
AnalysisFolder = Annotated[
    Path | None, typer.Option(help="Folder to write (default: analysis/MODEL).")
]
Blocks = Annotated[
    int | None,
    typer.Option(min=1, help="Blocks of text, the first ones (default: 16, or what there is)."),
]
BlockTokens = Annotated[
    int | None, typer.Option(min=3, help="Tokens of a block (default: 512, if they fit).")
]
Score = Annotated[
    str, typer.Option(help="Similarity of two heads, as plan.score (docs/scores.md).")
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Also the loss without each head and layer.")
]
