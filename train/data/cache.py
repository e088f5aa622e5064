"""Cache of tables: what goes wrong with it is told from what is wrong with a source."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE

from sa_models.errors import PostshareError
from train.common.progress import console, waiting

_UNWRITABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOLCK,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


def chain(error: BaseException) -> list[BaseException]:
    """An error and what it comes from, the first cause last."""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None and len(links) < 50:
        links.append(cause)
    return links


def said(links: list[BaseException]) -> PostshareError | None:
    """The message for the user that is among the causes, and what the cache refuses to write."""
    for link in links:
        if isinstance(link, PostshareError):
            return link
    for link in reversed(links):
        if isinstance(link, OSError) and (
            link.errno in _UNWRITABLE or "Not enough disk space" in str(link)
        ):
            return unwritable(link)
    return None


def unwritable(error: OSError) -> PostshareError:
    reason = error.strerror or " ".join(str(error).split())[:200]
    downloads = str(error.filename or "").startswith(HF_HUB_CACHE)
    folder = HF_HUB_CACHE if downloads else datasets.config.HF_DATASETS_CACHE
    return PostshareError(
        f"the cache of data, {folder}, cannot be written ({reason}); "
        "make room there and allow writing, or set HF_HOME (or HF_DATASETS_CACHE) to another folder"
    )


@contextmanager
def writing(name: str, *, processes: int = 1) -> Iterator[None]:
    """Makes a table of the source `name`, whose reader raises nothing but PostshareError.

    Raises:
        PostshareError: in one line, for whatever keeps the table from being made.
    """
    if not console.is_terminal:
        datasets.disable_progress_bars()  # they redraw one line, which a file keeps as many
    try:
        with waiting(f"reading {name}"):
            yield
    except (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException) as error:
        links = chain(error)
        if found := said(links):
            raise found from error
        if isinstance(error, RuntimeError) and "abruptly died" not in str(error):
            raise
        if isinstance(error, RuntimeError):
            raise PostshareError(
                f"a process that made tokens of {name} was killed, perhaps for want of memory; "
                f"set data.processes below {processes}"
            ) from error
        first = links[-1]
        reason = " ".join(str(first).split())[:200] or type(first).__name__
        raise PostshareError(
            f"the cache of data, {datasets.config.HF_DATASETS_CACHE}, cannot be used for {name} "
            f"({reason}); remove what it has of it, or set HF_DATASETS_CACHE to another folder"
        ) from error
