import bz2
import gzip
import json
import lzma

import fsspec
import pytest

from lightning_align.data.paths import find_files

TEXT = "Grüße, Mr. Bennet.\nSecond line\n"


def find(paths):
    return find_files("TextDataModule", "paths", paths)


def read(file):
    return "".join(file.chunks())


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2"])
def test_compression_is_inferred(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress[suffix](TEXT.encode()))
    [file] = find(str(path))
    assert read(file) == TEXT
    assert file.suffix == ".txt"


@pytest.mark.parametrize("url", ["memory://books/a.txt", "file://{tmp_path}/a.txt"])
def test_reads_urls(tmp_path, url):
    url = url.format(tmp_path=tmp_path)
    with fsspec.open(url, "wt", encoding="utf-8") as stream:
        stream.write(TEXT)
    [file] = find(url)
    assert read(file) == TEXT


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path):
    for name in ("b.txt", "a.txt", "z.txt"):
        (tmp_path / name).write_text(name)
    assert [read(file) for file in find(f"{tmp_path}/[ab].txt")] == ["a.txt", "b.txt"]
    found = find([f"{tmp_path}/z.txt", f"{tmp_path}/a*"])
    assert [read(file) for file in found] == ["z.txt", "a.txt"]


def test_globs_work_on_urls():
    for name in ("1", "2"):
        with fsspec.open(f"memory://glob/{name}.txt", "wt") as stream:
            stream.write(name)
    assert [read(file) for file in find("memory://glob/*.txt")] == ["1", "2"]


def test_a_name_with_brackets_that_exists_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("here")
    assert [read(file) for file in find(f"{tmp_path}/a[1].txt")] == ["here"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(find(f"{tmp_path}/a.txt")[0]) == "abc"


def test_content_hash_tells_contents_apart_and_not_names(tmp_path):
    for name, content in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    one, same, other = (file.content_hash() for file in find(f"{tmp_path}/*.txt"))
    assert one == same != other


def test_missing_path_and_unknown_corpus_list_the_embedded_ones(tmp_path):
    for path in (f"{tmp_path}/missing.txt", "pride_and_prejudise"):
        message = rf"TextDataModule\(paths='{path}'\): is neither .* 'pride_and_prejudice'"
        with pytest.raises(ValueError, match=message):
            find(path)


def test_empty_glob(tmp_path):
    with pytest.raises(ValueError, match=r"TextDataModule\(paths='.*\*\.txt'\): no file matches"):
        find(f"{tmp_path}/*.txt")


def test_empty_list():
    with pytest.raises(ValueError, match="must name at least one file"):
        find([])


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder.*/\*\.txt"):
        find(str(tmp_path))


def test_a_file_that_vanished(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    [file] = find(f"{tmp_path}/a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match="no such file"):
        read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff\xfe", r"must be UTF-8 text, but it holds the byte b'\\xff'"),
        (b"PK\x03\x04\x00\x00", "must be text, but it holds NUL bytes"),
    ],
)
def test_binary_files(tmp_path, content, message):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        [file] = find(f"{tmp_path}/{name}")
        with pytest.raises(ValueError, match=message) as failure:
            read(file) if name == "a.txt" else list(file.records())
        assert name in str(failure.value)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_file_that_was_cut_short(tmp_path, compress):
    path = tmp_path / ("a.txt.gz" if compress is gzip.compress else "a.txt.xz")
    path.write_bytes(compress(TEXT.encode() * 1000)[:-20])
    with pytest.raises(ValueError, match="must be a complete compressed file"):
        read(find(str(path))[0])


def test_a_text_that_is_not_compressed_as_its_name_says(tmp_path):
    for suffix in ("gz", "xz", "bz2"):
        (tmp_path / f"a.txt.{suffix}").write_text("plain")
        with pytest.raises(ValueError, match="must be a complete compressed file"):
            read(find(f"{tmp_path}/a.txt.{suffix}")[0])


def records(tmp_path, content, columns=("text",)):
    (tmp_path / "a.jsonl").write_text(content)
    [file] = find(f"{tmp_path}/a.jsonl")
    return [(place, file.text_columns(place, record, columns)) for place, record in file.records()]


def test_records_keep_their_line_numbers_and_the_columns_asked_for(tmp_path):
    lines = [json.dumps({"text": "a\nb", "id": 1}), "", json.dumps({"text": "c"})]
    assert records(tmp_path, "\n".join(lines)) == [
        ("line 1", {"text": "a\nb"}),
        ("line 3", {"text": "c"}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "body": "x"}', "line 2 has no column 'text'; columns found: 'id', 'body'"),
        ("{}", "line 2 has no column 'text'; columns found: none"),
        ('{"text": ', "line 2 must be JSON, but Expecting value at column 10"),
        ('["text"]', "line 2 must be a JSON object, but it is a list"),
        (
            '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 2 must not nest lists and objects",
        ),
        # Python reads this one, and could then neither compare nor render it.
        ('{"text": ' + '{"a": ' * 950 + "1" + "}" * 951, "line 2 must not nest .* 100 deep"),
        (
            '{"text": ' + "7" * 5000 + "}",
            "line 2 holds an integer of more digits than Python reads",
        ),
        ('{"text": 3}', "line 2: column 'text' must be text, not int"),
        ('{"text": null}', "line 2: column 'text' must be text, not NoneType"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as failure:
        records(tmp_path, f'{{"text": "fine"}}\n{line}\n')
    assert "a.jsonl" in str(failure.value)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    message = "line 2: column 'text' must be text, but it holds half of a surrogate pair"
    with pytest.raises(ValueError, match=message):
        records(tmp_path, '{"text": "\\ud83d\\ude00"}\n{"text": "a \\ud83d b"}\n')
