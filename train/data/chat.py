"""Chat messages, rendered with the tokenizer's own template; the assistant's turns are predicted.

The rendering is tokenized as a whole, as `apply_chat_template` does. Which of its characters belong
to the assistant is what the template says itself, with `{% generation %}` around its turns; of a
template without these marks it is found by rendering prefixes of the conversation: a turn is what
it adds to the messages before it and the generation prompt, its end token included. A token that
covers such a character is predicted.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sa_models.errors import PostshareError
from train.data.instruct import BadRecordError, Masked, Record, RecordEncoder, missing, require_text
from train.data.token_table import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The Llama 3 templates write today's date unless they are given one. Tokens that change from day to
# day would end the run's exact resumption; this is the date of these templates where time is
# unknown.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class ChatEncoder(RecordEncoder):
    """`messages: [{role, content}, ...]` as the template renders them, BOS and EOS included.

    `special` are the names and texts of the special tokens, which templates refer to.
    """

    template: str
    special: tuple[tuple[str, str], ...]
    required = ("messages",)

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerBase, *, bos: bool, eos: bool, **options: Any
    ) -> Self:
        """`options` are those of `Encoder.build`; `bos` and `eos` are left to the template.

        Raises:
            PostshareError: the tokenizer has no fast form or no chat template, or the template
                is none or reads the clock.
        """
        name = tokenizer.name_or_path or "the tokenizer"
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise PostshareError(
                f"{name} has no (default) chat template; set model.tokenizer to a tokenizer with "
                "one, or write one into its folder as chat_template.jinja"
            ) from error
        if "strftime_now" in template and "date_string" not in template:
            raise PostshareError(
                f"the chat template of {name} reads the clock, so that tokens change from day to "
                "day; write a fixed date in place of strftime_now"
            )
        try:
            render_jinja_template([], chat_template=template)  # is compiled, and nothing rendered
        except TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            reason = str(error.message).rstrip(".")
            raise PostshareError(
                f"the chat template of {name} is no valid template ({reason}{line}); "
                "correct it in that folder, or set model.tokenizer to another"
            ) from error
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        text = Encoder.build(tokenizer, bos=False, eos=False, **options)
        return cls(text, template, tuple(sorted(special.items())))

    def check(self, name: str, record: Record) -> None:
        messages = record.get("messages")
        if messages is None:
            raise missing(name, "messages", [key for key, v in record.items() if v is not None])
        if not messages:
            raise PostshareError(f"the 'messages' of {name} are empty; remove the record")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise PostshareError(
                f"the 'messages' of {name} are no list of role and content; convert them"
            )
        for position, message in enumerate(messages):
            where = f"message {position} of {name}"
            require_text(where, message, "role")
            require_text(where, message, "content", empty=message["role"] != "assistant")
        if all(message["role"] != "assistant" for message in messages):
            raise PostshareError(f"{name} has no message of the assistant; remove the record")

    def prompt_of(self, record: Record) -> str:
        said = [(message["role"], message["content"]) for message in record["messages"]]
        turn = next(at for at, (role, _) in enumerate(said) if role == "assistant")
        return json.dumps(said[:turn] or said)

    def encode(self, records: dict[int, Record]) -> list[Masked]:
        rendered = [self._render(index, record) for index, record in records.items()]
        encodings = _with_offsets(self.text.tokenizer).encode_batch(
            [text for text, _ in rendered], add_special_tokens=False
        )
        return [
            (encoding.ids, _mask(encoding.offsets, spans))
            for encoding, (_, spans) in zip(encodings, rendered, strict=True)
        ]

    def _render(self, index: int, record: Record) -> tuple[str, list[Span]]:
        """A record's text, and the characters of it that the assistant says."""
        # A table gives every message the fields of all others; templates ask which are there.
        messages = [{k: v for k, v in m.items() if v is not None} for m in record["messages"]]
        try:
            if _MARKED.search(self.template):
                return self._apply(messages, marked=True)
            return self._by_prefixes(index, messages)
        except (PostshareError, ImportError):
            raise
        except Exception as error:  # whatever a template may do wrong
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise BadRecordError(
                f"the chat template refuses record {index} ({reason}); correct or remove the "
                "record",
                index,
            ) from error

    def _by_prefixes(self, index: int, messages: list[Message]) -> tuple[str, list[Span]]:
        text, _ = self._apply(messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, _ = self._apply(messages[:turn], add_generation_prompt=True)
            answered, _ = self._apply(messages[: turn + 1])
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise BadRecordError(
                    f"the chat template does not write message {turn} of record {index} as the "
                    "continuation of the messages before it and the generation prompt, so that the "
                    "assistant's part cannot be told; put {% generation %} and "
                    "{% endgeneration %} around it in the template",
                    index,
                )
            spans.append((len(asked), len(answered)))
        return text, spans

    def _apply(
        self, messages: list[Message], *, marked: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        # What apply_chat_template renders with. It would give marks only as tokens, and none at all
        # for a turn whose first character (a space, say) no token covers.
        names: dict[str, Any] = {"date_string": _DATE, **dict(self.special)}
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marked,
            **names,
        )
        texts, spans = rendered  # for each conversation; its declared type is wrong
        return texts[0], spans[0] if marked else []


@functools.lru_cache(maxsize=4)
def _with_offsets(serialized: str) -> Tokenizer:
    """The fast tokenizer without its post-processor, which adds nothing here but trims offsets.

    A token of a single space would else cover no character.
    """
    backend = Tokenizer.from_str(serialized)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


def _mask(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for each token that covers a character of a span; one of no width covers its next."""
    return [
        int(any(start < last and max(stop, start + 1) > first for first, last in spans))
        for start, stop in offsets
    ]
