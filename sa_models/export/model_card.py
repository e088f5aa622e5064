"""The model card (``README.md``) of an exported folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from sa_models.entry import NEEDED
from sa_models.spans import ranges

USAGE = {
    "compact": f"""\
With `postshare` installed, which holds what is shared in memory once:

```python
import sa_models
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without it, read the modeling files here, then pass `trust_remote_code=True`; to `AutoTokenizer`
`trust_remote_code=False`: it needs no code, and would ask. Needs transformers {NEEDED} or newer.
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
    "gguf": """\
One file, which llama.cpp and what is built on it load as they are:

```bash
llama-server -m {file}
```

GGUF knows no sharing: shared units are stored where each is used, factors as their products. Of
removed units nothing is stored.
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
FEWER_HEADS = {
    "compact": "The dense export holds the same tensors, and needs nothing of ours.\n",
    "dense": """\
A stock `{architecture}` with {heads} attention heads and {kv_heads} KV heads in every layer, and no
zeros: it loads in every tool that loads a Llama. Tensor parallel sizes that divide its heads:
{tensor_parallel}.{why}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
""",
}
WHY_MISTRAL = """
transformers 5 refuses a Llama whose number of heads does not divide the hidden size; Mistral's
class, without a sliding window, computes the same."""
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
LIBRARIES = {"adapter": "peft", "gguf": "gguf"}
"""By which the hub says how a folder is used."""
MOST_SPANS = 3
"""That have a row each; a card has at most 60 lines."""
PERPLEXITY_OF = {
    "base": "the base",
    "continued": "*continued*: the same training, nothing shared",
    "direct": "this plan, not trained",
    "post": "this model",
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown of the card.

    Args:
        manifest: the manifest, of which "files" is not used.
    """
    notes, kind = manifest["notes"], manifest["format"]
    base = notes.get("base_model")
    parts = [
        _front_matter(base, LIBRARIES.get(kind, "transformers"), notes.get("licence")),
        f"# {notes.get('name', 'Shared Llama')}, {kind} export\n",
        f"{f'`{base}`' if base else 'A Llama'} with shared attention, made by `postshare`.\n",
        "## Use\n",
        *_usage(manifest),
        *([QUANTIZED[manifest["quantization"]["to"]]] if "quantization" in manifest else []),
        "## What is shared\n",
        _table(("", "value"), _shared_rows(manifest)),
    ]
    if notes.get("figures") or notes.get("numbers"):
        head = ("the compact export; stock is the base as a dense Llama", "value")
        rows = [*(notes.get("figures") or {}).items(), *_perplexities(notes.get("numbers") or {})]
        parts += ["## Figures\n", _table(head, rows)]
    file = notes.get("recipe_file")
    recipe = f"`{file}` is what it was made by; " if file else ""
    parts += [
        f"{recipe}`manifest.json` has the SHA-256 of every file, the resolved recipe, the sharing "
        "plan and the versions that made them.\n",
    ]
    return "\n".join(parts)


def gguf_name(name: str | None, kind: str | None) -> str:
    """The file in the folder of a GGUF export."""
    return f"{name or 'model'}-{kind}.gguf"


def _usage(manifest: Mapping[str, Any]) -> Iterator[str]:
    kind, stock, notes = manifest["format"], manifest.get("stock"), manifest["notes"]
    if kind != "dense" or stock is None:
        yield USAGE[kind].replace("{file}", gguf_name(notes.get("name"), manifest.get("gguf")))
    if stock is not None and kind in FEWER_HEADS:
        sizes = ", ".join(map(str, stock["tensor_parallel"]))
        why = WHY_MISTRAL if stock["architecture"] == "MistralForCausalLM" else ""
        yield FEWER_HEADS[kind].format(**stock | {"tensor_parallel": sizes}, why=why)


def _front_matter(base: str | None, library: str, licence: Mapping[str, str] | None) -> str:
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    # The hub refuses a card whose base_model is no name of its own.
    if base and base.count("/") == 1 and not base.startswith(("/", ".", "~")):
        values["base_model"] = base
    values |= licence or {}
    lines = f"{yaml.safe_dump(values, sort_keys=False)}tags: [llama, postshare, attention-sharing]"
    return f"---\n{lines}\n---\n"


def _perplexities(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in (numbers.get("perplexity") or {}).items():
        if value is not None:
            yield f"perplexity of {PERPLEXITY_OF.get(name, name)}", f"{value:.2f}"


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
    spans = plan["spans"]
    if len(spans) > MOST_SPANS:
        pairs = (f"{ranges(tuple(s['followers']))} of {s['leader']}" for s in spans)
        shared = sorted({s["share"] for s in spans})
        rows.append((f"layers that reuse another's {' or '.join(shared)}", "; ".join(pairs)))
        spans = []
    for span in spans:
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
    figures = manifest["notes"].get("figures")  # have this as well
    if cache["bytes_per_token"] != cache["base_bytes_per_token"] and not figures:
        kept = cache["bytes_per_token"] / cache["base_bytes_per_token"]
        rows.append(
            ("bytes of KV cache for a token", f"{cache['bytes_per_token']:,} ({kept:.1%} of base)")
        )
    stored = manifest["dtype"]
    if kind := manifest.get("gguf"):
        stored = f"matrices {kind}, norms f32"
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
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)]) + "\n"
