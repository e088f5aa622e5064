"""CONTRIBUTING.md: its tree is the tree, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.pages import REPOSITORY, blocks

PAGE = REPOSITORY / "CONTRIBUTING.md"
TOP = ("sa_models", "train", "tests", "launch", "recipes", "docs")


def named() -> list[str]:
    """The folders of the page's tree, with those above them."""
    (tree,) = (block.code for block in blocks(PAGE, "") if block.code.startswith("sa_models/"))
    above: list[str] = []
    found = []
    for line in tree.splitlines():
        folder, what = re.fullmatch(r"((?:  )*\w+)/ +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert len(what) > 3
        above = [*above[: folder.count("  ")], folder.strip()]
        found.append("/".join(above))
    return found


def present() -> set[str]:
    """The folders with files in them, but for those below tests/data and of mirrored packages."""
    files = (file for top in TOP for file in (REPOSITORY / top).rglob("*") if file.is_file())
    folders = {
        above
        for file in files
        if "__pycache__" not in file.parts
        for above in file.relative_to(REPOSITORY).parents
    }
    hidden = re.compile(r"\.|tests/data/.|tests/unit/(train|sa_models)/.")
    return {f.as_posix() for f in folders if not hidden.match(f.as_posix())}


def test_the_tree_is_the_tree() -> None:
    found = named()
    assert len(found) == len(set(found))
    assert set(found) == present()
    assert len(found) > 50


def test_tests_lie_as_what_they_test() -> None:
    unit = REPOSITORY / "tests" / "unit"
    for package in ("train", "sa_models"):
        folders = {file.parent for file in (unit / package).rglob("test_*.py")}
        missing = [f for f in folders if not (REPOSITORY / f.relative_to(unit)).is_dir()]
        assert missing == []


def test_seven_files_in_their_order() -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"^(\d)\. `([\w/]+\.py)`: ", text, re.MULTILINE)
    assert [int(number) for number, _ in files] == list(range(1, 8))
    assert all((REPOSITORY / file).is_file() for _, file in files)
    assert "read these seven files" in text


def test_every_make_target_is_there() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    used = set(re.findall(r"make (?:-B )?([a-z-]+)", PAGE.read_text(encoding="utf-8")))
    assert used - targets == set()
    assert {"test", "check", "test-matrix", "test-faults", "bench"} <= used


def test_it_is_short_and_the_readme_names_it() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 150
    assert "(CONTRIBUTING.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_paths_in_it_are_there() -> None:
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    paths = {path for path in re.findall(r"`([\w.-]+(?:/[\w.-]*)+)`", text) if "venv" not in path}
    assert len(paths) > 25
    assert [path for path in sorted(paths) if not Path(REPOSITORY, path).exists()] == []
