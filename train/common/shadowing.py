"""Modules of the user's own that hide this package from `python -m train`."""

from __future__ import annotations

from pathlib import Path

NO_PYTHON = "accelerate launch ... --no_python postshare run RECIPE"
"""Starts this package on several processes, whatever lies in the working folder."""


def hiding(folder: Path) -> Path | None:
    """What `python -m train` runs in this folder, where that is not this package.

    Python looks there first, for a package `train` and then for `train.py`; a folder without
    `__init__.py` hides nothing that is installed.
    """
    package, module = folder / "train", folder / "train.py"
    if (package / "__init__.py").is_file():
        return None if package.resolve() == Path(__file__).resolve().parents[1] else package
    return module if module.is_file() else None
