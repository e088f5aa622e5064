"""Every message that docs/troubleshooting.md quotes is one that the code can write."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.pages import DOCS, REPOSITORY, blocks

GAP = "…"


def literal(node: ast.AST, constants: dict[str, str]) -> str | None:
    """The text of a string as the page would quote it: with a gap for what changes in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            part.value
            if isinstance(part, ast.Constant)
            else constants.get(ast.unparse(part.value), GAP)
            for part in node.values
        )
        return re.sub(f"{GAP}+", GAP, text)
    return None


def texts(tree: ast.Module) -> dict[str, str]:
    """The module's constants that are text."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def messages(file: Path, modules: dict[str, ast.Module]) -> list[str]:
    """The texts of a module, with its constants, own and imported, written out or as gaps."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    constants = texts(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            known = texts(modules[node.module])
            constants |= {a.name: known[a.name] for a in node.names if a.name in known}
    return [
        text
        for node in ast.walk(tree)
        for known in (constants, {})
        if (text := literal(node, known)) is not None
    ]


def test_quoted_messages_are_in_the_source() -> None:
    packages = (REPOSITORY / "train", REPOSITORY / "sa_models")
    sources = [file for package in packages for file in package.rglob("*.py")]
    modules = {
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts): ast.parse(
            file.read_text(encoding="utf-8")
        )
        for file in sources
    }
    written = [text for file in sources for text in messages(file, modules)]
    quoted = [" ".join(block.code.split()) for block in blocks(DOCS / "troubleshooting.md", "text")]
    assert len(quoted) >= 25
    assert len(set(quoted)) == len(quoted)
    assert [one for one in quoted if not any(one in text for text in written)] == []
    # What is left of a quotation without its gaps says something.
    assert all(len(one.replace(GAP, "")) > 12 for one in quoted)
