from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.support import REPOSITORY
from tests.support.garbage import keep_what_is_imported

# Threads that wait for each other between tiny operations take longer than the operations.
torch.set_num_threads(1)

# DeepSpeed builds its extension for the environment it runs in; where several share a folder, each
# start of another one builds again.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def _not_synced(descriptor: int) -> None:
    """No test pulls the plug: what is written need not be on the disk before it is read.

    Raises OSError for what is no open file, as the real one.
    """
    os.fstat(descriptor)


os.fsync = _not_synced


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="kills in tests/faults/test_kills.py")
    parser.addoption("--seed", type=int, default=0, help="of their moments and ranks")


def pytest_collection_finish() -> None:
    keep_what_is_imported()


LAUNCHING = ("tests/distributed/", "tests/faults/test_kills")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes comes first: on two workers it takes one of them from start to end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LAUNCHING))


class OneLauncher(LoadScopeScheduling):
    """Launches run one after the other, on one worker, as each takes all cores that it can get.

    The other worker takes the other files, whole, because their tests share fixtures.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "launches" if nodeid.startswith(LAUNCHING) else nodeid.split("::", 1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneLauncher:
    return OneLauncher(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints, texts and golden numbers beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is absent: real checkpoints and golden numbers are not on this machine"
        )
    return folder
