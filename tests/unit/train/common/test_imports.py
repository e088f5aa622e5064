"""Garbage collection around the imports of large libraries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from train.common.imports import large_imports


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_collection_waits_for_the_first_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with large_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_collection_goes_on_when_the_libraries_are_there() -> None:
    before = gc.get_freeze_count()
    with large_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_collection_that_was_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
