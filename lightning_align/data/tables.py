"""Rows of a CSV or a Parquet stream, a few at a time.

Both take the file's own ``error``, so that whatever is wrong is reported with its name.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import IO, Any

ROWS_AT_ONCE = 256  # few, because a cell may hold a book
LARGEST_CELL = 1 << 28  # characters; csv's own limit is 131072, less than a long document

Error = Callable[[str, str], ValueError]
Row = dict[str, Any]


def csv_rows(lines: Iterable[str], error: Error) -> Iterator[Row]:
    """Rows under the column names of the first line, every cell as text; blank lines passed over.

    Args:
        lines: Lines with their ends as in the file: a quoted cell may hold some.
        error: Makes an error of a rule and a way out.

    Raises:
        ValueError: If the first line names a column twice, or a row has other cells than columns.
    """
    rows = filter(None, _cells(csv.reader(lines, strict=True), error))
    header = next(rows, [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise error(f"must name each column once, but {twice[0]!r} comes twice in its header", "")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            rule = f"row {number} has {len(row)} cells, and the header {len(header)} columns"
            raise error(rule, "Quote a cell that holds a comma or a line break")
        yield dict(zip(header, row, strict=True))


def _cells(reader: Any, error: Error) -> Iterator[list[str]]:
    for number in count():
        # The limit belongs to the process: it is raised for one row only.
        limit = csv.field_size_limit(LARGEST_CELL)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            rule = f"row {number} must be CSV, but {problem} (line {reader.line_num})"
            raise error(rule, "A quote inside a quoted cell is doubled") from None
        finally:
            csv.field_size_limit(limit)
        yield row


def parquet_rows(stream: IO[bytes], columns: Sequence[str] | None, error: Error) -> Iterator[Row]:
    """Rows of a Parquet file; cells may hold lists and dicts.

    Args:
        stream: The file, opened for reading at any place.
        columns: What the caller will look at; None is everything.
        error: Makes an error of a rule and a way out.

    Raises:
        ValueError: If pyarrow is not installed or the file is cut short or no Parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise extra_error("pyarrow", error) from None
    if not stream.read(1):
        return
    try:
        file = parquet.ParquetFile(stream)
        if columns is not None and not set(columns) <= set(file.schema_arrow.names):
            columns = None  # the caller will say which one is missing, and which there are
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns and list(columns)):
            yield from map(without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as problem:
        raise error(f"must be a complete Parquet file ({problem})", "") from None


def without_nulls(row: Row) -> Row:
    """The row without the keys that a dict inside a cell only has because another row's has them.

    Arrow gives all structs of a column the same keys and fills in null. Templates would write it:
    a tool call with the arguments of all tools, for instance.
    """
    return {name: _cell(cell) for name, cell in row.items()}


def _cell(cell: Any) -> Any:
    if isinstance(cell, dict):
        return {key: _cell(value) for key, value in cell.items() if value is not None}
    return [_cell(item) for item in cell] if isinstance(cell, list) else cell


def extra_error(package: str, error: Error, otherwise: str = "") -> ValueError:
    """The error for a package that only some files need; ``otherwise`` is what else is wrong."""
    way_out = "Run pip install 'lightning-align[datasets]'"
    return error(f"{otherwise}reading it needs {package}, which is not installed", way_out)
