"""Sphinx's settings of the documentation site; `make docs` builds it into .docs/."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import reference  # noqa: E402  (beside this file)

project = "postshare"
copyright = "the postshare authors, Apache-2.0"
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # "--option" in running text stays what a reader types

html_theme = "furo"
html_title = "postshare"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "github-dark"
toc_object_entries = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


# `<!-- search: words; other words -->` below a heading: words that people type into the search,
# which then shows this place first. A comment, so that GitHub shows nothing.
SEARCHED = re.compile(r"^<!-- search: (.+) -->$", re.MULTILINE)


def _index(found: re.Match[str]) -> str:
    return "\n".join(f"```{{index}} ! {words.strip()}\n```" for words in found[1].split(";"))


def _generate(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = SEARCHED.sub(_index, reference.fill(source[0]))


def _outdated(app: Sphinx, *_: object) -> list[str]:
    # Their text is older than what they are generated from.
    return [page.stem for page in app.srcdir.glob("*.md") if reference.generated(page)]


def _mathml(node: nodes.Element, block: bool) -> str:
    """Markup that browsers draw themselves: formulas need no script and no network."""
    text = node.astext()
    try:
        if re.search(r"\\t?frac[^{]", text):
            raise MathError(r"Write \frac with braces: without, what follows is misread.")
        return tex2mathml(text, as_block=block)
    except MathError as error:
        raise ExtensionError(f"{node.source}:{node.line}: {error}") from error


def _inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", _generate)
    app.connect("env-get-outdated", _outdated)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
