"""Runs on every rank: short runs one after the other, each in a folder of its name.

runs_worker.py FOLDER NAME [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.distributed.runs import RUNS
from tests.support.garbage import keep_what_is_imported
from tests.support.outputs import sketched
from train.distributed.engines.start import shutdown
from train.stages.pipeline import stages


def main() -> None:
    folder, *names = sys.argv[1:]
    keep_what_is_imported()
    for name in names:
        print(f"run {name}")
        with sketched():
            stages(RUNS[name].resolved(Path(folder) / name))
    shutdown()


if __name__ == "__main__":
    main()
