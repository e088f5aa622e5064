"""Registration of the compact model with transformers' Auto classes, once they are imported.

Importing them takes seconds, for which nobody should wait who reads a plan. Until they are imported
a finder on :data:`sys.meta_path` watches. What is registered imports transformers as well, so that
the finder waits for the end of the outermost import: before it, modules are there by halves.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
"""The module that all Auto classes import."""
WATCHED = ("transformers", "sa_models")


def register_with_transformers() -> None:
    """Register now, where the Auto classes are imported, else as soon as they are.

    May be called more than once.
    """
    if AUTO_CLASSES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from sa_models.entry import SharedLlamaConfig, SharedLlamaForCausalLM, SharedLlamaModel

    AutoConfig.register(SharedLlamaConfig.model_type, SharedLlamaConfig, exist_ok=True)
    AutoModel.register(SharedLlamaConfig, SharedLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(SharedLlamaConfig, SharedLlamaForCausalLM, exist_ok=True)


class _Watch(MetaPathFinder):
    """Finds what the other finders find, and counts the imports of :data:`WATCHED` under way.

    It stays on the path when it is done, and finds nothing: other threads may be at it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0  # in all threads: one may need a module that another still executes
        self._done = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._done or name.partition(".")[0] not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Watch))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            counted = partial(self._execute, spec.loader.exec_module)
            spec.loader.exec_module = counted  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        with self._lock:
            self._running += 1
        try:
            execute(module)
        finally:
            with self._lock:
                self._running -= 1
        with self._lock:
            last = not (self._running or self._done) and AUTO_CLASSES in sys.modules
            self._done = self._done or last
        if last:
            _register()
