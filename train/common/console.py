"""The console on which results are printed: what it is given are characters, never markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """Rich's console, which leaves names such as `runs/[a]` and `:x:` as they are.

    Args:
        options: of :class:`rich.console.Console`.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)
