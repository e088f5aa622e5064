"""Rooms of the packages: their size, what they say of themselves, what importing them costs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from sa_models.weights.companion_files import AUTO_MAP, code_files

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = [REPOSITORY / name for name in ("train", "sa_models")]
ROOMS = sorted(file.parent for package in PACKAGES for file in package.rglob("__init__.py"))
LARGEST = 13


def name(room: Path) -> str:
    return room.relative_to(REPOSITORY).as_posix()


def modules(room: Path) -> set[str]:
    """The modules side by side in a room."""
    return {file.stem for file in room.glob("*.py")} - {"__init__"}


def travelling() -> set[Path]:
    """The files that a compact export carries: the compact model's, and what these import."""
    package = REPOSITORY / "sa_models"
    entries = {package / name for name in code_files(AUTO_MAP)}
    return entries | {Path(file) for one in entries for file in get_relative_import_files(one)}


def imported(file: Path) -> set[str]:
    """Every module that a file imports, in functions as well; relative ones with their dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_every_folder_with_code_is_a_room() -> None:
    folders = {file.parent for package in PACKAGES for file in package.rglob("*.py")}
    assert sorted(folders) == ROOMS
    assert len(ROOMS) > 25


@pytest.mark.parametrize("room", [room for room in ROOMS if room.name != "sa_models"], ids=name)
def test_a_room_is_small(room: Path) -> None:
    assert len(modules(room)) <= LARGEST, sorted(modules(room))


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in PACKAGES], ids=name)
def test_a_room_says_what_it_holds_and_what_it_imports(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    first, _, rest = (ast.get_docstring(tree) or "").partition("\n\n")
    assert len(first.split()) >= 3
    assert "Imports " in rest, f"{name(room)} does not say what it may import"


@pytest.mark.parametrize("room", [room for room in ROOMS if room.name != "sa_models"], ids=name)
def test_importing_a_room_costs_nothing(room: Path) -> None:
    names = {module.partition(".")[0] for module in imported(room / "__init__.py")}
    assert names <= sys.stdlib_module_names, names


# --- what travels ---------------------------------------------------------------------------------


def test_the_top_level_of_sa_models_is_what_travels() -> None:
    assert travelling() == {
        REPOSITORY / "sa_models" / f"{module}.py" for module in modules(REPOSITORY / "sa_models")
    }


@pytest.mark.parametrize("file", sorted(travelling()), ids=lambda file: file.name)
def test_what_travels_imports_nothing_that_stays(file: Path) -> None:
    beside = {f".{module}" for module in modules(REPOSITORY / "sa_models")}
    others = {m.partition(".")[0] for m in imported(file) - beside}
    # huggingface_hub comes with transformers
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    assert others <= allowed, others - allowed


def test_the_entry_imports_all_that_travels() -> None:
    """transformers 4 copies what the entry imports, and not what that imports in turn."""
    package = REPOSITORY / "sa_models"
    beside = {f".{file.stem}" for file in travelling() - {package / "entry.py"}}
    assert {m for m in imported(package / "entry.py") if m.startswith(".")} == beside
