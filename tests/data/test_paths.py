"""Folders, archives and lists: what is read, and what is answered with the way to name it."""

import gzip
import json
import tarfile
import zipfile

import pytest

from lightning_align.data.paths import find_files

ROWS = [{"text": "a"}, {"text": "b\n"}, {"text": "Grüße"}]


def find(paths):
    return find_files("TextDataModule", "paths", paths)


def texts(file):
    return [record["text"] for _, record in file.records()]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", lines()),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("a.json", lines()),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.ndjson.gz", lines()),
    ],
)
def test_json_by_other_names(tmp_path, name, content):
    encoded = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith("gz") else encoded)
    (file,) = find(str(tmp_path / name))
    assert texts(file) == [row["text"] for row in ROWS]
    assert file.holds_records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, 2]', "item 2 must be a JSON object, but it is a int"),
        ('[{"a": 1},\n {"a" 2}]', "must be JSON, but .* at line 2, column 7"),
        ('{\n"a": 1}', r"line 1 must be JSON.*\. A \.json file is a list of objects, or has one"),
        ('[{"a": 1}', "must be JSON, but"),
    ],
)
def test_broken_lists_are_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json'\): {message}"):
        list(find(str(tmp_path / "a.json"))[0].records())


def test_an_empty_list_has_no_records(tmp_path):
    for content in ("[]", " \n", ""):
        (tmp_path / "a.json").write_text(content)
        assert list(find(str(tmp_path / "a.json"))[0].records()) == []


@pytest.fixture(params=["zip", "tar", "tar.gz"])
def archive(tmp_path, request):
    path = tmp_path / f"data.{request.param}"
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(lines())
    (tmp_path / "read.md").write_text("x")
    names = ["one.jsonl", "two.jsonl", "read.md"]
    if request.param == "zip":
        with zipfile.ZipFile(path, "w") as writer:
            for name in names:
                writer.write(tmp_path / name, name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as writer:
            for name in names:
                writer.add(tmp_path / name, name)
    return path


def test_files_in_an_archive_are_read(archive):
    protocol = "zip" if archive.suffix == ".zip" else "tar"
    found = find(f"{protocol}://*.jsonl::{archive}")
    assert [file.suffix for file in found] == [".jsonl", ".jsonl"]
    assert [texts(file) for file in found] == [[row["text"] for row in ROWS]] * 2
    (alone,) = find(f"{protocol}://two.jsonl::{archive}")
    assert texts(alone) == texts(found[1])
    assert alone.content_hash() == found[1].content_hash()


def test_an_archive_is_answered_with_how_to_name_files_in_it(archive):
    protocol = "zip" if archive.suffix == ".zip" else "tar"
    way_out = rf"is an archive\. Name files in it, for instance '{protocol}://\*\.jsonl::/.*data"
    with pytest.raises(ValueError, match=way_out) as failure:
        find(str(archive))
    named = str(failure.value).rpartition(" '")[2].removesuffix("'.")
    assert len(find(named)) == 2


def test_archives_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_text("x")
    for path in (f"{tmp_path}/a.zip", f"zip://*.jsonl::{tmp_path}/a.zip"):
        with pytest.raises(
            ValueError, match=r"a\.zip'\): (must be a complete archive|fsspec cannot)"
        ):
            find(path)
    with pytest.raises(ValueError, match=r"no\.zip'\): no such file as .*no\.zip"):
        find(f"zip://*.jsonl::{tmp_path}/no.zip")


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["part-0.parquet", "part-1.parquet", "c.txt"], r"/folder/\*\.parquet'"),
        (["train-0-of-1.parquet", "test-0-of-1.parquet"], r"/folder/train\*\.parquet'"),
        (["data/train-0.parquet", "data/test.parquet"], r"/folder/\*\*/train\*\.parquet'"),
        (["train-0.parquet", "evaluation-0.parquet"], r"/folder/train\*\.parquet'"),
        (["train-0.parquet", "chapter.parquet"], r"/folder/train\*\.parquet'"),
        (["part-0.parquet", "part-1.arrow"], r"/folder/\*\.parquet'"),
        (["a.jsonl.gz", "b.jsonl.gz", "c.txt"], r"/folder/\*\.jsonl\.gz'"),
        ([], r"/folder/\*\.txt'"),
    ],
)
def test_a_folder_is_answered_with_a_pattern_of_what_is_in_it(tmp_path, names, pattern):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=rf"is a folder, and .*for instance '.*{pattern}") as told:
        find(str(folder))
    if names:
        assert find(str(told.value).rpartition(" '")[2].removesuffix("'."))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_parquet_is_read_in_the_order_of_its_names(tmp_path, scheme):
    """As Spark and the hub write it: also in folders, with files that only their writers read."""
    from datasets import Dataset

    folder = tmp_path / "latest"  # whose own name says nothing of a split
    (folder / "year=2024").mkdir(parents=True)
    for number, name in enumerate(["part-0.parquet", "part-1.parquet", "year=2024/part-2.parquet"]):
        Dataset.from_list([ROWS[number]]).to_parquet(folder / name)
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_metadata.parquet", "README.md"):
        (folder / name).write_text("x")
    files = find(f"{scheme}{folder}")
    assert [text for file in files for text in texts(file)] == [row["text"] for row in ROWS]


def test_a_dict_of_splits_is_answered_with_the_one_to_train_on(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(ROWS)
    DatasetDict({"test": one, "train": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"'test', 'train'\. Give .*both/train"):
        list(find(str(tmp_path / "both"))[0].records())
    assert len(texts(find(str(tmp_path / "both/train"))[0])) == 3


@pytest.mark.parametrize("pattern", ["a.jsonl", "*.jsonl"])
def test_a_file_behind_a_cache_of_fsspec_is_read(tmp_path, pattern):
    (tmp_path / "a.jsonl").write_text(lines())
    (file,) = find(f"simplecache::file://{tmp_path}/{pattern}")
    assert texts(file) == [row["text"] for row in ROWS]
