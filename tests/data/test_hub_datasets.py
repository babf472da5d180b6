import json
import os
import subprocess
import sys

import datasets
import fsspec
import pytest

from lightning_align.data.hub_datasets import HUB_NAME
from lightning_align.data.paths import find_files
from tests.helpers.fake_hub import FakeHub, serve

ROWS = [{"text": f"text {i}", "n": i} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def find(path):
    [file] = find_files("TextDataModule", "paths", str(path))
    return file


def numbered(rows):
    return [(f"row {i}", row) for i, row in enumerate(rows, start=1)]


def save(folder, rows=ROWS, **options):
    datasets.Dataset.from_list(rows).save_to_disk(folder, **options)
    return folder


def test_a_saved_folder(tmp_path):
    file = find(save(tmp_path / "saved", num_shards=2))
    assert list(file.records()) == numbered(ROWS)
    assert list(file.records(["text"])) == numbered([{"text": row["text"]} for row in ROWS])


def test_cells_may_hold_lists_and_dicts_and_a_format_that_was_set_is_ignored(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "ids": [1, 2]}]
    datasets.Dataset.from_list(rows).with_format("numpy", ["ids"]).save_to_disk(tmp_path / "saved")
    assert list(find(tmp_path / "saved").records()) == numbered(rows)


def test_rows_that_were_selected_and_shuffled(tmp_path):
    shuffled = datasets.Dataset.from_list(ROWS).select([4, 0, 2])
    shuffled.save_to_disk(tmp_path / "saved")
    assert list(find(tmp_path / "saved").records()) == numbered([ROWS[4], ROWS[0], ROWS[2]])


def test_a_saved_folder_at_a_url(tmp_path):
    save(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        with fsspec.open(f"memory://tables/saved/{file.name}", "wb") as stream:
            stream.write(file.read_bytes())
    file = find("memory://tables/saved")
    assert list(file.records()) == numbered(ROWS)
    assert file.content_hash() == find(tmp_path / "saved").content_hash()


def test_the_hash_follows_the_rows_and_not_the_name(tmp_path):
    one, same, other, fewer = (
        find(save(tmp_path / name, rows)).content_hash()
        for name, rows in [
            ("a", ROWS),
            ("b", ROWS),
            ("c", [*ROWS[:4], {"text": "text 5", "n": 4}]),
            ("d", ROWS[:4]),
        ]
    )
    assert one == same
    assert len({one, other, fewer}) == 3


def test_one_split_of_a_dict_must_be_named(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    message = r"saved'\): is a DatasetDict, .* 'train', 'test'\. Give .*/saved/train\."
    with pytest.raises(ValueError, match=message):
        list(find(tmp_path / "saved").records())
    assert list(find(tmp_path / "saved" / "test").records()) == numbered(ROWS)
    with pytest.raises(ValueError, match=r"saved/nope'\): is neither a file nor"):
        find(tmp_path / "saved" / "nope")


@pytest.mark.parametrize("content", ["{", '{"splits": 3}', "[]", "[" * 100_000])
def test_a_dict_whose_list_of_splits_is_broken(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=r"its dataset_dict\.json cannot be read"):
        list(find(tmp_path).records())


def test_a_folder_that_is_two_things_at_once(tmp_path):
    save(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"one dataset, but it holds both state\.json and "):
        list(find(tmp_path / "saved").records())


def test_a_folder_that_only_looks_like_a_dataset(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.arrow").write_text("")
    message = r"is a folder, and must be a file, or a folder that datasets' save_to_disk wrote"
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "owner" / "name")


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "owner" / "name")
    assert list(find("owner/name").records()) == numbered(ROWS)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_folder_with_a_part_missing_or_broken(tmp_path, name):
    for number, damage in enumerate(["missing", "broken"]):
        folder = save(tmp_path / str(number))
        if damage == "missing":
            (folder / name).unlink()
        else:
            (folder / name).write_text("{")
        with pytest.raises(ValueError, match=r"datasets cannot load this folder \("):
            list(find(folder).records())


def test_an_empty_dataset(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved'\): datasets cannot load this folder"):
        list(find(tmp_path / "saved").records())


def test_without_datasets(tmp_path, monkeypatch):
    file = find(save(tmp_path / "saved"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"reading it needs datasets.*pip install 'lightning-align\[datasets\]'"
    mistyped = r"owner/name'\): is neither a local file nor folder; on the hub, " + message
    for path, expected in ((file, message), (find("owner/name"), mistyped)):
        with pytest.raises(ValueError, match=expected):
            list(path.records())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("acme/known", ("acme/known", None, None)),
        ("acme/known.v2:test", ("acme/known.v2", None, "test")),
        ("acme/known/small:train[:10%]", ("acme/known", "small", "train[:10%]")),
        ("acme/known/small", None),
        ("acme", None),
        ("/acme/known", None),
        ("./known", None),
        ("../known", None),
        ("s3://acme/known", None),
        ("acme/*", None),
        ("acme/[ab]", None),
    ],
)
def test_names_on_the_hub(name, parts):
    found = HUB_NAME.fullmatch(name)
    assert (found and (found["name"], found["config"], found["split"])) == parts


def test_a_path_of_a_file_is_never_looked_up(monkeypatch):
    monkeypatch.setattr("lightning_align.data.hub_datasets.ask_hub", None)
    for path in ("texts/a.jsonl", "texts/a.csv.gz", "texts/a.txt", "texts/a.parquet"):
        with pytest.raises(ValueError, match="is neither a file nor"):
            find(path)


# What follows loads from a hub on this machine. Which hub it is and where its cache lies are
# settled when the libraries are imported, so it takes a process of its own.
SCRIPT = """
import json, sys, time, urllib.request
from lightning_align.data.paths import find_files

def load(path):
    begin = time.monotonic()
    try:
        files = find_files("TextDataModule", "paths", path)
        found = [[file.content_hash(), list(file.records())] for file in files]
    except ValueError as error:
        found = str(error)
    return found, time.monotonic() - begin

print(json.dumps({path: load(path) for path in sys.argv[1:]}))
"""


def lines(word, column="text"):
    rows = [{column: f"{word} {i}"} for i in range(5)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CARD = b"""---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.jsonl}, {split: test, path: small/test.jsonl}]
- config_name: large
  data_files: [{split: train, path: large.jsonl}]
---
"""
DATASETS = {
    "acme/known": {"data/train.jsonl": lines("a"), "data/test.jsonl": lines("b")},
    "acme/configured": {
        "README.md": CARD,
        "small/train.jsonl": lines("c"),
        "small/test.jsonl": lines("d"),
        "large.jsonl": lines("e"),
    },
}


def load(tmp_path, endpoint, paths, **environment):
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), **environment}
    command = [sys.executable, "-c", SCRIPT, *paths]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of(word):
    return [[f"row {i + 1}", {"text": f"{word} {i}"}] for i in range(5)]


def test_datasets_on_the_hub(tmp_path):
    good = {
        "acme/known": of("a"),
        "acme/known:test": of("b"),
        "acme/known:train[:2]": of("a")[:2],
        "acme/known:train[2:4]": [[f"row {i - 1}", row] for i, (_, row) in enumerate(of("a"))][2:4],
        "acme/configured/small:test": of("d"),
        "acme/configured/large:train": of("e"),
        "hf://datasets/acme/known/data/test.jsonl": [
            [place.replace("row", "line"), row] for place, row in of("b")
        ],
    }
    bad = {
        "acme/known:nope": "has no split 'nope'; it has 'train', 'test'. Name one, as in acme/kno",
        "acme/configured:train": "Config name is missing. Please pick one among the available con",
        "acme/configured/huge:train": "BuilderConfig 'huge' not found. Available: ['small', 'la",
        "acme/unknown": "the hub has no such dataset, or none that your token may read",
        "hf://datasets/acme/unknown/a.jsonl": "the hub has no such dataset",
        "hf://datasets/acme/known/nope.jsonl": "is neither a file nor",
        "hf://datasets/acme/known/nope/*.jsonl": "no file matches this pattern",
    }
    with serve(FakeHub(DATASETS)) as (endpoint, _):
        found = load(tmp_path, endpoint, [*good, *bad])
    assert {path: found[path][0][0][1] for path in good} == good
    assert len({found[path][0][0][0] for path in good}) == len(good), "hashes tell them apart"
    for path, message in bad.items():
        assert found[path][0].startswith(f"TextDataModule(paths='{path}'): ")
        assert message in found[path][0]


@pytest.mark.slow
@pytest.mark.alone  # nobody waits for a hub that is not there
def test_what_was_loaded_once_needs_no_network_and_the_rest_fails_within_seconds(tmp_path):
    cached = ["acme/known", "acme/known:test", "acme/configured/small:test"]
    uncached = ["acme/unknown", "hf://datasets/acme/known/a.csv"]
    with serve(FakeHub(DATASETS)) as (endpoint, stop):
        online = load(tmp_path, endpoint, cached)
        stop()
        down = load(tmp_path, endpoint, cached + uncached)
    offline = load(tmp_path, endpoint, cached + uncached, HF_HUB_OFFLINE="1")
    for found, problem in ((down, "the hub could not be reached"), (offline, "HF_HUB_OFFLINE")):
        assert [found[path][0] for path in cached] == [online[path][0] for path in cached]
        assert all(problem in found[path][0] for path in uncached)
        assert str(tmp_path / "hf") in found["acme/unknown"][0]
        assert max(seconds for _, seconds in found.values()) < 5


def test_keys_that_only_other_rows_have_are_absent(tmp_path):
    rows = [{"cells": [{"a": 1}, {"b": {"c": 2}}], "note": None}, {"cells": [], "note": "d"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    [file] = find_files("X", "paths", str(tmp_path / "saved"))
    assert [row for _, row in file.records()] == rows
