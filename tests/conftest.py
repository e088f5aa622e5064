from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Threads that wait for each other between tiny operations take longer than the operations.
torch.set_num_threads(1)

# DeepSpeed builds its extension for the environment it runs in; where several share a folder, each
# start of another one builds again.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="kills in tests/faults/test_kills.py")
    parser.addoption("--seed", type=int, default=0, help="of their moments and ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `-n 2 --dist loadgroup`.

    Launches come first and run one after the other, as each takes all cores it can get; meanwhile
    the other worker takes the other files, whole, because their tests share fixtures.
    """
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)
    for item in items:
        launches = item.get_closest_marker("distributed") is not None
        item.add_marker(pytest.mark.xdist_group("launches" if launches else str(item.path)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints, texts and golden numbers beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is absent: real checkpoints and golden numbers are not on this machine"
        )
    return folder
