"""Exports to a folder, loaded here and where the package is not installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sa_models.export.export import export_model
from sa_models.plan import SharingPlan

WITHOUT_PACKAGE = """
import sys
sys.modules["sa_models"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
inside = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(inside) is type(model.model), type(inside)
ids = torch.arange(12)[None]
with torch.no_grad():
    assert torch.equal(inside(ids).last_hidden_state, model.model(ids).last_hidden_state)
    torch.save(model(ids).logits, sys.argv[2])
print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


def export(source: Any, plan: SharingPlan, folder: Path, **options: Any) -> Any:
    values = {"dtype": torch.float32, "shard_bytes": 10**9} | options
    return export_model(source, plan, folder, **values)


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values()), info
    return model


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def printed(code: str, work: Path, *arguments: str | Path, **environment: str) -> str:
    """What a process of its own prints, which keeps an export's modeling files in `work`."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=work,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_without_package(compact: Path, work: Path) -> None:
    """A process that cannot import the package computes and generates what this one does."""
    output = printed(WITHOUT_PACKAGE, work, compact, work / "logits.pt")
    model, ids = load(compact).eval(), torch.arange(12)[None]
    with torch.no_grad():
        assert (torch.load(work / "logits.pt") - model(ids).logits).abs().max() <= 1e-5
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    assert output.strip().splitlines()[-1] == str(tokens)
