"""The search of the built site without a browser: what Sphinx 9's searchtools.js does."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sphinx.search.en import SearchEnglish

TITLE, PARTIAL_TITLE, TERM, PARTIAL_TERM = 15, 7, 5, 2
OBJECT, PARTIAL_OBJECT = 11, 6
PRIORITY = {0: 15, 1: 5, 2: -5}


class Result(NamedTuple):
    """One line of the results: the page, what is shown of it, and the score."""

    page: str
    title: str
    score: int


class Site:
    """The index that a build has written, asked as the search page asks it."""

    def __init__(self, folder: Path) -> None:
        text = (folder / "searchindex.js").read_text(encoding="utf-8")
        self.index: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
        self.language = SearchEnglish({})

    def search(self, query: str) -> list[Result]:
        """The results in the order in which the page shows them."""
        main, other = self._entries(query)
        first = [*self._titles(query), *main, *self._objects(query), *self._terms(query)]
        return [*_ordered(first), *_ordered(other)]

    def headings(self, page: str) -> list[str]:
        """The title of a page and of its sections."""
        number = self.index["docnames"].index(page)
        return [
            title
            for title, places in self.index["alltitles"].items()
            if any(at == number for at, _ in places)
        ]

    def _titles(self, query: str) -> Iterator[Result]:
        words = query.lower().strip()
        for title, places in self.index["alltitles"].items():
            if words not in title.lower() or len(words) < len(title) / 2:
                continue
            for page, _ in places:
                of_page = self.index["titles"][page]
                shown = title if of_page == title else f"{of_page} > {title}"
                score = _rounded(TITLE * len(words) / len(title)) + (of_page == title)
                yield Result(self.index["docnames"][page], shown, score)

    def _entries(self, query: str) -> tuple[list[Result], list[Result]]:
        """Those of the index: marked as the main place of a word, and others."""
        words = query.lower().strip()
        found: dict[bool, list[Result]] = {True: [], False: []}
        for entry, places in self.index["indexentries"].items():
            if words not in entry or len(words) < len(entry) / 2:
                continue
            for page, _, main in places:
                score = _rounded(100 * len(words) / len(entry))
                one = Result(self.index["docnames"][page], self.index["titles"][page], score)
                found[bool(main)].append(one)
        return found[True], found[False]

    def _objects(self, query: str) -> Iterator[Result]:
        words = dict.fromkeys(_split(query.lower()))
        for word in words:
            for prefix, objects in self.index["objects"].items():
                for page, kind, priority, _, name in objects:
                    whole = f"{prefix}.{name}" if prefix else name
                    last = whole.lower().split(".")[-1]
                    described = f"{prefix} {name} {self.index['objnames'][str(kind)][2]} "
                    described = (described + self.index["titles"][page]).lower()
                    if word not in whole.lower() or any(w not in described for w in words):
                        continue
                    score = PRIORITY.get(priority, 0)
                    if word in (whole.lower(), last):
                        score += OBJECT
                    elif word in last:
                        score += PARTIAL_OBJECT
                    yield Result(self.index["docnames"][page], whole, score)

    def _terms(self, query: str) -> Iterator[Result]:
        stems = dict.fromkeys(
            self.language.stem(word.lower())
            for word in _split(query)
            if word.lower() not in self.language.stopwords and not word.isdecimal()
        )
        scores: dict[int, dict[str, int]] = defaultdict(dict)
        for stem in stems:
            for pages, score in self._pages(stem):
                for page in pages if isinstance(pages, list) else [pages]:
                    scores[page][stem] = score
        enough = {len(stems), sum(len(stem) > 2 for stem in stems)}
        for page, found in scores.items():
            if len(found) in enough:
                title = self.index["titles"][page]
                yield Result(self.index["docnames"][page], title, max(found.values()))

    def _pages(self, stem: str) -> Iterator[tuple[Any, int]]:
        """The pages that have the stem, or a longer word with it; the last score counts."""
        tables = [("terms", TERM), ("titleterms", TITLE)]
        partial = [("terms", PARTIAL_TERM), ("titleterms", PARTIAL_TITLE)]
        for name, score in tables:
            if stem in self.index[name]:
                yield self.index[name][stem], score
        for name, score in partial if len(stem) > 2 else []:
            if stem not in self.index[name]:
                yield from ((p, score) for word, p in self.index[name].items() if stem in word)


def _split(query: str) -> list[str]:
    return [word for word in re.split(r"\W+", query) if word]


def _rounded(value: float) -> int:
    return int(value + 0.5)  # as Math.round does: a half goes up


def _ordered(results: list[Result]) -> list[Result]:
    """By score, then by title."""
    return sorted(results, key=lambda one: (-one.score, one.title.lower()))
