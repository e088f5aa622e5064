"""Names: one public class of a name in a package, and modules that say what they hold."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = "What Which Where How Whether When Why Who"
VERBS = (
    "Add Apply Ask Build Choose Collect Compare Compute Convert Decide Download Draw Evaluate Find "
    "Get Give Keep Let Load Make Materialize Print Pull Put Quantize Read Reconstruct Remove "
    "Return Save Say Score Send Take Tell Upload Verify Write "
    # Doing it says no more of what there is.
    "Choosing Finding Judging Loading Making Measuring Pulling Reading Running Saving Starting "
    "Writing"
)
NO_NOUNS = frozenset((QUESTIONS + " " + VERBS).split())


def modules(package: str) -> dict[str, ast.Module]:
    files = sorted((ROOT / package).rglob("*.py"))
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text(encoding="utf-8")) for f in files}


@pytest.mark.parametrize("package", ["train", "sa_models"])
def test_no_two_public_classes_of_a_package_have_one_name(package: str) -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for name, module in modules(package).items():
        for node in module.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert len(homes) > 40
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


@pytest.mark.parametrize("package", ["train", "sa_models"])
def test_the_first_line_of_a_module_says_what_it_holds(package: str) -> None:
    wrong = {}
    for name, module in modules(package).items():
        first = (ast.get_docstring(module) or "").partition("\n")[0]
        word = re.match(r"[A-Za-z]+(?![\w:.'-])", first)
        # "`postshare run`: ..." begins with no word, and "Export: ..." with a title.
        if not first.endswith((".", ".)", ")")) or (word and word[0] in NO_NOUNS):
            wrong[name] = first
    assert wrong == {}
