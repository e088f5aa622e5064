from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from sa_models.calibration import logit_chunks
from sa_models.calibration.logit_chunks import in_place_of
from sa_models.calibration.token_losses import IGNORED, head_losses, row_losses
from tests.support import tiny

WORDS = 50


def llama() -> PreTrainedModel:
    return tiny.model(vocab_size=WORDS, tie_word_embeddings=False, initializer_range=0.3)


def tied_gqa() -> PreTrainedModel:
    return tiny.model(
        vocab_size=WORDS, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3
    )


def mistral() -> PreTrainedModel:
    """What a stock form is whose heads do not divide the hidden size."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def adapted() -> nn.Module:
    """An adapter on lm_head too, which is not 0."""
    settings = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(llama(), settings).eval()


@pytest.mark.parametrize("make", [llama, tied_gqa, mistral, adapted])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@torch.no_grad()
def test_are_those_of_whole_logits(make, rows: int) -> None:  # type: ignore[no-untyped-def]
    """Chunks of 1 position, of 3 and 7, which do not divide 10, and all 33 at once."""
    model = make()
    ids = torch.randint(0, WORDS, (3, 11), generator=torch.manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[1, 4:6] = targets[2, :] = IGNORED
    likely = model(input_ids=ids).logits.double().log_softmax(-1)
    expected = [
        -sum(likely[row, at, word].item() for at, word in enumerate(line) if word != IGNORED)
        for row, line in enumerate(targets.tolist())
    ]
    inner = [m for name, m in model.named_modules() if name.endswith(("lm_head", "base_layer"))]
    linear = next(m for m in reversed(inner) if type(m) is nn.Linear and len(m.weight) == WORDS)
    calls: list[int] = []
    whole = linear.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape[:-1].numel())
        return whole(x)

    with patch.object(logit_chunks, "CHUNK_ELEMENTS", rows * WORDS), in_place_of(linear, forward):
        found = row_losses(model, targets, input_ids=ids)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found[2] == 0
    assert found[0] > 10
    assert max(calls) == (33 if rows == 100 else rows)


def test_small_probabilities_are_not_lost() -> None:
    """Of many words each is little beside the sum: fp32 sums of them may be too small.

    Also at -100, where nothing is predicted, and with words of no probability at all.
    """
    words = 49_152
    logits = torch.randn(64, words, generator=torch.manual_seed(3)) * 2.5
    logits[:, :50] += 8
    logits[:, 50:90] = -torch.inf
    targets = torch.randint(90, words, (1, 64))
    targets[0, 60:] = IGNORED
    exact = -logits.double().log_softmax(-1)[:60].gather(1, targets[0, :60, None]).sum()
    rows = torch.arange(64).float()[None, :, None]  # in place of what enters lm_head
    (found,) = head_losses(lambda row: logits[row[..., 0].long()], words, rows, targets)
    assert abs(float(found - exact)) < 60 * 3e-7


def test_a_stand_in_leaves_the_module_as_it_was() -> None:
    """Also one whose forward a library has replaced; its hooks run."""
    module = nn.Linear(3, 2, bias=False)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def fail() -> None:
        with in_place_of(module, lambda x: 2 * x):
            module(torch.ones(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(seen[0], torch.full((3,), 2.0))
    assert "forward" not in vars(module)
    assert module(torch.ones(3)).shape == (2,)
    module.forward = replaced = lambda x: x + 1  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        fail()
    assert module.forward is replaced
