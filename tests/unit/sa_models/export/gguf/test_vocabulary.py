"""Tokenizers as GGUF keys; that llama.cpp then makes the same tokens is test_llama_cpp.py's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.normalizers import NFC, Prepend, Replace, Sequence
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sa_models.errors import PostshareError
from sa_models.export.gguf import pre_tokenizers as known
from sa_models.export.gguf.vocabulary import vocabulary
from train.demo import demo_base_path

LETTERS = ["<unk>", "<s>", "</s>", "a", "b", "c", "Ġ", "ab", "abc", "Ġa"]
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def wrapped(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(named | options))


def byte_level(cuts: Any = CUT, ignore_merges: bool = False, **options: Any) -> Any:
    vocab = {text: number for number, text in enumerate(LETTERS)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = cuts, decoders.ByteLevel()
    return wrapped(backend, **options)


PIECES = ["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc"]
PAIRS = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab"), ("b", "c")]


def sentencepiece(
    merges: list[tuple[str, str]] = PAIRS, normalizer: Any = None, cuts: Any = None
) -> Any:
    vocab = {text: number for number, text in enumerate(PIECES)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if cuts is None:
        backend.normalizer = normalizer or Sequence([Prepend("▁"), Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = cuts
    return wrapped(backend)


def config(size: int = 16, **options: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=size, hidden_size=8, num_attention_heads=2, **options)


def refusal(tokenizer: Any, size: int = 16, **options: Any) -> str:
    with pytest.raises(PostshareError) as caught:
        vocabulary(tokenizer, config(size), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_byte_level_tokens_types_and_merges() -> None:
    tokenizer = byte_level(pad_token="<unk>", chat_template="{{ messages }}")
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    keys = vocabulary(tokenizer, config(12))
    assert keys == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*LETTERS, "<tool>", "[PAD11]"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 5],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_sentencepiece_tokens_types_and_scores() -> None:
    keys = vocabulary(sentencepiece(), config(14))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.tokens"] == [*PIECES, "[PAD13]"]
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 6, *[1] * 8, 5]
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(PIECES, keys["tokenizer.ggml.scores"], strict=False))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"] > scores["bc"] > scores["a"]


@pytest.mark.parametrize(("scheme", "adds"), [("first", True), ("always", True), ("never", False)])
def test_a_metaspace_that_does_not_cut_is_llama_2s(scheme: str, adds: bool) -> None:
    cuts = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    keys = vocabulary(sentencepiece(cuts=cuts), config())
    assert keys["tokenizer.ggml.add_space_prefix"] is adds
    cuts = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=True)
    assert "in another way than Llama 2's" in refusal(sentencepiece(cuts=cuts))


def test_spaces_that_are_not_put_before_a_text() -> None:
    keys = vocabulary(sentencepiece(normalizer=Replace(" ", "▁")), config())
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert "in another way than Llama 2's" in refusal(sentencepiece(normalizer=NFC()))


def test_merges_that_scores_cannot_say_are_refused() -> None:
    missing = [pair for pair in PAIRS if pair != ("▁", "ab")]
    assert "leave '▁' and 'ab' apart, which llama.cpp would make '▁ab'" in refusal(
        sentencepiece(missing)
    )
    torn = [PAIRS[2], *PAIRS[:2], *PAIRS[3:]]  # "▁ab" before "ab", and after it
    assert "make '▁ab' at two places" in refusal(sentencepiece(torn))


def test_what_is_put_around_a_text_is_asked_of_the_tokenizer() -> None:
    for template, adds in (
        ("<s> $A", (True, False)),
        ("$A </s>", (False, True)),
        ("<s> $A </s>", (True, True)),
    ):
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        keys = vocabulary(tokenizer, config())
        said = (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"])
        assert said == adds
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert "it makes [2, 1, 3] of the text 'a', which alone is [3]" in refusal(tokenizer)


def test_all_that_ends_an_answer_is_named() -> None:
    """As Llama 3: its own end, then those of config.json and generation_config.json."""
    keys = vocabulary(byte_level(), config(eos_token_id=[2, 5]), stops=[2, 7])
    ends = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [2, 5, 7]
    assert "4 tokens end an answer" in refusal(byte_level(), stops=[4, 5, 6])


def test_several_chat_templates_are_named() -> None:
    keys = vocabulary(byte_level(chat_template={"default": "D", "tool": "T"}), config())
    assert keys["tokenizer.chat_template"] == "D"
    assert keys["tokenizer.chat_template.tool"] == "T"
    assert keys["tokenizer.chat_templates"] == ["tool"]


@pytest.mark.parametrize(
    ("cuts", "ignore_merges", "name"),
    [
        (CUT, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), CUT]), False, "smollm"),
        (known.LLAMA3, True, "llama-bpe"),
        (known.LLAMA3, False, "smaug-bpe"),
        (known.QWEN2, False, "qwen2"),
        (CUT, True, None),
        (known.QWEN2, True, None),
        (known.LLAMA3.replace("{1,3}", "{1,2}"), True, None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), CUT]), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True), False, None),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), CUT]), False, None),
    ],
)
def test_cuts_have_llama_cpps_name(cuts: Any, ignore_merges: bool, name: str | None) -> None:
    if isinstance(cuts, str):
        cuts = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cuts), behavior="isolated"), BYTES]
        )
    backend = json.loads(byte_level(cuts, ignore_merges).backend_tokenizer.to_str())
    assert known.pre_tokenizer_name(backend["model"], backend["pre_tokenizer"]) == name


def test_unknown_cuts_are_an_error_that_names_pre() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    said = refusal(tokenizer, 2048)
    assert "cuts text in a way of which llama.cpp's name is not known here" in said
    assert said.endswith("postshare gguf FOLDER --pre NAME")
    keys = vocabulary(tokenizer, config(2048), pre="gpt-2")
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    normalized = byte_level()
    normalized.backend_tokenizer.normalizer = NFC()
    assert "--pre" in refusal(normalized)


def test_other_tokenizers_are_refused() -> None:
    assert "it is a WordLevel and no BPE" in refusal(
        wrapped(Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>")))
    )
    greedy = byte_level()
    greedy.backend_tokenizer.add_special_tokens([AddedToken("<x>", lstrip=True)])
    assert "'<x>' takes in the spaces beside it" in refusal(greedy)
    assert "'Ġa' has number 9, and the model embeds 9" in refusal(byte_level(), 9)
    assert "--pre gpt-2 goes with byte-level tokenizers" in refusal(sentencepiece(), pre="gpt-2")
