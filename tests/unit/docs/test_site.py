"""The site: what is generated is complete, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from pydantic import BaseModel

from tests.support.pages import DOCS, PAGES, REPOSITORY, blocks
from train.cli import app
from train.recipe.recipe import Recipe


def module_of_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return module_of_docs("reference")


def sections(annotation: object) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections in a type, and whether they are in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    for part in get_args(annotation):
        listed = getattr(annotation, "__origin__", None) is tuple
        yield from ((found, listed or inside) for found, inside in sections(part))


def key_paths(model: type[BaseModel], prefix: str, seen: set[type]) -> Iterator[str]:
    """Every key, by pydantic's fields instead of the schema; a section that comes twice once."""
    inside = []
    for name, field in model.model_fields.items():
        yield prefix + name
        inside += [(prefix + name, *found) for found in sections(field.annotation)]
    for path, section, listed in inside:
        if section not in seen:
            seen.add(section)
            yield from key_paths(section, f"{path}.0." if listed else f"{path}.", seen)


def test_every_key_is_there_once_with_its_range_and_default(reference: ModuleType) -> None:
    text = reference.keys()
    found = re.findall(r"^```\{confval\} (\S+)$", text, re.MULTILINE)
    expected = list(key_paths(Recipe, "", set()))
    assert len(expected) > 120
    assert sorted(found) == sorted(expected)
    parts = dict(re.findall(r"^```\{confval\} (\S+)\n(.*?)^```$", text, re.M | re.S))
    assert ":type: a whole number >= 0 and \\<= 4294967295\n:default: `0`\n" in parts["seed"]
    assert ":default: none, it must be set\n" in parts["train.batch_size"]
    assert ":default: `[0.9, 0.95]`\n" in parts["train.betas"]
    assert ":default: `false`\n" in parts["data.streaming"]
    assert "one of copy, mean, aligned\\_mean" in parts["materialize.merge"]
    assert "Share of all units: floor(ratio" in parts["plan.budget.ratio"]


def test_every_command_is_there_with_its_options(reference: ModuleType) -> None:
    text = reference.commands()
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert re.findall(r"^## `postshare ([\w-]+)`$", text, re.MULTILINE) == names
    assert "* `--seeds <int range>`: Trainings of each model, each with another seed." in text
    assert "```bash\npostshare compare demo --seeds 3\n```" in text


def test_a_marker_without_a_generator_is_an_error(reference: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        reference.fill("a\n<!-- generated: nothing -->\nb")
    for page in PAGES:
        assert set(reference.MARKER.findall(page.read_text())) <= set(reference.GENERATED)


def test_pictures_are_those_that_the_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = module_of_docs("draw")
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    for picture in (draw.units, draw.ties, draw.spans, draw.stages):
        picture()
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (DOCS / "pictures").iterdir()}


def test_the_tutorial_shows_the_table_of_the_readme() -> None:
    tables = [
        [block.code for block in blocks(page, "") if "vs continued" in block.code]
        for page in (REPOSITORY / "README.md", DOCS / "tutorial.md")
    ]
    (shown,) = tables[1]
    assert shown.strip() in [table.strip() for table in tables[0]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    pytest.importorskip("furo", reason="the extra docs is not installed; make docs")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, folder],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stderr) == (0, "")
    return folder


@pytest.mark.more
def test_it_builds_without_a_warning(site: Path) -> None:
    keys = (site / "recipe.html").read_text()
    assert 'id="confval-plan.budget.ratio"' in keys
    assert "floor(ratio * units) units are tied" in re.sub("<[^>]+>", "", keys)
    assert "<math" in (site / "formulas.html").read_text()
    pages = {page.stem for page in DOCS.glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    # Read at a desk without a network: nothing is loaded from elsewhere.
    loaded = re.compile(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//')
    assert [page.name for page in site.glob("*.html") if loaded.search(page.read_text())] == []


@pytest.mark.more
@pytest.mark.parametrize(
    ("typed", "page"),
    [
        ("multi-node Slurm", "clusters"),
        ("8 GPUs", "your-data"),
        ("custom dataset", "your-data"),
        ("vLLM", "serving"),
        ("GGUF", "serving"),
        ("quantization int8", "serving"),
        ("out of memory", "troubleshooting"),
        ("resume", "running"),
        ("wandb", "tracking"),
        ("wandb dashboard", "tracking"),
        ("KV cache", "which-method"),
        ("LoRA", "lora"),
    ],
)
def test_what_people_type_is_found_first_and_stands_in_a_heading(
    site: Path, typed: str, page: str
) -> None:
    from tests.support.site_search import Site

    asked = Site(site)
    results = asked.search(typed)
    assert results[0].page == page, results[:5]
    words, headings = typed.lower().split(), asked.headings(page)
    assert any(all(word in title.lower() for word in words) for title in headings), headings


@pytest.mark.more
def test_the_search_ranks_titles_before_text_and_finds_nothing_for_nothing(site: Path) -> None:
    from tests.support.site_search import Site

    asked = Site(site)
    found = {result.page: result.score for result in asked.search("isotropy")}
    assert found["spans"] == 5  # it is in the text
    assert asked.search("distillation")[0] == ("distillation", "Distillation", 16)
    assert asked.search("micro_batch_size")[0] == ("recipe", "train.micro_batch_size", 16)
    assert asked.search("zebra") == []
