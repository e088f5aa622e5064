"""Scores of a run's export, as it is or rounded: held-out perplexity, HellaSwag's margins, bytes.

    python tests/benchmarks/score_export.py RUN [--to int8] [--hellaswag FOLDER --limit 400]

Prints one line of JSON. Rounding is to nearest and back, so that it is measured on any machine:

==========  ========================================================================================
int8        projections of the layers, one scale a row, symmetric (torchao's Int8WeightOnlyConfig)
int4        projections of the layers, one scale and zero for 32 inputs of a row
cache-int8  keys and values as they are cached, one scale a head and token, symmetric
==========  ========================================================================================

Bytes count what such a file stores: weights, scales and zeros in bf16, all else as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sa_models.export.quantized_folder import is_projection
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from train.commands.evaluate.lm_eval_data import LocalTask
from train.common.progress import bar
from train.common.run_files import RECIPE_FILE
from train.data.blocks import prepare_data
from train.evaluation.models import export_of, open_folder
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_model
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import load_recipe

KINDS = ("int8", "int4", "cache-int8")
GROUP = 32
SCALE_BYTES = 2


def to_int8(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 255 steps of each row and back: (rows, columns), or any (..., columns)."""
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def to_int4(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 16 steps between least and largest of 32 columns of each row, and back."""
    groups = weight.unflatten(-1, (-1, GROUP))
    least = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - least) / 15).clamp_min(1e-12)
    return (((groups - least) / scale).round() * scale + least).flatten(-2)


def weight_bytes(shape: Sequence[int], width: int, name: str, to: str | None) -> int:
    """Bytes that a tensor takes: of ``width`` bytes an element, or rounded."""
    count = torch.Size(shape).numel()
    if to not in ("int8", "int4") or not is_projection(name):
        return count * width
    if to == "int8":
        return count + shape[0] * SCALE_BYTES
    return count // 2 + count // GROUP * 2 * SCALE_BYTES


def cache_bytes(config: Any, to: str | None) -> dict[str, int]:
    """Bytes of a token's keys and values: of the base in bf16, and as they are stored."""
    plan = getattr(config, "plan", SharingPlan())
    savings = plan.savings(config)
    count = savings.stored_cache
    stored = count + SCALE_BYTES * count // HeadLayout.from_config(config).head_dim
    return {"base": 2 * savings.base_cache, "stored": stored if to == "cache-int8" else 2 * count}


def _cached_in_int8(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return sdpa_attention_forward(module, query, to_int8(key), to_int8(value), *rest, **options)


AttentionInterface.register("cache_int8", _cached_in_int8)
AttentionMaskInterface.register("cache_int8", sdpa_mask)


@torch.no_grad()
def rounded(model: Any, to: str | None) -> Any:
    """The model, its weights rounded in place, or with rounded keys and values."""
    if to == "cache-int8":
        model.set_attn_implementation("cache_int8")
    elif to is not None:
        step = to_int8 if to == "int8" else to_int4
        for name, parameter in model.named_parameters():
            if is_projection(name) and parameter.numel():
                parameter.copy_(step(parameter))
    return model.eval().requires_grad_(False)


# --- HellaSwag ------------------------------------------------------------------------------------


def cleaned(text: str) -> str:
    """As lm-eval's hellaswag cleans contexts and endings."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@torch.no_grad()
def margins(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each question how far the right ending lies above the best wrong one, without examples.

    Nats per character, the quantity that lm-eval's acc_norm compares: above 0 is right. A context
    is read once, its four endings go on from its cache.
    """
    found: list[float] = []
    with bar("HellaSwag") as advance:
        for row in rows:
            context = cleaned(
                f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            )
            endings = [cleaned(ending) for ending in row["endings"]]
            scores = _endings(model, tokenizer, context, endings)
            norm = [score / len(e) for score, e in zip(scores, endings, strict=True)]
            right = norm.pop(row["label"])
            found.append(right - max(norm))
            advance(len(found), len(rows))
    return found


def _endings(model: Any, tokenizer: Any, context: str, endings: Sequence[str]) -> list[float]:
    """Log-likelihoods in nats, of a space and each ending after the context."""
    begun = tokenizer(context)["input_ids"]
    whole = [tokenizer(f"{context} {ending}")["input_ids"] for ending in endings]
    rest = [ids[len(begun) :] for ids in whole]  # as lm-eval cuts
    first = model(torch.tensor([begun]), use_cache=True)
    longest = max(map(len, rest))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest])
    cache = first.past_key_values
    cache.batch_repeat_interleave(len(rest))
    after = model(padded, past_key_values=cache, use_cache=True).logits
    last = first.logits[:, -1:].expand(len(rest), -1, -1)
    likely = log_softmax(torch.cat([last, after[:, :-1]], dim=1).float(), dim=-1)
    each = likely.gather(-1, padded[..., None])[..., 0]
    return [float(row[: len(ids)].sum()) for row, ids in zip(each, rest, strict=True)]


def score(
    run: Path, to: str | None = None, hellaswag: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """What the module says, of the export of a run."""
    folder = export_of(run)
    assert folder is not None
    weights, recipe = open_folder(folder), load_recipe(run / RECIPE_FILE)
    tokenizer = load_tokenizer(str(folder))
    model = rounded(load_model(folder, "sdpa"), to)
    blocks = prepare_data(recipe, tokenizer, needed_blocks=1, vocab_size=weights.config.vocab_size)
    made = {
        "perplexity": perplexity(
            model, blocks[1], recipe.evaluate.batch_size, recipe.evaluate.blocks
        ).perplexity,
        "bytes": {
            "base": sum(weight_bytes(weights.shape(n), 2, n, None) for n in weights.names()),
            "compact": sum(weight_bytes(weights.shape(n), 2, n, to) for n in weights.names()),
        },
        "cache": cache_bytes(weights.config, to),
    }
    if hellaswag is not None:
        rows = LocalTask(hellaswag).rows("validation")
        assert rows is not None, f"{hellaswag} has no hellaswag_val*.txt"
        made["margins"] = [round(m, 5) for m in margins(model, tokenizer, rows[:limit])]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", choices=KINDS)
    parser.add_argument("--hellaswag", type=Path, help="the folder with hellaswag_val*.txt")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    print(json.dumps(score(**vars(arguments))))


if __name__ == "__main__":
    main()
