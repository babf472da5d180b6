"""Chat templates: from the messages of a record to the text that a model reads.

The template is Jinja and belongs to the tokenizer (``tokenizer.chat_template``). A template that
puts ``{% generation %}`` around what the assistant says tells exactly what is to be learned.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import jinja2
import jinja2.ext

from lightning_align._errors import argument_error
from lightning_align.data.files import InputFile, parse_json, text_fault

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# What a template that writes today's date is told: with the real one, a run resumed tomorrow would
# go on with other tokens. It is the date that Llama 3.1's own template falls back to. Transformers
# lets nobody replace its clock, but a macro in the template goes before it.
TODAY = datetime(2024, 7, 26)
DIRECTIVES = [f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY"] + ["%-d", "%-m", "%e", "%%"]
CLOCK = "{%- macro strftime_now(format) -%}{{ format }}{%- endmacro -%}".replace(
    "format }}",
    "format" + "".join(f" | replace({d!r}, {TODAY.strftime(d)!r})" for d in DIRECTIVES) + " }}",
)


def read_chat_template(where: str, chat_template: str | Path) -> str:
    """The text of a chat template, with correct syntax.

    Args:
        where: Class the user called.
        chat_template: Jinja text, or the path or URL of a .jinja file.

    Raises:
        ValueError: If it is neither, cannot be read, or is no Jinja.
    """
    text = source = str(chat_template)
    if source.endswith(".jinja"):
        try:
            with fsspec.open(source, "rt", encoding="utf-8") as stream:
                text = stream.read()
        except (OSError, UnicodeDecodeError) as error:
            rule = f"the file cannot be read ({error})"
            raise argument_error(where, "chat_template", source, rule) from error
    elif "{" not in source:
        rule = "must be Jinja text or the path of a .jinja file"
        raise argument_error(where, "chat_template", source, rule)
    try:
        # Syntax alone: transformers compiles it again, with the functions that it offers.
        jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _Generation]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        rule = f"must be a Jinja template, but of line {error.lineno} Jinja says: {error.message}"
        raise argument_error(where, "chat_template", source, rule.rstrip(".")) from None
    return text


class ChatTemplate:
    """The chat template of a tokenizer, applied to the records of one file.

    Args:
        file: Where the records come from, for errors.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, file: InputFile, tokenizer: Any) -> None:
        self.file = file
        self.tokenizer = tokenizer

    def text(self, tools: Tools | None) -> str:
        """The template itself; a tokenizer may have several, one of them for tools.

        Raises:
            ValueError: If the tokenizer has none.
        """
        rule = f"the tokenizer has no chat template, and {self.file.url!r} holds messages"
        try:
            if getattr(self.tokenizer, "chat_template", None):
                return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            rule = f"transformers finds none for {self.file.url!r} ({error})"
        way_out = "Pass one, as Jinja text or as a .jinja file"
        raise argument_error(self.file.where, "chat_template", None, rule, way_out)

    def marks_answers(self, tools: Tools | None) -> bool:
        """Whether the template tells by ``{% generation %}`` what the assistant says."""
        return GENERATION.search(self.text(tools)) is not None

    def render(
        self, place: str, messages: Messages, tools: Tools | None, *, prompt: bool = False
    ) -> str:
        """The text of a conversation; of a ``prompt`` up to where the assistant begins.

        Raises:
            ValueError: If the template does not accept the conversation.
        """
        options = {"add_generation_prompt": prompt, "tokenize": False}
        return str(self._apply(place, messages, tools, **options))

    def render_marked(
        self, place: str, messages: Messages, tools: Tools | None
    ) -> tuple[list[int], list[int]]:
        """Tokens of a conversation, and 1 for those that ``{% generation %}`` covers.

        Raises:
            ValueError: If the template does not accept the conversation.
        """
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        quiet = {"verbose": False}  # no warning about the length
        encoded = self._apply(place, messages, tools, tokenizer_kwargs=quiet, **options)
        return encoded["input_ids"], encoded["assistant_masks"]

    def _apply(self, place: str, messages: Messages, tools: Tools | None, **options: Any) -> Any:
        template = self.text(tools)  # what fails below is the conversation's fault
        if "strftime_now" in template:
            options["chat_template"] = CLOCK + template
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            rule = f"{place}: the chat template refuses the messages ({roles}): {error}"
            raise self.file.error(rule.rstrip(".")) from error


class _Generation(jinja2.ext.Extension):
    """Knows the tag around what the assistant says, as far as syntax goes."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_messages(file: InputFile, place: str, column: str, value: object) -> Messages:
    """``value`` if it is a list of messages.

    Raises:
        ValueError: If it is none, is empty, or a message lacks a role or a text.
    """
    where = f"{place}: column {file.columns.shown(column)!r}"
    if not isinstance(value, list):
        raise file.error(f"{where} must be a list of messages, not {type(value).__name__}")
    if not value:
        raise file.error(f"{where} must hold at least one message")
    for number, message in enumerate(value, start=1):
        if fault := _fault(message):
            way_out = 'A message is {"role": "user", "content": "some text"}'
            raise file.error(f"{where}: message {number} {fault}", way_out)
    return value


def _fault(message: object) -> str | None:
    """What is wrong with a message."""
    if not isinstance(message, dict):
        return f"must be an object, not {type(message).__name__}"
    if not isinstance(message.get("role"), str):
        return f"has no role; keys found: {', '.join(map(repr, message)) or 'none'}"
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else "has neither content nor tool_calls"
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            return f"has content of type {kind!r}, and must have text"
        if not isinstance(part.get("text"), str):
            return f"has content of type {type(part.get('text')).__name__!r}, and must have text"
        if fault := text_fault(part["text"]):
            return fault
    return None


def read_tools(file: InputFile, place: str, record: dict[str, Any]) -> Tools | None:
    """The column ``tools``: a list of JSON schemas, also as JSON text; None without any.

    Raises:
        ValueError: If it is anything else.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise file.error(f"{place}: column 'tools' {error}") from None
    if not tools:
        return None  # an empty list, too: templates write a heading for it
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise file.error(f"{place}: column 'tools' must be a list of JSON schemas")
    return tools
