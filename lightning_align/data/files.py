"""The user's input files: any fsspec URL, compressed or not, read as a stream.

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
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec

from lightning_align._errors import argument_error
from lightning_align.data.corpora import EMBEDDED_CORPORA, embedded_path

CHUNK = 1 << 20
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One file, and the argument that named it."""

    where: str
    argument: str
    url: str

    @property
    def suffix(self) -> str:
        """The kind of file, such as ``.jsonl``: its last suffix that is not a compression."""
        name = self.url.rpartition("/")[2]
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

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place (such as "line 7") and content of each record; blank lines are passed over.

        Raises:
            ValueError: If the file does not hold records, or a line is not a JSON object.
        """
        if self.suffix != ".jsonl":
            way_out = "A compression may follow, as in .jsonl.gz"
            raise self.error("the name of a file must end in .jsonl", way_out)
        with self._open_text() as stream:
            for number, line in enumerate(stream, start=1):
                self._refuse_binary(line)
                if not line.isspace():
                    yield f"line {number}", self._record(number, line)

    def text_columns(
        self, place: str, record: dict[str, Any], columns: Sequence[str]
    ) -> dict[str, str]:
        """The ``columns`` of a record, all of them text.

        Raises:
            ValueError: If a column is missing or holds anything else.
        """
        for column in columns:
            if column not in record:
                found = ", ".join(map(repr, record)) or "none"
                raise self.error(f"{place} has no column {column!r}; columns found: {found}")
            if not isinstance(record[column], str):
                found = type(record[column]).__name__
                raise self.error(f"{place}: column {column!r} must be text, not {found}")
        return {column: record[column] for column in columns}

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line.rstrip("\n"))
        except json.JSONDecodeError as error:
            rule = f"line {number} must be JSON, but {error.msg} at column {error.colno}"
            raise self.error(rule) from None
        if not isinstance(record, dict):
            found = type(record).__name__
            raise self.error(f"line {number} must be a JSON object, but it is a {found}")
        return record

    def _refuse_binary(self, text: str) -> None:
        if "\0" in text:
            raise self.error("must be text, but it holds NUL bytes")

    def _open_text(self) -> Any:
        # utf-8-sig: a byte order mark is not part of the text.
        return self._open("rt", compression="infer", encoding="utf-8-sig")

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


def find_files(where: str, argument: str, paths: str | Sequence[str]) -> list[InputFile]:
    """The files that ``paths`` names: embedded corpora, files, globs, in the order given.

    Args:
        where: Class the user called.
        argument: Name of the argument that holds ``paths``.
        paths: One or several names of embedded corpora, paths, URLs or globs.

    Raises:
        ValueError: If a path names no file.
    """
    files: list[InputFile] = []
    for path in [paths] if isinstance(paths, str) else paths:
        embedded = path in EMBEDDED_CORPORA
        urls = [str(embedded_path(path))] if embedded else _expand(where, argument, path)
        files += [InputFile(where, argument, url) for url in urls]
    if not files:
        raise argument_error(where, argument, paths, "must name at least one file")
    return files


def _expand(where: str, argument: str, path: str) -> list[str]:
    filesystem, stripped = fsspec.core.url_to_fs(path)
    if filesystem.isfile(stripped):
        return [path]
    if filesystem.isdir(stripped):
        way_out = f"Name its files, for instance {path.rstrip('/') + '/*.txt'!r}"
        raise argument_error(where, argument, path, "is a folder, and must be a file", way_out)
    if any(character in stripped for character in "*?["):
        found = sorted(name for name in filesystem.glob(stripped) if filesystem.isfile(name))
        if not found:
            raise argument_error(where, argument, path, "no file matches this pattern")
        return [filesystem.unstrip_protocol(name) for name in found] if "://" in path else found
    rule = "is neither a file nor an embedded corpus"
    way_out = f"Embedded corpora: {', '.join(map(repr, EMBEDDED_CORPORA))}"
    raise argument_error(where, argument, path, rule, way_out)
