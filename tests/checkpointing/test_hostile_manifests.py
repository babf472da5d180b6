"""Manifests that are broken, or written to do harm: passed over with a warning, and never valid."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_align.checkpointing import (
    Manifest,
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from lightning_align.checkpointing.manifest import FORMAT

NAME = "b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is whole, and a newer one whose manifest the tests replace."""
    path = tmp_path_factory.mktemp("hostile")
    with SnapshotEngine(path) as engine:
        for step, name in enumerate(("a", NAME), start=1):
            engine.save({"weight": torch.ones(3)}, name, step)
    return path


@pytest.fixture(scope="module")
def good(folder: Path) -> dict[str, Any]:
    """The newer one's manifest, as its fields."""
    return asdict(Manifest.from_json((folder / f"{NAME}.ckpt.json").read_bytes()))


def signed(body: Any, dump: Callable[..., str] = json.dumps) -> bytes:
    """A manifest with a digest that is right, whatever it says."""
    text = dump({"format": FORMAT, **body}, indent=1)
    canonical = json.dumps(json.loads(text), indent=1)
    digest = xxhash.xxh3_128_hexdigest(canonical.encode())
    return f'{text[:-2]},\n "xxh3_128": "{digest}"\n}}\n'.encode()


def assert_is_passed_over(folder: Path, manifest: bytes | Callable[[Path], None]) -> None:
    """By everything that reads a folder; the one before it is taken."""
    path = folder / f"{NAME}.ckpt.json"
    if os.path.lexists(path):
        path.unlink()
    if callable(manifest):
        manifest(path)
    else:
        path.write_bytes(manifest)
    with pytest.warns(UserWarning, match=r"b\.ckpt\.json is passed over: "):
        assert [found.name for found in committed_checkpoints(folder)] == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert latest_valid_checkpoint(folder) == str(folder / "a.ckpt")
        with pytest.raises(ValueError, match=r"load_checkpoint\(path="):
            load_checkpoint(folder / f"{NAME}.ckpt")
        with SnapshotEngine(folder) as engine:
            assert [found.name for found in engine.committed] == ["a"]
            with pytest.raises(ValueError, match="none is ever overwritten"):
                engine.save({}, NAME, 3)


def test_what_is_signed_here_is_what_is_written(folder: Path, good: dict[str, Any]) -> None:
    """Else the tests below would be refused for another reason than theirs."""
    assert Manifest.from_json(signed(good)).to_json() == signed(good)
    assert Manifest.from_json(signed(good)).step == 2


def entry(good: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"files": [{**good["files"][0], **fields}]}


def lineage(**fields: Any) -> dict[str, Any]:
    return {"metadata": {"lineage": {"commit": 9, "parent": None, "abandoned": [], **fields}}}


FIELDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a text for a step": lambda good: {"step": "9"},
    "a step that is half": lambda good: {"step": 2.5},
    "a step that is true": lambda good: {"step": True},
    "a step that is NaN": lambda good: {"step": float("nan")},
    "a step beyond 64 bits": lambda good: {"step": 10**300},
    "no step": lambda good: {"step": None},
    "no files": lambda good: {"files": []},
    "files that are none": lambda good: {"files": [1]},
    "files by name": lambda good: {"files": {"b.ckpt": 3}},
    "a file twice": lambda good: {"files": good["files"] * 2},
    "a part only": lambda good: entry(good, name="b.ckpt.part1"),
    "another one's file": lambda good: entry(good, name="a.ckpt"),
    "a path that leads out": lambda good: entry(good, name="../b.ckpt"),
    "an absolute path": lambda good: entry(good, name="/etc/passwd"),
    "a part elsewhere": lambda good: {
        "files": [*good["files"], {**good["files"][0], "name": "b.ckpt.part/../../x"}]
    },
    "a file without a name": lambda good: entry(good, name=["b.ckpt"]),
    "a size below zero": lambda good: entry(good, size=-1),
    "a text for a size": lambda good: entry(good, size="9"),
    "a digest that is none": lambda good: entry(good, xxh3_128=None),
    "a digest that is short": lambda good: entry(good, xxh3_128="0"),
    "a file with more to say": lambda good: entry(good, link="elsewhere"),
    "metadata in a list": lambda good: {"metadata": [1]},
    "a lineage that is a text": lambda good: {"metadata": {"lineage": "x"}},
    "a commit that is a text": lambda good: lineage(commit="9"),
    "a commit below zero": lambda good: lineage(commit=-9),
    "a commit beyond 64 bits": lambda good: lineage(commit=2**70),
    "a parent that is a list": lambda good: lineage(parent=[1]),
    "abandoned by number": lambda good: lineage(abandoned=[3]),
    "abandoned in a dict": lambda good: lineage(abandoned={"a": 1}),
    "a time that is infinite": lambda good: {"saved_at": float("inf")},
    "a time beyond all numbers": lambda good: {"saved_at": 10**400},
    "a time in words": lambda good: {"saved_at": "today"},
    "a name that is a list": lambda good: {"name": ["b"]},
    "another name": lambda good: {"name": "a"},
    "an unknown field": lambda good: {"code": "import os"},
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_manifest_that_says_what_cannot_be(what: str, folder: Path, good: dict[str, Any]) -> None:
    assert_is_passed_over(folder, signed({**good, **FIELDS[what](good)}))


def twice(body: Any, indent: int) -> str:
    """The step is given twice."""
    return json.dumps(body, indent=indent).replace('"step": 2', '"step": 9,\n "step": 2')


FILES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "nothing": lambda good: b"",
    "zeros": lambda good: bytes(2000),
    "a list": lambda good: b"[]",
    "a number": lambda good: b"7",
    "too deep": lambda good: b"[" * 200_000,
    "deep metadata": lambda good: signed(good).replace(
        b'"metadata": {', b'"metadata": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b",", 1
    ),
    "5000 digits": lambda good: signed(good).replace(b'"step": 2', b'"step": ' + b"9" * 5000),
    "not UTF-8": lambda good: signed(good).replace(b'"b"', b'"\xff"'),
    "UTF-16": lambda good: signed(good).decode().encode("utf-16"),
    "a byte order mark": lambda good: b"\xef\xbb\xbf" + signed(good),
    "a field twice": lambda good: signed(good, twice),
    "spaces": lambda good: signed(good) + b" ",
}


@pytest.mark.parametrize("what", FILES)
def test_a_manifest_that_is_no_manifest(what: str, folder: Path, good: dict[str, Any]) -> None:
    assert_is_passed_over(folder, FILES[what](good))


PLACES: dict[str, Callable[[Path], None]] = {
    "a link to the other one": lambda path: path.symlink_to(path.with_name("a.ckpt.json")),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_manifest_that_is_no_file(what: str, folder: Path, good: dict[str, Any]) -> None:
    assert_is_passed_over(folder, PLACES[what])


def test_a_manifest_in_a_link_is_not_one_however_good(
    folder: Path, good: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "whole").write_bytes(signed(good))
    assert_is_passed_over(folder, lambda path: path.symlink_to(tmp_path / "whole"))


@pytest.mark.parametrize("what", ["link", "loop", "folder", "pipe"])
def test_data_that_is_no_file_is_passed_over(what: str, tmp_path: Path) -> None:
    with SnapshotEngine(tmp_path) as engine:
        for step in (1, 2):
            engine.save({"weight": torch.ones(3)}, f"step{step}", step)
    data = tmp_path / "step2.ckpt"
    data.rename(tmp_path / "moved")
    make = {
        "link": lambda: data.symlink_to(tmp_path / "moved"),
        "loop": lambda: data.symlink_to(data),
        "folder": data.mkdir,
        "pipe": lambda: os.mkfifo(data),
    }
    make[what]()
    with pytest.warns(UserWarning, match=r"step2\.ckpt is no regular file\. Falling back"):
        assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step1.ckpt")
    with pytest.raises(ValueError, match=r"step2\.ckpt is no regular file"):
        load_checkpoint(data)


def test_an_announcement_that_is_a_folder_does_not_keep_a_run_from_starting(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.ckpt.writing").mkdir()
    with (
        pytest.warns(UserWarning, match=r"x\.ckpt\.writing is passed over"),
        SnapshotEngine(tmp_path) as engine,
    ):
        engine.save({}, "a", 1)
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "a.ckpt")


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["", "b", "b.ckpt", "/b.ckpt", "0" * 32, 2**63, -1, 1e400, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "size", "xxh3_128", "lineage", "commit", "abandoned"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def is_read_or_told(data: bytes) -> Manifest | None:
    """What comes of reading it: a manifest whose fields are what they must be, or a ValueError."""
    try:
        manifest = Manifest.from_json(data)
    except ValueError:
        return None
    assert manifest.to_json() == data
    assert type(manifest.step) is int
    assert f"{manifest.name}.ckpt" in {file.name for file in manifest.files}
    assert sorted([manifest, manifest], key=lambda each: each.order)
    assert all("/" not in file.name and file.size >= 0 for file in manifest.files)
    assert all(isinstance(name, str) for name in manifest.abandoned)
    return manifest


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(["name", "step", "files", "metadata", "saved_at", "format", "x"]),
        junk,
        min_size=1,
        max_size=3,
    )
)
def test_any_field_may_be_anything(good: dict[str, Any], fields: dict[str, Any]) -> None:
    is_read_or_told(signed({**good, **fields}))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_may_be_anything(good: dict[str, Any], data: st.DataObject) -> None:
    """Cut, filled and flipped; what is left of the digest must find it."""
    raw = bytearray(signed(good))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        stop = data.draw(st.integers(start, min(len(raw), start + 20)))
        raw[start:stop] = data.draw(st.binary(max_size=8))
    found = is_read_or_told(bytes(raw))
    assert found is None or bytes(raw) == signed(good)
