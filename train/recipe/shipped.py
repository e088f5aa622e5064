"""Files that come with the package: recipes, launch files, the recipe's schema.

Nothing heavy is imported here: a shell that completes a name must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".yaml", ".yml")
"""Of recipe files."""


def shipped_folder(kind: str) -> Path:
    """The folder `recipes`, `launch` or `docs`: of the installed wheel, or of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def shipped_recipes() -> dict[str, Path]:
    """Name (the path inside recipes/, without suffix) and file of every shipped recipe, sorted."""
    folder = shipped_folder("recipes")
    files = sorted(f for suffix in SUFFIXES for f in folder.rglob(f"*{suffix}"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
