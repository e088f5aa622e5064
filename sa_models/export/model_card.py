"""The model card (``README.md``) of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sa_models.entry import NEEDED
from sa_models.spans import ranges

USAGE = {
    "compact": f"""\
What is shared is stored, and held in memory, once; a removed unit not at all. With `postshare`
installed:

```python
import sa_models
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without it, the modeling files in this folder do the same: read them, then pass
`trust_remote_code=True`. Both need transformers {NEEDED} or newer. `AutoModel` gives the hidden
states. The tokenizer needs no code; so that nobody is asked whether to run any, load it with
`AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)`.
""",
    "dense": """\
A stock `LlamaForCausalLM` with full-size tensors: it loads in every tool that loads a Llama, also
in those that read a config as transformers 4 does. Shared units are stored where each is used,
removed ones as zeros, factors as their products.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
""",
    "adapter": """\
A PEFT adapter (LoRA) that gives tied units of the compact model back a part of what they lost:

```python
import sa_models
from peft import PeftModel
from transformers import AutoModelForCausalLM

compact = AutoModelForCausalLM.from_pretrained("path/to/the/compact/folder")
model = PeftModel.from_pretrained(compact, "path/to/this/folder")
```

Several adapters may be loaded on one compact model. None can be merged into it: a tied unit has no
weights of its own there. The dense export has this one merged.
""",
}
QUANTIZED = {
    "int8": "Install torchao as well: it holds and computes the int8 weights.\n",
    "int4": """\
Install torchao as well, and its GPU kernels; or compute with the values that the weights stand for:

```python
from sa_models.export.quantized_folder import load_dequantized

model = load_dequantized("path/to/this/folder")
```
""",
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown of the card.

    Args:
        manifest: the manifest, of which "files" is not used.
    """
    notes, kind = manifest["notes"], manifest["format"]
    base = notes.get("base_model")
    parts = [
        _front_matter(base, "peft" if kind == "adapter" else "transformers"),
        f"# {notes.get('name', 'Shared Llama')}, {kind} export\n",
        f"{f'`{base}`' if base else 'A Llama'} with shared attention, made by `postshare`.\n",
        "## Use\n",
        USAGE[kind],
        *([QUANTIZED[manifest["quantization"]["to"]]] if "quantization" in manifest else []),
        "## What is shared\n",
        _table(("", "value"), _shared_rows(manifest)),
    ]
    if notes.get("numbers"):
        rows = [(f"`{name}`", _text(value)) for name, value in _flatten(notes["numbers"])]
        parts += ["## Numbers\n", _table(("measured", "value"), rows)]
    if notes.get("recipe"):
        recipe = json.dumps(notes["recipe"], indent=2)
        parts += ["## Recipe\n", f"```json\n{recipe}\n```\n"]
    parts += [
        "## Files\n",
        "`manifest.json` has the SHA-256 of every file, the sharing plan and the versions that "
        "made them.\n",
    ]
    return "\n".join(parts)


def _front_matter(base: str | None, library: str) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    lines += ["tags:", "- llama", "- postshare"]
    # The hub refuses a card whose base_model is no name of its own.
    if base and base.count("/") == 1 and not base.startswith(("/", ".", "~")):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "---\n"])


def _shared_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    heads, tensors = manifest["heads"], manifest["tensors"]
    projections = sorted(
        {p for tie in manifest["plan"]["ties"] for p in tie["projections"]}, key="qkvo".index
    )
    plan, cache = manifest["plan"], manifest["cache"]
    rows = []
    if plan["ties"]:
        merged = {
            "copy": "its source's",
            "mean": "the mean",
            "aligned_mean": "the mean, in the source's gauge",
            "absorb": "its source's, kept o adapted",
            "weighted_mean": "the mean by Fisher information, in the source's gauge",
            "least_squares": "the least-squares fit to all, in the source's gauge",
        }[manifest["merge"]]
        rows += [
            ("attention heads tied", f"{heads['tied']} of {heads['total']}"),
            ("projections", ", ".join(projections)),
            ("a shared unit is", merged),
        ]
    if plan["removed"]:
        rows.append(("attention heads removed", f"{heads['removed']} of {heads['total']}"))
    if heads.get("dropped_layers"):
        rows.append(("layers without attention", f"{heads['dropped_layers']}"))
    for span in plan["spans"]:
        what = "attention weights" if span["share"] == "attention" else "keys and values"
        matched = ", heads matched" if span["head_map"] else ""
        layers = ranges(tuple(span["followers"]))
        one = len(span["followers"]) == 1
        what = f"{'reuses' if one else 'reuse'} the {what} of layer {span['leader']}{matched}"
        rows.append((f"{'layer' if one else 'layers'} {layers}", what))
    if basis := plan.get("basis"):
        ranks = "; ".join(
            f"{p} {min(found)}" + (f" to {max(found)}" if max(found) > min(found) else "")
            for p, found in basis["ranks"].items()
        )
        what = f"coefficients of each layer times a basis of {basis['layers']} adjacent layers"
        rows.append(("q, k and v", f"{what} (Basis Sharing; ranks {ranks})"))
    if manifest["leaders"] == "mean":
        rows.append(("keys and values of leaders", "began as the mean over the layers they serve"))
    if plan["kv_heads"] is not None:
        rows.append(("KV heads of a layer", f"{plan['kv_heads']}, mean-pooled from the base's"))
    if cache["bytes_per_token"] != cache["base_bytes_per_token"]:
        kept = cache["bytes_per_token"] / cache["base_bytes_per_token"]
        rows.append(
            ("bytes of KV cache for a token", f"{cache['bytes_per_token']:,} ({kept:.1%} of base)")
        )
    stored = manifest["dtype"]
    if "quantization" in manifest:
        to, group = manifest["quantization"]["to"], manifest["quantization"]["group"]
        stored = f"{to}, one scale for {f'{group} inputs of a row' if group else 'a row'}"
        stored += f"; embeddings and norms {manifest['dtype']}"
    return [
        *rows,
        ("attention parameters no longer needed", f"{heads['stored_ratio']:.1%}"),
        ("parameters of the base", f"{tensors['base_parameters']:,}"),
        ("parameters in this folder", f"{tensors['parameters']:,}"),
        ("bytes of weights in this folder", f"{tensors['bytes']:,} ({stored})"),
        ("plan (SHA-256)", f"`{manifest['plan_sha256']}`"),
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)]) + "\n"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
