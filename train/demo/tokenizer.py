"""The demo's tokenizer: byte-level BPE of 2,048, trained on the training side of the corpus.

    python -m train.demo.tokenizer OUT    # writes a tokenizer folder

`model.tokenizer: stdlib` in a recipe trains it on the spot (some seconds) instead of loading one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from train.demo.corpus import stdlib_documents

VOCAB_SIZE = 2048
CONTEXT = 512
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, which are LlamaConfig's defaults

# Source code: a word with the space before it, single digits, runs of punctuation, line ends, and
# indentation as one piece (the last space of a run goes to the word that follows).
_PIECES = r" ?[\p{L}_]+|\d| ?[^\s\p{L}\d_]+|\n+|\s+(?!\S)|\s+"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Deterministic for one corpus: the same text gives the same merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNKNOWN, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document["text"] for document in stdlib_documents("train")]
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,  # never produced: every byte has a token
        pad_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m train.demo.tokenizer OUT", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
