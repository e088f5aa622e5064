"""Names of llama.cpp's pre-tokenizers, by the regular expressions that cut a text before merging.

A ``tokenizer.json`` says how its text is cut; llama.cpp has these cuts in its code, and a file
names one (``tokenizer.ggml.pre``). That each is the same is tested in llama.cpp itself, on texts
made to tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ``ByteLevel`` itself cuts by."""
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _TAIL
QWEN2 = _WORDS + r"|\p{N}" + _TAIL
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")

KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    (DEEPSEEK_CODER, False): "deepseek-coder",
}
"""By the expressions, one applied after the other, and whether a piece that is a token stays one
whatever the merges say (``ignore_merges``)."""


def pre_tokenizer_name(model: dict[str, Any], pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a byte-level tokenizer's cuts; None where none is known.

    Args:
        model, pre_tokenizer: those of a ``tokenizer.json``.
    """
    try:
        cuts = tuple(_cuts(pre_tokenizer or {}))
    except LookupError:
        return None
    return KNOWN.get((cuts, bool(model.get("ignore_merges"))))


def _cuts(step: dict[str, Any]) -> Iterator[str]:
    """Raises LookupError for a step that cuts by no expression."""
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _cuts(inner)
    elif kind == "Digits" and step["individual_digits"]:
        yield r"\p{N}"
    elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        yield step["pattern"]["Regex"]
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield GPT2
    else:
        raise LookupError(kind)


__all__ = ["KNOWN", "pre_tokenizer_name"]
