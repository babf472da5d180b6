"""The three forms in which files hold conversations, and how each becomes tokens.

- ``messages``: what the assistant says in any turn is learned.
- messages ``prompt`` and ``completion``: what the assistant says in the completion is learned.
- texts ``prompt`` and ``completion``: the completion is learned; each is tokenised on its own.

Messages become one text by the chat template, and that text becomes tokens as a whole. The
assistant's tokens are those under ``{% generation %}`` if the template has it. Otherwise the
conversation is rendered up to each answer and after it, and a token counts if all of it lies
between: one that reaches into the prompt is the prompt's, since half a token cannot be learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.data import tokenizer as tokenizing
from lightning_align.data.chat_template import (
    ChatTemplate,
    Messages,
    Tools,
    check_messages,
    read_tools,
)
from lightning_align.data.files import InputFile
from lightning_align.data.samples import Ids, Record, batches_of_one_format, close, common_length

MESSAGES = "messages"
TEXTS = "a prompt and a completion as text"
TWO_MESSAGES = "a prompt and a completion as messages"
COLUMNS = ("messages", "prompt", "completion")

MARK = "Put {% generation %} and {% endgeneration %} around what the assistant says in the template"


class Example(NamedTuple):
    """The tokens of one conversation."""

    ids: Ids
    learned: NDArray[np.bool_]  # one flag per token
    prompt: bytes  # tells conversations apart by how they begin


class Conversation(NamedTuple):
    """The messages of a record; answers are learned from message number ``first`` on."""

    place: str
    messages: Messages
    tools: Tools | None
    first: int


class Rendered(NamedTuple):
    """A conversation as text, the characters [begin, end) of it to learn, and how it begins."""

    text: str
    spans: list[tuple[int, int]]
    prompt: bytes


class ConversationReader:
    """Reads conversations in whatever form a file has them.

    Args:
        tokenizer: A transformers tokenizer.
        assistant_only_loss: Whether the assistant's tokens alone are learned, or all.
        append_eos: Whether to close completions that are text with the end-of-text token; those of
            a conversation are closed by the chat template.

    Attributes:
        unclosed: Places of the conversations with an answer that no special token ends.
    """

    def __init__(self, tokenizer: Any, assistant_only_loss: bool, append_eos: bool) -> None:
        self.tokenizer = tokenizing.with_whole_offsets(tokenizer)
        self.assistant_only_loss = assistant_only_loss
        self.eos_token_id: int | None = tokenizer.eos_token_id if append_eos else None
        self.unclosed: list[str] = []
        self._special = list(getattr(tokenizer, "added_tokens_decoder", {}))

    def read(self, file: InputFile) -> Iterator[Example | str]:
        """The conversations of a file, or in place of one why it cannot be used."""
        for form, records in batches_of_one_format(file, format_of, COLUMNS):
            read = self._texts if form == TEXTS else self._messages
            yield from read(file, records)

    def _texts(self, file: InputFile, records: list[Record]) -> Iterator[Example | str]:
        columns = ("prompt", "completion")
        texts = [file.text_columns(place, record, columns) for place, record in records]
        prompts = tokenizing.encode_prompts(self.tokenizer, [text["prompt"] for text in texts])
        completions = tokenizing.encode_completions(
            self.tokenizer, [text["completion"] for text in texts]
        )
        for text, prompt, completion in zip(texts, prompts, completions, strict=True):
            ids = np.concatenate([close(prompt, None), close(completion, self.eos_token_id)])
            learned = np.arange(len(ids)) >= (len(prompt) if self.assistant_only_loss else 0)
            example = Example(ids, learned, _digest(text["prompt"]))
            yield example if completion else "the completion is empty"

    def _messages(self, file: InputFile, records: list[Record]) -> Iterator[Example | str]:
        template = ChatTemplate(file, self.tokenizer)
        template.text(None)
        if not getattr(self.tokenizer, "is_fast", False):
            name = type(self.tokenizer).__name__
            rule = "must be a fast tokenizer, which tells what part of a text a token stands for"
            raise argument_error(file.where, "tokenizer", name, rule)
        drawn = [self._draw(template, _conversation(file, *record)) for record in records]
        texts = [one.text for one in drawn if isinstance(one, Rendered)]
        encoded = iter(tokenizing.encode_with_offsets(self.tokenizer, texts))
        for one, (place, _) in zip(drawn, records, strict=True):
            example = _example(one, next(encoded)) if isinstance(one, Rendered) else one
            if isinstance(example, Example):
                self._check_closed(f"{file.url}, {place}", example)
            yield example

    def _draw(self, template: ChatTemplate, conversation: Conversation) -> Rendered | Example | str:
        """The text of a conversation, or at once its tokens if the template marks answers."""
        place, messages, tools, first = conversation
        prompt = _digest(messages[: _prompt_length(messages, first)])
        if not self.assistant_only_loss:
            text = template.render(place, messages, tools)
            return Rendered(text, [(0, len(text))], prompt)
        if not any(message["role"] == "assistant" for message in messages[first:]):
            return "the assistant says nothing"
        if not template.marks_answers(tools):
            text = template.render(place, messages, tools)
            return Rendered(text, answer_spans(template, conversation, text), prompt)
        ids, mask = template.render_marked(place, messages, tools)
        learned = np.array(mask, dtype=np.bool_)
        if first:  # what the assistant says in the prompt is marked, too
            opening = template.render(place, messages[:first], tools, prompt=True)
            learned[: common_length(tokenizing.encode(self.tokenizer, [opening])[0], ids)] = False
        return Example(close(ids, None), learned, prompt) if learned.any() else _NOTHING_MARKED

    def _check_closed(self, place: str, example: Example) -> None:
        """Note an answer without a token that ends it, where the template has such tokens."""
        special = np.isin(example.ids, self._special)
        edges = np.flatnonzero(np.diff(example.learned, prepend=False, append=False))
        answers = zip(edges[::2], edges[1::2], strict=True)
        if special.any() and not all(special[begin:end].any() for begin, end in answers):
            self.unclosed.append(place)


_NOTHING_MARKED = "the chat template marks nothing as said by the assistant"


def format_of(file: InputFile, place: str, record: dict[str, Any]) -> str:
    """Which of the three forms a record has.

    Raises:
        ValueError: If it has none of them, or two.
    """
    present = {name for name, value in record.items() if value is not None}
    if {"messages", "completion"} <= present:
        way_out = "Set messages_column=None to take the prompt and its completion"
        raise file.error(f"{place} has both messages and a completion", way_out)
    if "messages" in present:
        return MESSAGES
    if not {"prompt", "completion"} <= present:
        found = ", ".join(map(repr, record)) or "none"
        rule = f"{place} has neither messages nor a prompt and a completion; columns found: {found}"
        way_out = "Name them with messages_column, or with prompt_column and completion_column"
        raise file.error(rule, way_out)
    kinds = {type(record["prompt"]), type(record["completion"])}
    if kinds == {str, list}:
        raise file.error(f"{place}: prompt and completion must both be text or both be messages")
    return TWO_MESSAGES if list in kinds else TEXTS


def answer_spans(
    template: ChatTemplate, conversation: Conversation, text: str
) -> list[tuple[int, int]]:
    """Where the answers stand in the ``text`` of a conversation, by rendering parts of it.

    An answer is all that the template writes between the point where the assistant begins and the
    next message: what it says, and what ends its turn.

    Raises:
        ValueError: If the parts are not beginnings of the text.
    """
    place, messages, tools, first = conversation
    spans = []
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        if number == 0:
            rule = f"{place}: the assistant speaks first, and the template does not mark where"
            raise template.file.error(rule, MARK)
        before = template.render(place, messages[:number], tools, prompt=True)
        until = text
        if number + 1 < len(messages):
            until = template.render(place, messages[: number + 1], tools)
        if not until.startswith(before) or not text.startswith(until):
            rule = (
                f"{place}: the chat template writes the messages before and up to message"
                f" {number + 1} in another way when more follow, so it cannot be told what the"
                " assistant says"
            )
            raise template.file.error(rule, MARK)
        spans.append((len(before), len(until)))
    return spans


def _conversation(file: InputFile, place: str, record: dict[str, Any]) -> Conversation:
    tools = read_tools(file, place, record)
    if record.get("messages") is not None:
        messages = check_messages(file, place, "messages", record["messages"])
        return Conversation(place, messages, tools, 0)
    prompt = check_messages(file, place, "prompt", record["prompt"])
    completion = check_messages(file, place, "completion", record["completion"])
    return Conversation(place, prompt + completion, tools, len(prompt))


def _example(rendered: Rendered, encoded: tokenizing.Encoded) -> Example:
    offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in rendered.spans:
        learned |= (offsets[:, 0] >= begin) & (offsets[:, 1] <= end)
    return Example(close(encoded.ids, None), learned, rendered.prompt)


def _prompt_length(messages: Messages, first: int) -> int:
    """Messages before the first answer to the user; all of a prompt that is given as such."""
    if first:
        return first
    roles = [message["role"] for message in messages]
    asked = roles.index("user") if "user" in roles else 0
    return roles.index("assistant", asked) if "assistant" in roles[asked:] else len(roles)


def _digest(prompt: str | Messages) -> bytes:
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
