"""What the columns of a user's file are called, and two other habits of writing conversations.

Readers know columns by our names. A record comes to them under these, whatever its file calls them:

- as the user says (``prompt_column="question"``);
- in Alpaca's form: ``instruction``, ``input`` and ``output`` are what the user asks and the
  assistant answers, ``system`` what the system says before;
- in ShareGPT's form: ``conversations`` of messages with ``from`` and ``value``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_align._errors import argument_error

if TYPE_CHECKING:
    from lightning_align.data.files import InputFile

ALWAYS = ("tools",)  # what the chat template is given, in every form
WITH_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")

# Who speaks in files of ShareGPT's form, by the roles that chat templates know.
SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"),
    "tool": ("tool", "observation", "function_response"),
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}


@dataclass(frozen=True)
class Columns:
    """What files call the columns that have another name than ours.

    Args:
        theirs: Their name by ours; None says that the files have no such column.

    Attributes:
        unread: Columns of the files that nobody looks at, noted while they are read.
    """

    theirs: Mapping[str, str | None] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)

    def shown(self, ours: str) -> str:
        """The name of a column as its file has it."""
        return self.theirs.get(ours) or ours


def named_columns(where: str, **theirs: str | None) -> Columns:
    """The columns as a user names them, by arguments such as ``prompt_column``.

    Args:
        where: Class the user called.
        **theirs: Name in the files by our name; None for a column that they lack.

    Raises:
        ValueError: If a name is empty, or two arguments name one column.
    """
    taken: dict[str, str] = {}
    for ours, name in theirs.items():
        if name is None:
            continue
        if not name:
            rule = "must be the name of a column, as text"
            raise argument_error(where, f"{ours}_column", name, rule)
        if name in taken:
            rule = f"is the {taken[name]}_column, too, and must be another column"
            raise argument_error(where, f"{ours}_column", name, rule)
        taken[name] = ours
    return Columns({ours: name for ours, name in theirs.items() if name != ours})


def read_records(file: InputFile, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each record of a file, under our names.

    Args:
        file: File of records.
        known: Our names of what the caller looks at; the file's other columns are noted as unread.

    Raises:
        ValueError: If a column that the user named is missing, or nobody knows who speaks.
    """
    for place, record in file.records():
        ours = _renamed(file, place, record, known)
        ours = _as_messages(file, place, ours, known)
        file.columns.unread.update(unread(ours, known))
        yield place, ours


def unread(record: dict[str, Any], known: Sequence[str]) -> list[str]:
    """Columns of a record, under our names, in which there is something that nobody looks at."""
    looked_at = {*known, *ALWAYS}
    return [name for name, value in record.items() if value is not None and name not in looked_at]


def _renamed(
    file: InputFile, place: str, record: dict[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """The record under our names; another column that has one of these by chance is unread."""
    theirs = file.columns.theirs
    if not theirs:
        return dict(record)
    for ours, name in theirs.items():
        if name is not None and name not in record:
            found = ", ".join(map(repr, record)) or "none"
            rule = f"{place} has no column {name!r}, as {ours}_column says; columns found: {found}"
            raise file.error(rule)
    ours_by_theirs = {name: ours for ours, name in theirs.items() if name is not None}
    renamed = {
        ours_by_theirs.get(name, name): value
        for name, value in record.items()
        if name in ours_by_theirs or name not in theirs
    }
    file.columns.unread.update(
        name for name in record if name in theirs and name not in ours_by_theirs and name in known
    )
    return renamed


def _as_messages(
    file: InputFile, place: str, record: dict[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """The record with messages in the form that chat templates take."""
    present = {name for name, value in record.items() if value is not None}
    if not present & {"messages", "prompt"}:
        if "conversations" in present:
            talk = "messages" if "messages" in known else "prompt"
            record[talk] = record.pop("conversations")
            record[talk] = _spoken_before(record, record[talk])
        elif "instruction" in present and present & {"output", "completion", "chosen"}:
            record = _alpaca(file, place, record)
    for name in WITH_MESSAGES:
        value = record.get(name)
        if isinstance(value, dict):  # one message
            value = record[name] = [value]
        if isinstance(value, list):
            record[name] = [_message(file, place, name, message) for message in value]
    return record


def _alpaca(file: InputFile, place: str, record: dict[str, Any]) -> dict[str, Any]:
    """What the user asks and the assistant answers, each as a message."""
    texts = file.text_columns(place, record, ["instruction"])
    if record.get("input"):
        texts |= file.text_columns(place, record, ["input"])
    rest = {k: v for k, v in record.items() if k not in ("instruction", "input", "output")}
    if "output" in record:
        rest.setdefault("completion", record["output"])
    asked = [{"role": "user", "content": "\n\n".join(texts.values())}]
    rest["prompt"] = _spoken_before(rest, asked)
    for name in ("completion", "chosen", "rejected"):
        if isinstance(rest.get(name), str):
            rest[name] = [{"role": "assistant", "content": rest[name]}]
    return rest


def _spoken_before(record: dict[str, Any], messages: Any) -> Any:
    """The messages, behind what the system says in a column of its own."""
    if not isinstance(record.get("system"), str) or not isinstance(messages, list):
        return messages
    system = record.pop("system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _message(file: InputFile, place: str, column: str, message: Any) -> Any:
    """A message with role and content, also if it says ``from`` and ``value``."""
    if not isinstance(message, dict) or "role" in message or "from" not in message:
        return message
    speaker = message["from"]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        rule = f"{place}: a message is from {speaker!r}, and must be from one of {', '.join(ROLES)}"
        raise file.error(rule, "Or write messages with a role and a content")
    name = file.columns.shown(column)
    others = (key for key in unread(message, ["from", "value"]))
    file.columns.unread.update(f"{name}[].{key}" for key in others)
    return {"role": role, "content": message.get("value")}
