"""The four forms in which files hold preference pairs, and how each becomes tokens.

- texts ``prompt``, ``chosen``, ``rejected``: each is tokenised on its own.
- texts ``chosen`` and ``rejected`` that begin with one prompt: it ends where their tokens part.
- messages ``prompt``, ``chosen``, ``rejected``: whole conversations are tokenised.
- messages ``chosen`` and ``rejected`` that begin with one prompt: it ends where messages part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lightning_align.data.chat_template import ChatTemplate, Messages, check_messages, read_tools
from lightning_align.data.columns import unread
from lightning_align.data.files import InputFile
from lightning_align.data.samples import Ids, Record, batches_of_one_format, close, common_length
from lightning_align.data.tokenizer import encode, encode_completions, encode_prompts

TEXTS = "a prompt and two completions as text"
WHOLE_TEXTS = "two texts that begin with their prompt"
MESSAGES = "a prompt and two completions as messages"
WHOLE_MESSAGES = "two conversations that begin with their prompt"
COLUMNS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """The tokens of one pair; a row of a batch is the prompt and one of the completions."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


class PairReader:
    """Reads pairs in whatever form a file has them.

    Args:
        tokenizer: A transformers tokenizer.
        append_eos: Whether to close completions that are text with the end-of-text token; those of
            a conversation are closed by the chat template.

    Attributes:
        torn: Places of the pairs whose prompt, tokenised by itself, is no beginning of the whole.
    """

    def __init__(self, tokenizer: Any, append_eos: bool) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id if append_eos else None
        self.torn: list[str] = []

    def read(self, file: InputFile) -> Iterator[Pair | str]:
        """The pairs of a file, or in place of one why it cannot be used."""
        readers: dict[str, Callable[[InputFile, list[Record]], Iterator[Pair | str]]] = {
            TEXTS: self._texts,
            WHOLE_TEXTS: self._whole_texts,
            MESSAGES: self._conversations,
            WHOLE_MESSAGES: self._conversations,
        }
        for form, records in batches_of_one_format(file, format_of, COLUMNS):
            yield from readers[form](file, records)

    def _texts(self, file: InputFile, records: list[Record]) -> Iterator[Pair | str]:
        """Prompt and completions on their own: a token never reaches across the boundary."""
        columns = ("prompt", "chosen", "rejected")
        texts = [file.text_columns(place, record, columns) for place, record in records]
        prompts = encode_prompts(self.tokenizer, [text["prompt"] for text in texts])
        completions = (
            encode_completions(self.tokenizer, [text[column] for text in texts])
            for column in columns[1:]
        )
        for prompt, chosen, rejected in zip(prompts, *completions, strict=True):
            if not chosen or not rejected:
                yield "chosen or rejected is empty"
            else:
                yield self._pair(prompt, chosen, rejected)

    def _whole_texts(self, file: InputFile, records: list[Record]) -> Iterator[Pair | str]:
        """The prompt is what the tokens have in common, less one if a completion is left empty.

        Tokens that belong to both completions add the same to their log-probabilities, so the
        objective does not depend on where exactly a prompt ends (but for ``ipo``, by lengths).
        """
        columns = ("chosen", "rejected")
        texts = [file.text_columns(place, record, columns) for place, record in records]
        ids = (encode_prompts(self.tokenizer, [text[name] for text in texts]) for name in columns)
        begin = encode_prompts(self.tokenizer, [""])[0]
        for text, chosen, rejected in zip(texts, *ids, strict=True):
            end = min(common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
            if not text["chosen"] or not text["rejected"]:
                yield "chosen or rejected is empty"
            elif end <= len(begin):
                yield "chosen and rejected do not begin with a common prompt"
            else:
                yield self._pair(chosen[:end], chosen[end:], rejected[end:])

    def _pair(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
        eos = self.eos_token_id
        return Pair(close(prompt, None), close(chosen, eos), close(rejected, eos))

    def _conversations(self, file: InputFile, records: list[Record]) -> Iterator[Pair | str]:
        """Whole conversations are tokenised, and part where prompt and both of them part."""
        template = ChatTemplate(file, self.tokenizer)
        for place, record in records:
            parts = split_messages(file, place, record)
            if isinstance(parts, str):
                yield parts
                continue
            tools = read_tools(file, place, record)
            prompt, chosen, rejected = parts
            texts = [
                template.render(place, prompt, tools, prompt=True),
                template.render(place, prompt + chosen, tools),
                template.render(place, prompt + rejected, tools),
            ]
            # The template writes the token that a text begins with, if any.
            opening, first, second = encode(self.tokenizer, texts)
            end = min(common_length(opening, first), common_length(opening, second))
            if end < len(opening):
                self.torn.append(f"{file.url}, {place}")
            yield Pair(*(close(ids, None) for ids in (opening[:end], first[end:], second[end:])))


def format_of(file: InputFile, place: str, record: dict[str, Any]) -> str:
    """Which of the four forms a record has.

    Raises:
        ValueError: If it has none of them.
    """
    kinds = {name: type(value) for name, value in record.items() if value is not None}
    if "chosen" not in kinds or "rejected" not in kinds:
        for column in ("chosen", "rejected"):
            if column not in record:
                raise file.missing_error(place, record, column)
        file.text_columns(place, record, ("chosen", "rejected"))  # raises: one is null
    prompt, chosen, rejected = (kinds.get(name) for name in ("prompt", "chosen", "rejected"))
    if {chosen, rejected} == {str, list}:
        raise file.error(f"{place}: chosen and rejected must both be text or both be messages")
    if chosen is list:
        return MESSAGES if prompt is list else WHOLE_MESSAGES
    if prompt is list:
        raise file.error(f"{place}: the prompt is messages, so chosen and rejected must be, too")
    if "prompt" not in record:
        _refuse_other_prompt(file, place, record)
        return WHOLE_TEXTS
    return TEXTS


def _refuse_other_prompt(file: InputFile, place: str, record: dict[str, Any]) -> None:
    """Refuse two texts beside a third one that may well be their prompt under another name."""
    if file.columns.theirs.get("prompt", "") is None:  # the user knows that there is none
        return
    texts = [name for name in unread(record, COLUMNS) if isinstance(record[name], str)]
    if texts:
        rule = (
            f"{place} has no column 'prompt', and text that is not read in"
            f" {', '.join(map(repr, texts))}"
        )
        way_out = (
            f"Name the prompt, as in prompt_column={texts[0]!r}, or set prompt_column=None if"
            " chosen and rejected begin with it"
        )
        raise file.error(rule, way_out)


def split_messages(
    file: InputFile, place: str, record: dict[str, Any]
) -> tuple[Messages, Messages, Messages] | str:
    """Messages of the prompt, of chosen and of rejected, or why the pair cannot be used.

    A prompt that is repeated at the beginning of both conversations is taken once.
    """
    chosen = check_messages(file, place, "chosen", record["chosen"])
    rejected = check_messages(file, place, "rejected", record["rejected"])
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        check_messages(file, place, "prompt", prompt)
        size = len(prompt)
        repeated = chosen[:size] == prompt == rejected[:size]
        chosen, rejected = (chosen[size:], rejected[size:]) if repeated else (chosen, rejected)
    else:  # a text beside whole conversations repeats what they hold
        size = common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    if chosen == rejected:
        return "chosen and rejected are the same"
    if not chosen or not rejected:
        return "chosen or rejected is empty"
    if not prompt or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        return "chosen and rejected are not answers of the assistant to one prompt"
    return prompt, chosen, rejected
