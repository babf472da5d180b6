import csv
import gzip
import json
import sys
import tracemalloc

import fsspec
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lightning_align.data.paths import find_files
from lightning_align.data.tables import csv_rows

ROWS = [{"text": "one", "n": "1"}, {"text": 'two, "quoted"\nlines', "n": "2"}]


def find(path):
    [file] = find_files("TextDataModule", "paths", str(path))
    return file


def texts(file):
    return [file.text_columns(place, row, ["text"])["text"] for place, row in file.records()]


def write_csv(path, rows=ROWS, opener=open, **options):
    with opener(path, "wt", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def error(rule, way_out=""):
    return ValueError(f"{rule}. {way_out}")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv(tmp_path, suffix):
    path = write_csv(tmp_path / f"a.csv{suffix}", opener=gzip.open if suffix else open)
    assert list(find(path).records()) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]


def test_csv_with_a_byte_order_mark_and_blank_lines_and_foreign_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n\r\none,1\r\n"two\r\nlines",2\r\n\r\n')
    found = [{"text": "one", "n": "1"}, {"text": "two\r\nlines", "n": "2"}]
    assert list(find(tmp_path / "a.csv").records()) == [("row 1", found[0]), ("row 2", found[1])]


@settings(deadline=None)
@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=20))
def test_any_cells_round_trip(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    cells = [[cell.replace("\0", "") for cell in row] for row in cells]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *cells])
    with path.open(newline="", encoding="utf-8") as stream:
        assert [list(row.values()) for row in csv_rows(stream, error)] == cells


def test_a_cell_may_hold_a_book_and_the_limit_of_others_stays(tmp_path):
    before = 131072  # csv's own
    csv.field_size_limit(before)
    file = find(write_csv(tmp_path / "a.csv", [{"text": "x" * 300_000}]))
    assert len(texts(file)[0]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,n\na,1\nb\n", r"row 2 has 1 cells, and the header 2 columns\. Quote a cell"),
        ("text,n\n\na,1\nb,c,2\n", "row 2 has 3 cells, and the header 2 columns"),
        ('text\na\n"b', r"row 2 must be CSV, but unexpected end of data \(line 3\)"),
        ('text\n"a" b\n', r"row 1 must be CSV, but ',' expected after '\"' \(line 2\)"),
        ("text,text\na,b\n", "must name each column once, but 'text' comes twice"),
        ("text;n\na;b\n", "row 1 has no column 'text'; columns found: 'text;n'"),
        ("body,n\na,1\n", "row 1 has no column 'text'; columns found: 'body', 'n'"),
        ("text\na\x00b\n", "must be text, but it holds NUL bytes"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as failure:
        texts(find(tmp_path / "a.csv"))
    assert str(failure.value).startswith("TextDataModule(paths='")
    assert "a.csv" in str(failure.value)


def test_csv_of_another_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nGrüße\n".encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        texts(find(tmp_path / "a.csv"))


def test_parquet_cells_may_hold_lists_and_dicts(tmp_path):
    rows = [
        {"text": "one", "messages": [{"role": "user", "content": "hi"}], "n": 1},
        {"text": None, "messages": [], "n": None},
    ]
    file = find(write_parquet(tmp_path / "a.parquet", rows))
    assert list(file.records()) == [("row 1", rows[0]), ("row 2", rows[1])]


def test_parquet_at_a_url():
    with fsspec.open("memory://tables/a.parquet", "wb") as stream:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    assert texts(find("memory://tables/a.parquet")) == [row["text"] for row in ROWS]


def test_parquet_leaves_out_columns_that_nobody_looks_at(tmp_path):
    file = find(write_parquet(tmp_path / "a.parquet", ROWS))
    assert list(file.records(["text"])) == [
        ("row 1", {"text": ROWS[0]["text"]}),
        ("row 2", {"text": ROWS[1]["text"]}),
    ]
    assert [set(row) for _, row in file.records(["text", "missing"])] == [{"text", "n"}] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a", "n": 1}], "row 1 has no column 'text'; columns found: 'body', 'n'"),
        ([{"text": "a"}, {"text": None}], "row 2: column 'text' must be text, not NoneType"),
        ([{"text": 3}], "row 1: column 'text' must be text, not int"),
        ([{"text": ["a"]}], "row 1: column 'text' must be text, not list"),
    ],
)
def test_bad_parquet(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        texts(find(write_parquet(tmp_path / "a.parquet", rows)))


@pytest.mark.parametrize("part", [0.0005, 0.5, 0.99])
def test_parquet_that_was_cut_short(tmp_path, part):
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"row {i}"} for i in range(5000)])
    content = path.read_bytes()
    path.write_bytes(content[: max(int(part * len(content)), 1)])
    with pytest.raises(ValueError, match=r"a\.parquet'\): must be a complete Parquet file"):
        texts(find(path))


def test_parquet_that_is_damaged_inside(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"row {i}"} for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a complete Parquet file"):
        texts(find(path))


def test_other_content_than_the_name_says(tmp_path):
    (tmp_path / "a.parquet").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match="must be a complete Parquet file"):
        texts(find(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "a.csv", ROWS)
    with pytest.raises(ValueError, match=r"must be (UTF-8 )?text"):
        texts(find(tmp_path / "a.csv"))


def test_an_empty_file_has_no_records(tmp_path):
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        (tmp_path / name).write_text("")
        assert list(find(tmp_path / name).records()) == []


def test_a_compressed_parquet_file_and_a_text_are_no_tables(tmp_path):
    for name in ("a.parquet.gz", "a.txt", "a.pdf"):
        (tmp_path / name).write_text("x")
        message = rf"{name}'\): its name must end in \.jsonl, .* or \.parquet\. A compression"
        with pytest.raises(ValueError, match=message):
            list(find(tmp_path / name).records())


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"reading it needs pyarrow.*pip install 'lightning-align\[datasets\]'"
    with pytest.raises(ValueError, match=message):
        texts(find(path))


def test_a_large_parquet_file_is_read_a_few_rows_at_a_time(tmp_path):
    """32 MB of text in cells of 64 kB: what Python holds of it at once are some 256 cells."""
    cells = pyarrow.array([f"{i} " + "word " * 13_000 for i in range(500)])
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "a.parquet", row_group_size=50)
    tracemalloc.start()
    try:
        total = sum(len(text) for text in _stream(find(tmp_path / "a.parquet")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 32_000_000
    assert peak < 20_000_000


def _stream(file):
    for place, row in file.records(["text"]):
        yield file.text_columns(place, row, ["text"])["text"]


def test_keys_that_only_other_rows_have_are_absent(tmp_path):
    """Arrow gives all structs of a column the same keys; a template would write the nulls."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "note": None},
        {"messages": [{"role": "assistant", "tool_calls": calls}], "note": "b"},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert [row for _, row in find(path).records()] == rows
