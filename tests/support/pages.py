"""The pages, the blocks of code in them, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(postshare [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language and its text."""

    page: Path
    language: str
    code: str


@dataclass(frozen=True)
class Command:
    """The words of a command line, without comment and without variables before it."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of these languages, in their order."""
    text = page.read_text(encoding="utf-8")
    found = [Block(page, match[1], match[2]) for match in _BLOCK.finditer(text)]
    return [block for block in found if block.language in languages]


def lines(block: Block) -> list[str]:
    """The command lines of a block of bash, each whole and without its comment."""
    whole = block.code.replace("\\\n", " ")
    return [line for line in whole.splitlines() if shlex.split(line, comments=True)]


def commands(page: Path) -> Iterator[Command]:
    """Every command line of the page's blocks of bash."""
    for block in blocks(page, "bash"):
        for line in lines(block):
            words = shlex.split(line, comments=True)
            while re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            yield Command(page, tuple(words))


def mentioned(page: Path) -> Iterator[Command]:
    """Every `postshare ...` in the running text that has arguments."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for found in _INLINE.finditer(text):
        words = tuple(found[1].split())
        if len(words) > 2:
            yield Command(page, words)
