"""Text files as documents, and documents as pieces that fit in memory.

A document is what an end-of-text token closes and what is held out as a whole: a record of a
table, a text file, or what lies between two matches of a pattern in it. A piece is what is
tokenised at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_align._errors import argument_error
from lightning_align.data.corpora import EMBEDDED_CORPORA, embedded_path
from lightning_align.data.files import CHUNK, InputFile
from lightning_align.data.paths import find_files

# A pattern may look this many characters ahead: what begins closer to the end of what has been read
# so far is decided when more has been read.
LOOKAHEAD = 4096

# Where a long document may be cut without changing its byte-level tokens: pre-tokenisers of the
# GPT-2 family never join across these two places. (They do join a run of white space.)
SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class TextSource:
    """A file and how it falls into documents."""

    file: InputFile
    document_pattern: str | None
    text_column: str

    @property
    def settings(self) -> tuple[str, ...]:
        """What, beside the content of the file, decides its documents."""
        if self.file.holds_records:
            return (self.file.suffix, self.text_column)
        return (".txt", self.document_pattern or "")

    def pieces(self) -> Iterator[Piece]:
        """All documents of the file in pieces; blank documents are left out.

        Raises:
            ValueError: If the file holds no text.
        """
        empty = True
        for document in self._documents():
            for piece in cut_into_pieces(document):
                empty = False
                yield piece
        if empty:
            raise self.file.error("is empty, and must hold text")

    def _documents(self) -> Iterator[Iterable[str]]:
        if self.file.holds_records:
            columns = [self.text_column]
            for place, record in self.file.records(columns):
                yield self.file.text_columns(place, record, columns).values()
        elif self.document_pattern is None:
            yield self.file.chunks()
        else:
            pattern = re.compile(self.document_pattern, re.MULTILINE)
            for document in split_before(self.file.chunks(), pattern):
                yield [document]


def find_sources(
    where: str,
    argument: str,
    paths: str | Sequence[str],
    document_pattern: str | None,
    text_column: str,
) -> list[TextSource]:
    """The text files that ``paths`` names; embedded corpora come with a pattern of their own.

    Args:
        where: Class the user called.
        argument: Name of the argument that holds ``paths``.
        paths: One or several embedded corpora, paths, URLs, globs or datasets on the hub.
        document_pattern: Regular expression before whose matches a text file is split.
        text_column: Column of a table that holds the text.

    Raises:
        ValueError: If a path names nothing, or a file that is neither a text nor a table.
    """
    embedded = {str(embedded_path(name)): pattern for name, pattern in EMBEDDED_CORPORA.items()}
    sources = []
    for file in find_files(where, argument, paths):
        if file.suffix != ".txt" and not file.holds_records:
            raise file.table_error(".txt")
        pattern = document_pattern or embedded.get(file.url)
        sources.append(TextSource(file, pattern, text_column))
    return sources


def check_pattern(where: str, document_pattern: str | None) -> None:
    """Refuse what is not a regular expression.

    Raises:
        ValueError: If ``document_pattern`` does not compile.
    """
    try:
        re.compile(document_pattern or "")
    except re.error as error:
        rule = f"must be a regular expression ({error})"
        raise argument_error(where, "document_pattern", document_pattern, rule) from None


def split_before(chunks: Iterable[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """What lies before, between and behind the beginnings of the matches of ``pattern``.

    The chunks may be cut anywhere, as long as a match can be told from ``LOOKAHEAD`` characters.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        begin = 0
        for match in pattern.finditer(buffer):
            if match.start() >= len(buffer) - LOOKAHEAD:
                break
            if match.start() > begin:
                yield buffer[begin : match.start()]
                begin = match.start()
        buffer = buffer[begin:]
    starts = [match.start() for match in pattern.finditer(buffer) if match.start() > 0]
    for begin, end in zip([0, *starts], [*starts, len(buffer)], strict=True):
        if begin < end:
            yield buffer[begin:end]


def cut_into_pieces(document: Iterable[str], size: int = CHUNK) -> Iterator[Piece]:
    """The text of one document in pieces of at most ``size`` characters; nothing if it is blank."""
    held: str | None = None  # only when the next piece comes is this one known not to be the last
    for text in _cut(document, size):
        if held is not None:
            yield Piece(held, ends_document=False)
        if held is not None or not text.isspace():
            held = text
    if held is not None:
        yield Piece(held, ends_document=True)


def _cut(document: Iterable[str], size: int) -> Iterator[str]:
    rest = ""
    for chunk in document:
        rest += chunk
        while len(rest) > size:
            cut = _last_safe_cut(rest, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_safe_cut(text: str, size: int) -> int:
    begin = max(size - LOOKAHEAD, 1)
    cut = size  # without a safe place in reach, anywhere
    # `begin` and not a slice: the pattern may look at the character before it.
    for match in SAFE_CUT.finditer(text, begin, size):
        cut = match.start()
    return cut
