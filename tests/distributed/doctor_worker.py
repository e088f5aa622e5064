"""Runs on every rank: the doctor, with one thing wrong that only a cluster can have.

doctor_worker.py FAULT RECIPE [key=value ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from train.cli import main
from train.distributed.engines import start as engine
from train.recipe.recipe import Recipe

RANK = os.environ["RANK"]


def node_local_and_alone() -> None:
    """Each rank has a folder of its own under the same name: a mount point stands in for it."""
    folder = Path(arguments[-1].removeprefix("output_dir="))
    own = folder.with_name(f"{folder.name}-{RANK}")
    Recipe.folder = property(lambda recipe: own)  # type: ignore[assignment]
    # What a launch file that Accelerate misreads gives: each process believes it is alone.
    engine._accelerator = lambda zero, patience: SimpleNamespace(num_processes=1)


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    globals()[fault]()
    main(["doctor", *arguments])
