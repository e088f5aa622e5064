from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.support import outputs, spans_base


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small base model and the text of `tests.support.spans_base`; tests only read it."""
    folder = tmp_path_factory.mktemp("home")
    spans_base.write_base(folder / "base")
    spans_base.write_text(folder / "text.jsonl")
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tokenized text lies in a folder of the test, and no progress bar is shown."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def sketched() -> Iterator[None]:
    """For tests of runs, which look at no picture, no sample and no time."""
    with outputs.sketched():
        yield


@pytest.fixture
def rendered(sketched: None) -> Iterator[None]:
    """For the one among them that does."""
    with outputs.rendered():
        yield
