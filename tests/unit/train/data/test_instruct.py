from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.in_memory import packed as packed_ids
from train.data import chat, instruct
from train.data.blocks import Blocks, PositionSampler, prepare_data
from train.data.record_blocks import RecordBlocks, first_records
from train.evaluation.perplexity import perplexity
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import Recipe, validate
from train.stages.run import Run
from train.training.loop import predicted_tokens

pytestmark = pytest.mark.usefixtures("own_cache")

BOS, EOS, START, END = 0, 1, 2, 3
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(SPECIAL) + len(CHARACTERS)

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)

# Alpaca's prompts once more, as they look on paper.
PROMPT = """Below is an instruction that describes a task. Write a response that appropriately \
completes the request.

### Instruction:
{}

### Response:"""
PROMPT_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

### Instruction:
{}

### Input:
{}

### Response:"""


def letters(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for a character, and the special tokens: ids are read off the text."""
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def ids(text: str) -> list[int]:
    found = []
    while text:
        special = next((s for s in SPECIAL if text.startswith(s)), None)
        found.append(SPECIAL.index(special) if special else CHARACTERS.index(text[0]) + 4)
        text = text[len(special or text[0]) :]
    return found


def split(*pieces: str) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces of text, of which every second one is predicted."""
    inputs, labels = [], []
    for turn, piece in enumerate(pieces):
        inputs += ids(piece)
        labels += ids(piece) if turn % 2 else [IGNORED] * len(ids(piece))
    return inputs, labels


def recipe(style: str = "alpaca", model: str = "sdpa", micro: int = 1, **data: Any) -> Recipe:
    train = {"steps": 5, "batch_size": 2, "micro_batch_size": micro, "learning_rate": 1e-3}
    train |= {"precision": "bf16"} if model == "flash_attention_2" else {}
    return validate(
        {
            "name": "test",
            "model": {"path": "unused", "attention": model},
            "data": {"sequence_length": 256, "format": style} | data,
            "plan": {"strategy": "none"},
            "train": train,
        }
    )


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .json file with a list, as Alpaca's is, or a .jsonl file."""
    lines = path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)
    return str(path)


def prepare(
    tokenizer: PreTrainedTokenizerFast, style: str = "alpaca", **data: Any
) -> tuple[Blocks, Blocks]:
    return prepare_data(recipe(style, **data), tokenizer, needed_blocks=None, vocab_size=VOCABULARY)


def read(tmp_path: Path, rows: list[dict[str, Any]], style: str, **options: Any) -> Blocks:
    path = write(tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl", rows)
    template = options.pop("template", CHATML)
    return prepare(letters(template), style, train=path, validation=path, **options)[0]


def alpaca(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)

    def word() -> str:
        return "".join(draw.choice(list("abcdefg "), draw.integers(1, 30))).strip() or "a"

    return [
        {
            "instruction": f"{number} {word()}",
            "input": word() if draw.random() < 0.5 else "",
            "output": word(),
        }
        for number in range(count)
    ]


def talk(*contents: str, system: str | None = None) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    said = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(contents)]
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": first + said}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(PostshareError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- Alpaca -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False)])
def test_alpaca_predicts_output_and_eos_alone(tmp_path: Path, bos: bool, eos: bool) -> None:
    rows = [
        {"instruction": "Add {x}.", "input": "1 2", "output": "It is 3."},
        {"instruction": "Sing", "input": "", "output": " La"},
    ]
    blocks = read(tmp_path, rows, "alpaca", sequence_length=300, bos=bos, eos=eos)
    first, tail = "<s>" * bos, "</s>" * eos
    wanted = [
        split(first + PROMPT_WITH_INPUT.format("Add {x}.", "1 2"), "It is 3." + tail),
        split(first + PROMPT.format("Sing"), " La" + tail),
    ]
    assert len(blocks) == 2  # 261 and 163 tokens: both do not fit into 300
    for block, (inputs, labels) in zip((blocks[0], blocks[1]), wanted, strict=True):
        rest = 300 - len(inputs)
        assert block["input_ids"].tolist() == inputs + [0] * rest
        assert block["labels"].tolist() == labels + [IGNORED] * rest
        assert block["position_ids"].tolist() == [*range(len(inputs)), *range(rest)]
        assert {tensor.dtype for tensor in block.values()} == {torch.int64}


def test_input_may_be_absent(tmp_path: Path) -> None:
    (row,) = [{"instruction": "Sing", "output": "La"}]
    bare = read(tmp_path, [row], "alpaca")[0]
    assert (
        bare["input_ids"].tolist()
        == read(tmp_path, [row | {"input": ""}], "alpaca")[0]["input_ids"].tolist()
    )
    inputs, _ = split("<s>" + PROMPT.format("Sing"), "La</s>")
    assert bare["input_ids"].tolist()[: len(inputs)] == inputs


# --- packing ----------------------------------------------------------------------------------


def packed(lengths: list[int], prompts: list[int], block: int) -> RecordBlocks:
    """Record r is the tokens 100r, 100r + 1, ...; all after its prompt are predicted."""
    rows = [[100 * r + i for i in range(length)] for r, length in enumerate(lengths)]
    masks = [
        [int(i >= prompt) for i in range(length)]
        for length, prompt in zip(lengths, prompts, strict=True)
    ]
    return RecordBlocks(packed_ids(rows), packed_ids(masks), np.array(prompts), block)


def test_records_are_packed_whole_truncated_or_dropped() -> None:
    #          fits    to the end  new block  truncated  dropped  one response token left
    lengths = [3, 5, 4, 12, 20, 9]
    prompts = [1, 2, 3, 2, 8, 7]
    blocks = packed(lengths, prompts, 8)
    assert (blocks.records, blocks.truncated, blocks.dropped) == (5, 2, 1)
    rows = [{k: v.tolist() for k, v in blocks[i].items()} for i in range(len(blocks))]
    x = IGNORED
    assert [row["input_ids"] for row in rows] == [
        [0, 1, 2, 100, 101, 102, 103, 104],
        [200, 201, 202, 203, 0, 0, 0, 0],
        [300, 301, 302, 303, 304, 305, 306, 307],
        [500, 501, 502, 503, 504, 505, 506, 507],
    ]
    assert [row["labels"] for row in rows] == [
        [x, 1, 2, x, x, 102, 103, 104],
        [x, x, x, 203, x, x, x, x],
        [x, x, 302, 303, 304, 305, 306, 307],
        [x, x, x, x, x, x, x, 507],
    ]
    assert [row["position_ids"] for row in rows] == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 0, 1, 2, 3],
        [*range(8)],
        [*range(8)],
    ]
    assert blocks.said == (
        "5 records in 4 blocks of 8 tokens, 87.5% filled; 2 truncated to a block, "
        "1 dropped because their prompt fills one"
    )


def test_blocks_are_filled_greedily_in_order() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 33, 500)
    firsts = first_records(lengths, 32)
    used, wanted = 33, []
    for record, length in enumerate(lengths):  # one record at a time
        if used + length > 32:
            wanted.append(record)
            used = 0
        used += length
    assert firsts.tolist() == [*wanted, 500]
    assert first_records(np.zeros(0, dtype=np.int64), 32).tolist() == [0]


def test_truncation_and_dropping_are_said_per_source(tmp_path: Path) -> None:
    prompt = len(PROMPT.format("a")) + 1  # and BOS
    rows = [
        {"instruction": "a", "output": "b" * 50},
        {"instruction": "a", "output": "b"},
        {"instruction": "a" * 60, "output": "b"},
    ]
    blocks = read(tmp_path, rows, "alpaca", sequence_length=prompt + 10)
    (note,) = blocks.notes
    assert note.endswith(
        f"(training): 2 records in 2 blocks of {prompt + 10} tokens, 97.4% filled; "
        "1 truncated to a block, 1 dropped because their prompt fills one"
    ), note
    # A truncated record does not pretend to end: its last token is one of its output.
    assert blocks[0]["labels"].tolist() == [IGNORED] * prompt + ids("b" * 10)
    # One token of a response is predicted where there is room for one.
    assert len(read(tmp_path, rows[:1], "alpaca", sequence_length=prompt + 1)) == 1
    said = message(lambda: read(tmp_path, rows, "alpaca", sequence_length=prompt))
    assert f"prompts of all 3 records fill a block of {prompt} tokens" in said
    assert said.endswith(f"set data.sequence_length above {prompt}")


def test_the_run_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", alpaca(9))
    for is_main in (True, False):
        ranks: Any = SimpleNamespace(is_main=is_main, world=1)
        current = Run(recipe(train=path, validation=path, sequence_length=400), ranks)
        current.__dict__ |= {"tokenizer": letters(), "config": LlamaConfig(vocab_size=VOCABULARY)}
        current.on_main = lambda work: work()  # type: ignore[method-assign]
        assert len(current.blocks[0]) == len(current.blocks[1]) > 1
        said = capsys.readouterr().err.splitlines()
        numbers = f"{len(current.blocks[0])} training and {len(current.blocks[1])} validation"
        assert said[:1] == ([f"data      {numbers} blocks of 400 tokens"] if is_main else [])
        assert len(said) == (3 if is_main else 0)
    text = write(tmp_path / "t.jsonl", [{"text": "word " * 99}])
    assert prepare(letters(), "text", train=text, validation=text)[0].notes == ()


# --- what the model sees ----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_packed_loss_is_that_of_the_records_one_by_one(
    tmp_path: Path, attention: str, style: str
) -> None:
    model = tiny.model(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        attn_implementation=attention,
    ).eval()
    if style == "alpaca":
        rows: list[dict[str, Any]] = alpaca(7)
        pieces = [
            (
                "<s>" + PROMPT_WITH_INPUT.format(row["instruction"], row["input"])
                if row["input"]
                else "<s>" + PROMPT.format(row["instruction"]),
                row["output"] + "</s>",
            )
            for row in rows
        ]
    else:
        rows = [talk("ab", "cd", "e" * n, "f" * (2 * n + 1)) for n in range(1, 8)]
        user, answer = "<|im_start|>user\n", "<|im_start|>assistant\n"
        pieces = [
            (
                f"<s>{user}ab<|im_end|>\n{answer}",
                "cd<|im_end|>\n",
                f"{user}{'e' * n}<|im_end|>\n{answer}",
                f"{'f' * (2 * n + 1)}<|im_end|>\n",
            )
            for n in range(1, 8)
        ]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for record in pieces:
            inputs, labels = split(*record)
            logits = model(input_ids=torch.tensor([inputs]), use_cache=False).logits[0].double()
            for at in range(1, len(inputs)):
                if labels[at] != IGNORED:
                    total -= logits[at - 1].log_softmax(-1)[labels[at]].item()
                    tokens += 1
    blocks = read(tmp_path, rows, style, sequence_length=400)
    assert 1 < len(blocks) < 7
    batch = torch.utils.data.default_collate([blocks[i] for i in range(len(blocks))])
    assert predicted_tokens(batch) == tokens
    result = perplexity(model, blocks, batch_size=2, progress=False)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, abs=1e-5)


# --- chat -------------------------------------------------------------------------------------

TALK = talk("Hi", "Ho", "And?", " Bye ", system="Be")
BEFORE = (
    "<s><|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
)
BETWEEN = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        # Without marks, all that the template writes for a turn belongs to it.
        (CHATML, (BEFORE, "Ho<|im_end|>\n", BETWEEN, " Bye <|im_end|>\n")),
        (MARKED, (BEFORE, "Ho<|im_end|>", "\n" + BETWEEN, " Bye <|im_end|>", "\n")),
    ],
)
def test_chat_predicts_the_assistant_alone(
    tmp_path: Path, template: str, pieces: tuple[str, ...]
) -> None:
    block = read(tmp_path, [TALK], "chat", template=template, sequence_length=200)[0]
    inputs, labels = split(*pieces)
    tokenizer = letters(template)
    assert inputs == tokenizer.apply_chat_template(TALK["messages"], return_dict=False)
    assert block["input_ids"].tolist()[: len(inputs)] == inputs
    assert block["labels"].tolist() == labels + [IGNORED] * (200 - len(inputs))
    if template == MARKED:
        given = tokenizer.apply_chat_template(
            TALK["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        assert given["assistant_masks"] == [int(label != IGNORED) for label in labels]


def test_fields_that_a_message_lacks_are_not_shown_to_the_template(tmp_path: Path) -> None:
    """A table gives every message the fields of all others."""
    rows = [talk("a", "b"), talk("c", "d")]
    rows[1]["messages"][0]["name"] = "Ann"
    template = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '=' + m.name if 'name' in m }}")
    block = read(tmp_path, rows, "chat", template=template)[0]
    text = "".join([*SPECIAL, *CHARACTERS][i] for i in block["input_ids"])
    assert "user\na" in text
    assert "user=Ann\nc" in text


def test_the_first_token_of_a_record_is_never_predicted(tmp_path: Path) -> None:
    template = MARKED.replace("{{ bos_token }}", "").replace("<|im_start|>{{ m.role }}\n", "")
    rows = [{"messages": [{"role": "assistant", "content": "abc"}]}]
    block = read(tmp_path, rows, "chat", template=template, sequence_length=5)[0]
    assert block["input_ids"].tolist() == [*ids("abc"), END, ids("\n")[0]]
    assert block["labels"].tolist() == [IGNORED, *ids("bc"), END, IGNORED]


def test_a_token_on_the_border_belongs_to_the_response(tmp_path: Path) -> None:
    """Byte-level BPE takes a space with the word after it, and may leave one of two alone."""
    from tokenizers import processors

    space = "\u0120"
    vocabulary = {token: i for i, token in enumerate(["a", ":", "h", space, space + "h", "\u010a"])}
    backend = Tokenizer(models.BPE(vocabulary, [(space, "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    template = (
        "{% for m in messages %}{{ 'a:' if m.role == 'user' else 'h: ' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}h: {% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    encoder = chat.ChatEncoder.build(tokenizer, bos=True, eos=True)
    rows = encoder({"messages": [talk("a", c)["messages"] for c in ("h", " h")]}, [0, 1])
    assert rows["input_ids"] == [[0, 1, 0, 2, 1, 4], [0, 1, 0, 2, 1, 3, 4]]
    # "h:" + " h": the last token covers the border; "h:" + " " + " h": the lone space is prompt.
    assert rows["predicted"] == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1]]
    assert rows["prompt"] == [5, 6]


def test_dates_do_not_change_from_day_to_day(tmp_path: Path) -> None:
    clock = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    )
    block = read(tmp_path, [talk("a", "b")], "chat", template=clock + "{{ date_string }}" + CHATML)
    assert block[0]["input_ids"].tolist()[:11] == ids("26 Jul 2024")
    said = message(
        lambda: read(tmp_path, [talk("a", "b")], "chat", template="{{ strftime_now('%d') }}")
    )
    assert "reads the clock" in said
    assert "write a fixed date" in said


# --- bad records ------------------------------------------------------------------------------

GOOD = {"instruction": "a", "input": "", "output": "b"}
OTHER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("style", "rows", "parts"),
    [
        (
            "alpaca",
            [{"prompt": "a", "completion": "b"}],
            ["record 0 has no 'instruction' (found: prompt, completion)", "rename or add it"],
        ),
        (
            "alpaca",
            [GOOD, {"instruction": "a", "input": "b"}],
            ["record 1 has no 'output' (found: instruction, input)", "remove the record"],
        ),
        ("alpaca", [GOOD, GOOD | {"output": " "}], ["'output' of record 1 is empty; fill it or"]),
        ("alpaca", [GOOD, GOOD | {"instruction": ""}], ["'instruction' of record 1 is empty"]),
        ("alpaca", [GOOD | {"output": 3}], ["'output' of record 0 is no text but int; correct"]),
        ("alpaca", [GOOD | {"input": 3}], ["'input' of record 0 is no text but int"]),
        ("alpaca", [TALK], ["record 0 has no 'instruction' (found: messages)", "data.format"]),
        ("chat", [GOOD], ["record 0 has no 'messages' (found: instruction, input, output)"]),
        ("chat", [TALK, {"messages": []}], ["'messages' of record 1 are empty; remove"]),
        ("chat", [{"messages": [OTHER, REPLY, None]}], ["record 0 are no list of role and"]),
        ("chat", [{"messages": "a"}], ["'messages' of record 0 are no list of role and content"]),
        (
            "chat",
            [{"messages": [{"from": "human", "value": "a"}]}],
            ["message 0 of record 0 has no 'role' (found: from, value)"],
        ),
        (
            "chat",
            [TALK, {"messages": [OTHER, {"role": "assistant"}]}],
            ["message 1 of record 1 has no 'content' (found: role)"],
        ),
        ("chat", [talk("a", "")], ["'content' of message 1 of record 0 is empty"]),
        ("chat", [talk("a")], ["record 0 has no message of the assistant; remove"]),
    ],
)
def test_bad_records_are_named(
    tmp_path: Path, style: str, rows: list[dict[str, Any]], parts: list[str]
) -> None:
    said = message(lambda: read(tmp_path, rows, style))
    assert said.startswith(str(tmp_path))
    for part in parts:
        assert part in said


def test_a_record_is_named_by_its_index_in_the_file_whichever_process_met_it(
    tmp_path: Path,
) -> None:
    rows = [GOOD] * 7 + [GOOD | {"output": ""}]
    said = message(lambda: read(tmp_path, rows, "alpaca", processes=2))
    assert said == (
        f"{tmp_path / 'rows0.jsonl'}, line 8: the 'output' of record 7 is empty; fill it or remove "
        "the record"
    )


def test_a_record_is_named_by_its_place_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    write(folder / "a.jsonl", [GOOD, GOOD])
    write(folder / "b.json", [GOOD, GOOD | {"output": 3}])
    said = message(lambda: prepare(letters(), train=str(folder), validation=str(folder)))
    assert said.startswith(f"{folder / 'b.json'}, record 1: the 'output' of record 3 is no text")
    (folder / "b.json").write_text('[{"instruction": "a"},\n{]')
    said = message(lambda: prepare(letters(), train=str(folder), validation=str(folder)))
    assert said.startswith(f"{folder / 'b.json'}, line 2: no whole JSON (")


def test_records_of_every_kind_of_file_are_the_same(tmp_path: Path) -> None:
    """Fields that the messages of some records have alone, and columns beside."""
    rows = [talk("a", "b"), talk("c", "d", system="e"), talk("f", "g")]
    rows[1]["messages"][0]["name"] = "Ann"
    paths = [Path(write(tmp_path / name, rows)) for name in ("a.jsonl", "b.json")]
    table = datasets.Dataset.from_list([row | {"at": datetime(2024, 1, 2)} for row in rows])
    table.to_parquet(tmp_path / "c.parquet")
    table.save_to_disk(str(tmp_path / "d"))
    found = [
        [block["input_ids"].tolist() for block in prepare_blocks(path)]
        for path in (*paths, tmp_path / "c.parquet", tmp_path / "d")
    ]
    assert found[1:] == found[:1] * 3
    template = letters(CHATML).apply_chat_template
    whole = [i for row in rows for i in template(row["messages"], return_dict=False)]
    assert [i for block in found[0] for i in block][: len(whole)] == whole


def prepare_blocks(path: Path) -> list[dict[str, torch.Tensor]]:
    blocks, _ = prepare(letters(CHATML), "chat", train=str(path), validation=str(path))
    return [blocks[index] for index in range(len(blocks))]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (None, ["has no (default) chat template; set model.tokenizer"]),
        (
            CHATML.replace("{% endfor %}", "{% endfro %}"),
            [
                "the chat template of the tokenizer is no valid template (Encountered unknown tag "
                "'endfro'",
                ", line 3); correct it in that folder, or set model.tokenizer to another",
            ],
        ),
        ("{{ messages | jsn }}", ["is no valid template (No filter named 'jsn', line 1)"]),
        # The last answer alone keeps its end: the text depends on what follows.
        (
            CHATML.replace(
                "<|im_end|>\n{% endfor", "{% if loop.last %}<|im_end|>{% endif %}{% endfor"
            ),
            [
                "does not write message 1 of record 0 as the continuation",
                "put {% generation %} and",
            ],
        ),
        (
            "{{ raise_exception('Roles must alternate') }}",
            ["refuses record 0 (TemplateError: Roles must alternate); correct or remove"],
        ),
        ("{% for m in messages %}{{ m.content + 3 }}{% endfor %}", ["refuses record 0 (TypeError"]),
        (
            MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'model' %}"),
            ["record 0 has no token to predict; remove it, or correct its response"],
        ),
    ],
)
def test_bad_templates_are_named(tmp_path: Path, template: str | None, parts: list[str]) -> None:
    rows = [talk("a", "b", "c", "d")]
    said = message(lambda: read(tmp_path, rows, "chat", template=template))
    for part in parts:
        assert part in said


def test_no_fast_tokenizer_and_no_eos(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [GOOD])
    tokenizer = letters()
    tokenizer.eos_token = None
    said = message(lambda: prepare(tokenizer, train=path, validation=path))
    assert "no EOS token" in said
    assert len(prepare(tokenizer, train=path, validation=path, eos=False)[0]) == 1


def test_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [GOOD])
    setup = recipe(train=path, validation=path)
    said = message(lambda: prepare_data(setup, letters(), needed_blocks=None, vocab_size=20))
    assert "but the model's vocab_size is 20; set model.tokenizer" in said


# --- the recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "data", "part"),
    [
        ("alpaca", {"document_mask": False}, "never lets records see each other; remove"),
        ("chat", {"document_mask": False}, "never lets records see each other; remove"),
        ("chat", {"streaming": True}, "format chat is read whole; set data.streaming=false"),
        ("chat", {"bos": False}, "takes BOS and EOS from the template; remove bos and eos"),
        ("chat", {"eos": False}, "takes BOS and EOS from the template; remove bos and eos"),
        ("alpaca", {"train": {"path": "a", "text": "b"}}, "instruction, input and output; remove"),
        ("chat", {"validation": {"path": "a", "text": "b"}}, "format chat reads messages; remove"),
        ("vicuna", {}, "data.format is 'vicuna'; allowed: one of text, alpaca, chat"),
    ],
)
def test_options_without_effect_are_refused(style: str, data: dict[str, Any], part: str) -> None:
    text = {"train": "a.json", "validation": "b.json"} | data
    assert part in message(lambda: recipe(style, **text))


def test_the_resolved_recipe_says_that_documents_are_masked(tmp_path: Path) -> None:
    from train.recipe.recipe import load_recipe

    for style, masked in (("text", False), ("alpaca", True), ("chat", True)):
        first = recipe(style, train="a.json", validation="b.json")
        assert first.data.document_mask is masked
        first.save(tmp_path / f"{style}.yaml")
        assert load_recipe(tmp_path / f"{style}.yaml") == first
    explicit = recipe("alpaca", train="a.json", validation="b.json", document_mask=True)
    assert explicit == recipe("alpaca", train="a.json", validation="b.json")


def test_flash_attention_sees_borders_in_one_row_only() -> None:
    text = {"train": "a.json", "validation": "b.json"}
    said = message(lambda: recipe(model="flash_attention_2", micro=2, **text))
    assert "train.micro_batch_size=1, or model.attention=sdpa" in said
    recipe(model="flash_attention_2", **text)
    recipe("text", model="flash_attention_2", micro=2, **text)
    recipe(model="flex_attention", micro=2, **text)


# --- split, mixture, cache, order -------------------------------------------------------------


def said_in(blocks: Blocks) -> list[str]:
    """The records of blocks, as text."""
    characters = [*SPECIAL, *CHARACTERS]
    found = []
    for index in range(len(blocks)):
        text = "".join(characters[i] for i in blocks[index]["input_ids"])
        found += [record.split("</s>")[0] for record in text.split("<s>") if record]
    return found


def test_records_with_the_same_prompt_fall_on_the_same_side(tmp_path: Path) -> None:
    rows = alpaca(300)
    again = [row | {"output": "another answer"} for row in rows[:100]]

    def sides(order: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", order)
        both = [
            said_in(side)
            for side in prepare(letters(), train=path, validation_fraction=0.2, sequence_length=400)
        ]
        assert len(both[0]) + len(both[1]) == len(order)
        return set(both[0]), set(both[1])

    train, held = sides(rows + again)
    assert len(train) + len(held) == 400
    assert not {text.split("Response:")[0] for text in train} & {
        text.split("Response:")[0] for text in held
    }
    assert 0.12 < len(held) / 400 < 0.28
    assert sides((rows + again)[::-1]) == (train, held)


def test_chats_that_begin_alike_fall_on_the_same_side() -> None:
    encoder = chat.ChatEncoder.build(letters(CHATML), bos=True, eos=True)
    same = encoder.prompt_of(talk("a", "b"))
    assert encoder.prompt_of(talk("a", "c", "d", "e")) == same
    assert encoder.prompt_of(talk("b", "b")) != same
    assert encoder.prompt_of(talk("a", "b", system="s")) != same


def test_weights_are_shares_of_blocks(tmp_path: Path) -> None:
    long = [{"instruction": "a", "output": "b" * 150} for _ in range(40)]  # one a block
    short = [{"instruction": "c", "output": "d"} for _ in range(8)]  # two a block of 330
    sources = [
        {"path": write(tmp_path / "long.json", long), "weight": 2.0},
        {"path": write(tmp_path / "short.json", short), "weight": 1.0},
    ]
    blocks, held = prepare(
        letters(), train=sources, validation=sources[1]["path"], sequence_length=330
    )
    counts = [
        sum(f"Instruction:\n{word}" in text for text in said_in(blocks)) for word in ("a", "c")
    ]
    assert len(blocks) == 60
    assert counts == [40, 2 * 20]
    assert [note.split(": ")[1].split(",")[0] for note in blocks.notes] == [
        "40 records in 40 blocks of 330 tokens",
        "8 records in 4 blocks of 330 tokens",
    ]
    assert "(validation): 8 records in 4 blocks" in held.notes[0]


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_a_second_start_does_not_render(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    rows = alpaca(40) if style == "alpaca" else [talk(f"a{n}", "b") for n in range(40)]
    path = write(tmp_path / "r.jsonl", rows)
    data: dict[str, Any] = {"train": path, "validation_fraction": 0.3, "sequence_length": 450}
    first = [said_in(side) for side in prepare(letters(CHATML), style, **data)]

    def refuse(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(instruct.RecordEncoder, "__call__", refuse)
    # Another length packs the same rows anew.
    for length in (400, 500):
        again = prepare(letters(CHATML), style, **data | {"sequence_length": length})
        assert [said_in(side) for side in again] == first
    if style == "chat":
        with pytest.raises(AssertionError, match="rendered again"):
            prepare(letters(MARKED), style, **data)


def test_several_processes_render_the_same(tmp_path: Path) -> None:
    rows = alpaca(30)
    one = said_in(read(tmp_path, rows, "alpaca", sequence_length=400))
    assert said_in(read(tmp_path, rows, "alpaca", sequence_length=400, processes=2)) == one
    assert [text.split("Response:")[1] for text in one] == [row["output"] for row in rows]


def test_a_position_resumes_exactly(tmp_path: Path) -> None:
    blocks = read(tmp_path, alpaca(40), "alpaca", sequence_length=400)

    def batches(position: int, steps: int) -> list[dict[str, torch.Tensor]]:
        options: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "seed": 3}
        sampler = PositionSampler(len(blocks), position=position, steps=steps, **options)
        return list(DataLoader(blocks, batch_sampler=sampler))

    whole, rest = batches(0, 12), batches(5 * 4, 7)
    assert len(blocks) < 12 * 4  # into a second epoch
    for one, other in zip(whole[10:], rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_held_out_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", alpaca(20))
    said = message(lambda: prepare(letters(), train=path, validation_fraction=1e-9))
    assert said == "the held-out text has no records; raise data.validation_fraction"
    said = message(lambda: prepare(letters(), train=path, validation_fraction=1 - 1e-9))
    assert "for training has no records; lower data.validation_fraction" in said
    empty = write(tmp_path / "empty.json", [])
    said = message(lambda: prepare(letters(), train=empty, validation=path))
    assert "empty" in said or "cannot be read" in said


# --- real records -----------------------------------------------------------------------------


def test_real_alpaca_records(shared: Path) -> None:
    path = shared / "text" / "alpaca-sample.json"
    tokenizer = load_tokenizer(str(shared / "models" / "mixed7M"))
    setup = recipe(train=str(path), validation_fraction=0.1, sequence_length=512)
    sides = prepare_data(setup, tokenizer, needed_blocks=None, vocab_size=4096)
    wanted = []
    for row in json.loads(path.read_text()):
        question = PROMPT_WITH_INPUT if row["input"] else PROMPT
        prompt = question.format(row["instruction"], row["input"])
        pieces = [
            tokenizer.encode(text, add_special_tokens=False) for text in (prompt, row["output"])
        ]
        if sum(map(len, pieces)) + 2 <= 512:
            wanted.append(row["output"])
    whole = []
    for side in sides:
        for index in range(len(side)):
            block = side[index]
            borders = (block["position_ids"] == 0).nonzero().flatten().tolist()
            for start, stop in zip(borders, [*borders[1:], 512], strict=True):
                labels = block["labels"][start:stop]
                answer = tokenizer.decode(labels[labels != IGNORED])
                if answer.endswith("</s>"):
                    whole.append(answer.removesuffix("</s>"))
    assert sorted(whole) == sorted(wanted)
    assert len(whole) > 800
