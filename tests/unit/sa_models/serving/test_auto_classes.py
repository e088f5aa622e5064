"""Registration with transformers' Auto classes, whatever is imported first."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sa_models
from sa_models.heads import HeadLayout
from sa_models.modeling import SharedLlamaForCausalLM, compact_config
from sa_models.plan import HeadTie, SharingPlan
from sa_models.serving import auto_classes
from tests.support import tiny

LOAD = """
config = AutoConfig.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
from sa_models import SharedLlamaConfig, SharedLlamaForCausalLM
assert type(config) is SharedLlamaConfig, type(config)
assert type(model) is SharedLlamaForCausalLM, type(model)
print(len(model.config.plan.ties))
"""
ORDERS = {
    "ours first": """
import sys
import sa_models
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "ours last": """
from transformers import AutoConfig, AutoModelForCausalLM
import sa_models
""",
    "ours between": """
from transformers import AutoConfig
import sa_models
from transformers import AutoModelForCausalLM
""",
    # The Auto classes are imported deep within the import of another model.
    "a stock model": """
import sa_models
from transformers import LlamaForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "our model": """
from sa_models.modeling import SharedLlamaForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "an import that fails": """
import sa_models
try:
    import transformers.no_such_module
except ModuleNotFoundError:
    pass
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "in a thread": """
import threading
import sa_models
thread = threading.Thread(target=lambda: __import__("transformers").AutoTokenizer)
thread.start()
thread.join()
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "reloaded": """
import importlib
import sa_models
importlib.reload(sa_models)
from transformers import AutoConfig, AutoModelForCausalLM
importlib.reload(sa_models)
""",
}


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose config names no modeling files: it loads by registration alone."""
    base = tiny.model()
    plan = SharingPlan(ties=(HeadTie((1, 0), (0, 0), ("q", "k", "v")),))
    assert HeadLayout.from_config(base.config).units > 1
    folder = tmp_path_factory.mktemp("compact")
    SharedLlamaForCausalLM(compact_config(base.config, plan)).save_pretrained(folder)
    return folder


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FIRST_AND_LAST = ["ours first", "ours last"]
FURTHER = [
    pytest.param(order, marks=pytest.mark.more) for order in ORDERS if order not in FIRST_AND_LAST
]


@pytest.mark.parametrize("order", [*FIRST_AND_LAST, *FURTHER])
def test_a_compact_folder_loads_whatever_is_imported_first(order: str, compact: Path) -> None:
    assert python(ORDERS[order] + LOAD.replace("FOLDER", repr(str(compact)))) == "1\n"


def test_names_are_those_of_their_modules() -> None:
    namespace: dict[str, object] = {}
    exec("from sa_models import *", namespace)
    assert set(sa_models.__all__) <= namespace.keys()
    assert set(sa_models.__all__) <= set(dir(sa_models))
    assert sa_models.SharedLlamaForCausalLM is SharedLlamaForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sa_models.nothing  # noqa: B018


def test_plans_need_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "import sa_models; print(sa_models.SharingPlan().ties)\n"
        "try: sa_models.convert\n"
        "except ModuleNotFoundError as error: print(error.name)"
    )
    assert python(code).split() == ["()", "torch"]


def test_nothing_is_registered_before_the_outermost_import_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Modules of a stand-in package import one another as transformers' do."""
    package = tmp_path / "stand_in"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "auto.py").write_text("SEEN = True\n")
    (package / "model.py").write_text("import stand_in.auto\nDONE = True\n")
    found: list[bool] = []

    def register() -> None:
        found.append(hasattr(sys.modules["stand_in.model"], "DONE"))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(auto_classes, "AUTO_CLASSES", "stand_in.auto")
    monkeypatch.setattr(auto_classes, "WATCHED", ("stand_in",))
    monkeypatch.setattr(auto_classes, "_register", register)
    monkeypatch.setattr(
        sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, auto_classes._Watch)]
    )
    auto_classes.register_with_transformers()
    auto_classes.register_with_transformers()
    assert len([f for f in sys.meta_path if isinstance(f, auto_classes._Watch)]) == 1
    module = __import__("stand_in.model").model
    assert found == [True]
    # The module's own loader is as it would be without the finder.
    assert isinstance(module, ModuleType)
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    __import__("stand_in.auto")
    auto_classes.register_with_transformers()  # imported by now: at once
    assert found == [True, True]
    for name in ("stand_in", "stand_in.auto", "stand_in.model"):
        del sys.modules[name]
