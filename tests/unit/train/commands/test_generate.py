"""`postshare generate`: greedy continuations, against the likeliest token by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import small_models
from train.cli import main
from train.commands.generate import PROMPTS
from train.evaluation.models import find_models


def command(*arguments: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def by_hand(folder: Path, prompt: str, tokens: int) -> str:
    """One forward of the whole text for each token, without a cache."""
    (found,) = find_models([str(folder)])
    model, tokenizer = found.load(torch.float32, torch.device("cpu")), found.load_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
        if following == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_each_model_continues_each_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if it is imported, warns
    folders = [small_models.dense(tmp_path / name) for name in ("one", "two")]
    prompts = ("the cat", "a dog sat")
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert command("generate", *folders, *options, "--tokens", "7") == 0
    lines = capsys.readouterr().out.splitlines()
    expected = []
    for prompt in prompts:
        expected += ["", repr(prompt)]
        expected += [f"  {folder}  {by_hand(folder, prompt, 7)!r}" for folder in folders]
    assert lines == expected


def test_without_a_prompt_there_are_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("generate", "demo-base", "--tokens", "1") == 0
    said = capsys.readouterr().out
    assert len(PROMPTS) == 3
    assert all(repr(prompt.strip()) in said for prompt in PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo-base", "--prompt", ""], "error: --prompt is empty; write the beginning of a text"),
        (["demo-base", "--tokens", "600"], "600 more exceed the 512 positions of demo-base; short"),
        (["nowhere"], "error: model 'nowhere' is no folder here and no hub name"),
    ],
    ids=["empty", "too-long", "no-model"],
)
def test_what_cannot_be_continued_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("generate", *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
