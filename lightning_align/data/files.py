"""The user's input files: any fsspec URL, compressed or not, and tables of ``datasets``.

All are read as a stream, or memory-mapped.

Whatever is wrong with a file is reported with the argument that named it, the file and, where there
is one, the line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any, cast

import fsspec
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.data.columns import Columns
from lightning_align.data.hub_datasets import load_hub, load_saved, table_hash, table_rows
from lightning_align.data.tables import csv_rows, parquet_rows

CHUNK = 1 << 20
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
LINE_SUFFIXES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (*LINE_SUFFIXES, ".json", ".csv", ".parquet")
DEEPEST = 100  # lists and objects inside each other, as in Arrow; comparing them recurses


@dataclass(frozen=True)
class InputFile:
    """One file, and the argument that named it."""

    where: str
    argument: str
    url: str
    columns: Columns = field(default_factory=Columns, compare=False)  # what the user calls them

    @property
    def _inner(self) -> str:
        """Of a chain the URL of the file: zip://FILE::archive.zip, simplecache::s3://FILE."""
        parts = self.url.split("::")
        return next((part for part in parts if "://" in part), parts[-1])

    @property
    def suffix(self) -> str:
        """The kind of file, such as ``.jsonl``: its last suffix that is not a compression."""
        name = self._inner.rpartition("/")[2]
        for compressed in COMPRESSED:
            name = name.removesuffix(compressed)
        return name[name.rfind(".") :] if "." in name else ""

    def error(self, rule: str, way_out: str = "") -> ValueError:
        """The error for what is wrong with this file."""
        return argument_error(self.where, self.argument, self.url, rule, way_out)

    def content_hash(self) -> str:
        """Hash of the bytes as they are stored; the file is read once, piece by piece."""
        digest = hashlib.blake2b(digest_size=16)
        with self._open("rb", compression=None) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def chunks(self) -> Iterator[str]:
        """The text, about a million characters at a time."""
        with self._open_text() as stream:
            while chunk := stream.read(CHUNK):
                self._refuse_binary(chunk)
                yield chunk

    @property
    def holds_records(self) -> bool:
        """Whether it is a table of records, as its name says, and not a text."""
        return self.suffix in RECORD_SUFFIXES

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place (such as "line 7" or "row 7", counted from 1) and content of each record.

        A .json file is a list of objects, or JSON lines under that name.

        Blank lines are passed over. All cells of a .csv file are text; those of the other kinds may
        hold lists, dicts and None.

        Args:
            columns: What the caller will look at: other columns may be left out, but need not.

        Raises:
            ValueError: If the file does not hold records, or one of them cannot be read.
        """
        if self.suffix in LINE_SUFFIXES:
            yield from self._lines()
            return
        if self.suffix == ".json":
            yield from self._list() if self._begins_list() else self._lines()
            return
        if self.suffix == ".csv":
            rows = self._csv()
        elif self._inner.endswith(".parquet"):
            rows = self._parquet(columns)
        else:
            raise self.table_error()
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row

    def table_error(self, *others: str) -> ValueError:
        """The error for a file that is no table, and no file of the suffixes ``others`` either."""
        *suffixes, last = (*others, *RECORD_SUFFIXES)
        way_out = (
            "A compression may follow, as in .jsonl.gz, but not after .parquet. A folder that"
            " datasets wrote with save_to_disk and a dataset on the hub will do as well"
        )
        return self.error(f"its name must end in {', '.join(suffixes)} or {last}", way_out)

    def missing_error(self, place: str, record: dict[str, Any], column: str) -> ValueError:
        """The error for a record without a column that may have another name there."""
        found = ", ".join(map(repr, record)) or "none"
        rule = f"{place} has no column {column!r}; columns found: {found}"
        return self.error(rule, f"Say with {column}_column what it is called")

    def text_columns(
        self, place: str, record: dict[str, Any], columns: Sequence[str]
    ) -> dict[str, str]:
        """The ``columns`` of a record, all of them text.

        Raises:
            ValueError: If a column is missing or holds anything else.
        """
        for column in columns:
            if column not in record:
                raise self.missing_error(place, record, column)
            name = self.columns.shown(column)
            if not isinstance(record[column], str):
                found = type(record[column]).__name__
                raise self.error(f"{place}: column {name!r} must be text, not {found}")
            if fault := text_fault(record[column]):
                raise self.error(f"{place}: column {name!r} {fault}")
        return {column: record[column] for column in columns}

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._open_text() as stream:
            for number, line in enumerate(stream, start=1):
                self._refuse_binary(line)
                if not line.isspace():
                    yield f"line {number}", self._record(number, line)

    def _begins_list(self) -> bool:
        with self._open_text() as stream:
            while (character := stream.read(1)).isspace():
                pass
            return bool(character == "[")

    def _list(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._open_text() as stream:
            text = self._refuse_binary(stream.read())
        try:
            items = parse_json(text)
        except ValueError as error:
            raise self.error(str(error)) from None
        for number, item in enumerate(items, start=1):
            yield f"item {number}", self._object(f"item {number}", item)

    def _csv(self) -> Iterator[dict[str, Any]]:
        with self._open_text(newline="") as stream:  # line breaks inside cells stay as they are
            yield from csv_rows(map(self._refuse_binary, stream), self.error)

    def _parquet(self, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        with self._open("rb", compression=None) as stream:
            yield from parquet_rows(stream, columns, self.error)

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = parse_json(line.rstrip("\n"))
        except ValueError as error:
            way_out = ""
            if self.suffix == ".json":
                way_out = "A .json file is a list of objects, or has one object on each line"
            raise self.error(f"line {number} {error}", way_out) from None
        return self._object(f"line {number}", record)

    def _object(self, place: str, record: object) -> dict[str, Any]:
        if not isinstance(record, dict):
            found = type(record).__name__
            raise self.error(f"{place} must be a JSON object, but it is a {found}")
        return record

    def _refuse_binary(self, text: str) -> str:
        if "\0" in text:
            raise self.error("must be text, but it holds NUL bytes")
        return text

    def _open_text(self, newline: str | None = None) -> Any:
        # utf-8-sig: a byte order mark is not part of the text.
        options = {"compression": "infer", "encoding": "utf-8-sig", "newline": newline}
        return self._open("rt", **options)

    @contextmanager
    def _open(self, mode: str, **options: Any) -> Iterator[IO[Any]]:
        try:
            with fsspec.open(self.url, mode, **options) as stream:
                yield cast("IO[Any]", stream)
        except FileNotFoundError:
            raise self.error("no such file") from None
        except UnicodeDecodeError as error:
            found = f"{error.object[error.start : error.start + 1]!r}"
            raise self.error(f"must be UTF-8 text, but it holds the byte {found}") from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise self.error(f"must be a complete compressed file ({error})") from None
        except OSError as error:
            if error.errno is not None or not self.url.endswith(".bz2"):
                raise
            # All that bz2 says of a broken file.
            raise self.error(f"must be a complete compressed file ({error})") from None


@dataclass(frozen=True)
class InputTable(InputFile):
    """A folder that ``datasets`` wrote with save_to_disk, or a dataset on the Hugging Face hub."""

    on_hub: bool = False

    @property
    @override
    def suffix(self) -> str:
        return "dataset"

    @property
    @override
    def holds_records(self) -> bool:
        return True

    @override
    def content_hash(self) -> str:
        return f"{table_hash(self._table)} {self.url if '[' in self.url else ''}"

    @override
    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(table_rows(self._table, columns), start=1):
            yield f"row {number}", row

    @cached_property
    def _table(self) -> Any:
        # Loaded once: the hub may have another version a moment later.
        return load_hub(self.url, self.error) if self.on_hub else load_saved(self.url, self.error)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: What is wrong, to stand behind the name of the text: "must be JSON, but ...".
    """
    try:
        value, too_deep = json.loads(text), False
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        rule = f"must be JSON, but {error.msg} at {place}column {error.colno}"
        raise ValueError(rule) from None
    except RecursionError:
        value, too_deep = None, True
    except ValueError:  # Python's guard against the quadratic time that a long integer takes
        raise ValueError("holds an integer of more digits than Python reads") from None
    # Most has too few brackets to be deep, and need not be walked through.
    if too_deep or (text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST):
        raise ValueError(f"must not nest lists and objects more than {DEEPEST} deep")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


def text_fault(text: str) -> str | None:
    """What is wrong with a text that no tokenizer takes: JSON may escape half of a character."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must be text, but it holds half of a surrogate pair"
    return None
