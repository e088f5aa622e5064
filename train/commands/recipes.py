"""The shipped recipes: listed, printed, copied."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from train.common.console import plain_console
from train.recipe.load import copy_recipe, description, text_of
from train.recipe.shipped import shipped_recipes


def list_all() -> None:
    """Print each recipe's name and what it is."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name, file in shipped_recipes().items():
        table.add_row(name, description(file))
    plain_console().print(table)


def print_one(name: str) -> None:
    """Print the text of a recipe, a shipped one or a file."""
    typer.echo(text_of(name), nl=False)


def copy_one(name: str, file: Path) -> None:
    """Write a recipe to `file`, and say how to run it."""
    copy_recipe(name, file)
    typer.echo(f"{file} is a copy of {name}: postshare run {file}")
