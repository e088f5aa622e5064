"""A tokenizer as the keys of a GGUF header, by which llama.cpp cuts a text into the same tokens.

``llama``: BPE on characters with a byte for what is no token, spaces as ▁ (SentencePiece; Llama 2).
``gpt2``: BPE on bytes, after a text was cut by regular expressions (Llama 3, SmolLM2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerBase

from sa_models.errors import PostshareError
from sa_models.export.gguf.pre_tokenizers import KNOWN, pre_tokenizer_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp numbers them."""
SPACE = "▁"
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of the tokens that end an answer."""
_PROBE = "a"


def vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    config: LlamaConfig,
    stops: Sequence[int] = (),
    pre: str | None = None,
) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a file.

    Args:
        config: of the model, whose vocabulary may be larger.
        stops: tokens that end an answer, beside the tokenizer's own.
        pre: llama.cpp's name of the cuts of a byte-level tokenizer, taken as it is; None: it is
            found.

    Raises:
        PostshareError: llama.cpp would make other tokens of a text, or the model has no embedding
            for a token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _inexpressible(f"{type(tokenizer).__name__} has no tokenizer.json")
    value = json.loads(backend.to_str())
    model = value["model"]
    if model["type"] != "BPE":
        raise _inexpressible(f"it is a {model['type']} and no BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _inexpressible(f"it has {key}")
    for token in value["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _inexpressible(f"its token {token['content']!r} takes in the spaces beside it")
    tokens, kinds = _tokens(value, tokenizer, config.vocab_size)
    found: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if model.get("byte_fallback"):
        if pre is not None:
            raise PostshareError(
                f"--pre {pre} goes with byte-level tokenizers, and this one is of the kind of "
                "Llama 2; remove it"
            )
        found |= {"ggml.model": "llama", "ggml.pre": "default"}
        found |= {"ggml.scores": _scores(value, tokens)}
        found |= {"ggml.add_space_prefix": _adds_space(value)}
    else:
        found |= {"ggml.model": "gpt2", "ggml.pre": pre or _pre(value)}
        found |= {"ggml.merges": [" ".join(pair) for pair in _merges(model)]}
    found |= {f"ggml.{key}": token for key, token in _special(tokenizer, config, stops).items()}
    found |= _templates(tokenizer)
    return {f"tokenizer.{key}": value for key, value in found.items()}


def _inexpressible(reason: str) -> PostshareError:
    return PostshareError(
        f"the tokenizer cannot be written as GGUF: {reason}; leave GGUF out, or use "
        "another tokenizer"
    )


def _tokens(
    value: dict[str, Any], tokenizer: PreTrainedTokenizerBase, size: int
) -> tuple[list[str], list[int]]:
    """Text and kind of every token; ids that no token has are named as llama.cpp's tools do."""
    texts = {number: text for text, number in value["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    if value["model"].get("byte_fallback"):
        kinds |= {n: BYTE for n, text in texts.items() if _is_byte(text)}
    for token in value["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    if max(texts) >= size:
        raise _inexpressible(
            f"its token {texts[max(texts)]!r} has number {max(texts)}, and the model embeds {size}"
        )
    for number in range(size):
        texts.setdefault(number, f"[PAD{number}]")
        kinds.setdefault(number, UNUSED)
    return [texts[n] for n in range(size)], [kinds[n] for n in range(size)]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(first, second) for first, second in pairs]


def _scores(value: dict[str, Any], tokens: Sequence[str]) -> list[float]:
    """A score for each token: llama.cpp merges whatever two pieces make the token that has most.

    Raises:
        PostshareError: the merges are not in an order of the tokens that they make, or leave a pair
            out that makes one.
    """
    merges = _merges(value["model"])
    made = [token for token, _ in groupby(first + second for first, second in merges)]
    rank = {token: place for place, token in enumerate(made)}
    if len(rank) < len(made):
        again = next(token for place, token in enumerate(made) if rank[token] != place)
        raise _inexpressible(f"its merges make {again!r} at two places of their order")
    added = {token["content"] for token in value["added_tokens"]}
    pairs, known = set(merges), value["model"]["vocab"].keys()
    for token in known - added:
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair not in pairs and known >= set(pair):
                raise _inexpressible(
                    f"its merges leave {pair[0]!r} and {pair[1]!r} apart, which llama.cpp would "
                    f"make {token!r}"
                )
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _adds_space(value: dict[str, Any]) -> bool:
    """Whether a space is put before a text. Raises PostshareError for other changes of it."""
    steps = value["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = steps["normalizers"] if steps["type"] == "Sequence" else [steps]
    said = [(s["type"], s.get("prepend") or s.get("content"), s.get("pattern")) for s in steps]
    replaces = ("Replace", SPACE, {"String": " "})
    cuts = value["pre_tokenizer"]
    if cuts is None and said in ([("Prepend", SPACE, None), replaces], [replaces]):
        return len(said) == 2
    spaces = cuts is not None and cuts["type"] == "Metaspace" and not said
    if spaces and cuts["replacement"] == SPACE and not cuts["split"]:
        return cuts["prepend_scheme"] != "never"
    raise _inexpressible("it changes or cuts a text in another way than Llama 2's")


def _pre(value: dict[str, Any]) -> str:
    name = pre_tokenizer_name(value["model"], value["pre_tokenizer"])
    if name is None or value["normalizer"] is not None:
        known = ", ".join(KNOWN.values())
        raise PostshareError(
            "the tokenizer cuts text in a way of which llama.cpp's name is not known here (known: "
            f"{known}); leave gguf out of export.formats, and name the nearest yourself: "
            "postshare gguf FOLDER --pre NAME"
        )
    return name


def _special(
    tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, stops: Sequence[int]
) -> dict[str, Any]:
    """Numbers of the special tokens, and which of them are put around a text."""
    own = config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *stops]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > len(STOPS):
        raise _inexpressible(f"{len(ends)} tokens end an answer, and GGUF names {len(STOPS)}")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    named = {
        "bos_token_id": start,
        **dict(zip(STOPS, ends, strict=False)),
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:at], whole[at + len(plain) :]
    if before not in ([], [start]) or after not in ([], ends[:1]):
        raise _inexpressible(f"it makes {whole} of the text {_PROBE!r}, which alone is {plain}")
    return {
        **{key: number for key, number in named.items() if number is not None},
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
    }


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template: Any = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"chat_template": template}
    others = sorted(name for name in template if name != "default")
    found = {f"chat_template.{name}": template[name] for name in others}
    if "default" in template:
        found["chat_template"] = template["default"]
    return {**found, "chat_templates": others} if others else found


__all__ = ["vocabulary"]
