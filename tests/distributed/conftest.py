from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.runs import RUNS, by_run, names_of
from tests.support.launcher import run
from tests.support.outputs import sketched
from train.stages.pipeline import stages

WORKER = Path(__file__).with_name("runs_worker.py")

APART = ("demo",)
"""Runs with a launch of their own: what takes minutes, and is left to `make test-more`."""

Alone = Callable[[str], Path]
Together = Callable[[str, str], tuple[Path, str]]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folder of one of `RUNS` on a single process, which is this one."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def done(name: str) -> Path:
        with sketched():
            stages(RUNS[name].resolved(folder / name))
        return folder / name

    return done


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """A launch file's and a run's folder, and what its ranks have printed of that run."""

    @functools.cache
    def launched(config: str, *names: str) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp(config)
        return folder, by_run(run(config, WORKER, folder, *names, timeout=900))

    def done(config: str, name: str) -> tuple[Path, str]:
        shared = [other for other in names_of(config) if other not in APART]
        folder, printed = launched(config, *([name] if name in APART else shared))
        return folder / name, printed[name]

    return done
