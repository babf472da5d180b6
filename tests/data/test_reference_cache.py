"""The cache of a reference's values: found by tokens, whole or not there, damage named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from lightning_align.data.reference_cache import (
    PIECE,
    ReferenceCache,
    completion_key,
    num_predicted,
    pieces,
)

REFERENCE = {"weights": "a", "configuration": "b", "precision": "32-true"}


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def values_of(*lengths: int) -> dict[bytes, Any]:
    generator = np.random.default_rng(0)
    return {
        completion_key(ids(1), np.arange(length, dtype=np.int32)): generator.normal(
            size=length
        ).astype(np.float32)
        for length in lengths
    }


def lengths(values: dict[bytes, Any]) -> dict[bytes, int]:
    return {key: len(each) for key, each in values.items()}


def assert_same(ours: dict[bytes, Any], theirs: dict[bytes, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("url", ["{}", "file://{}/deep/er", "memory://reference-cache/{}/"])
def test_what_is_written_is_read_bit_by_bit(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path)
    first, second = values_of(3, 1), values_of(4, 0)
    for values in (first, second):
        ReferenceCache(url, REFERENCE).write(values)
    cache = ReferenceCache(url, REFERENCE)
    assert_same(cache.read(lengths(first | second)), first | second)
    assert_same(cache.read(lengths(second)), second)
    assert cache.read({key: length + 1 for key, length in lengths(first).items()}) == {}


def test_a_key_tells_prompt_from_completion_and_knows_no_dtype() -> None:
    key = completion_key(ids(1, 2), ids(3))
    assert key == completion_key(np.array([1, 2]), np.array([3]))
    others = [(ids(1), ids(2, 3)), (ids(1, 2), ids(4)), (ids(2, 1), ids(3)), (ids(), ids(1, 2, 3))]
    assert key not in {completion_key(*other) for other in others}


@pytest.mark.parametrize("other", [{"weights": "c"}, {"configuration": "c"}, {"precision": "16"}])
def test_another_reference_has_a_folder_of_its_own(tmp_path: Path, other: dict[str, str]) -> None:
    values = values_of(2)
    ReferenceCache(str(tmp_path), REFERENCE).write(values)
    assert ReferenceCache(str(tmp_path), {**REFERENCE, **other}).read(lengths(values)) == {}


def test_the_first_token_of_all_is_not_predicted() -> None:
    assert num_predicted(ids(1), ids(2, 3)) == 2
    assert num_predicted(ids(), ids(2, 3)) == 1


@pytest.mark.parametrize("number", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 300_000])
def test_pieces_hold_each_completion_once(number: int) -> None:
    found = list(pieces(number))
    assert [place for piece in found for place in piece] == list(range(number))
    assert len(found) <= 1024


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-5],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a bit of the header": lambda data: data.replace(b'"shape":[5]', b'"shape":[4]'),
    "not safetensors": lambda data: b"x" * 200,
    "other tensors": lambda data: save({"weight": np.zeros(3, np.float32)}),
    "without metadata": lambda data: save(load(data)),
    "metadata that is no object": lambda data: save(load(data), {"reference_cache": "[]"}),
    "huge header": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_lacking_and_written_anew(tmp_path: Path, damage: str) -> None:
    cache = ReferenceCache(str(tmp_path), REFERENCE)
    good, bad = values_of(3), values_of(5)
    cache.write(good)
    before = set(Path(cache.folder).iterdir())
    cache.write(bad)
    (path,) = set(Path(cache.folder).iterdir()) - before
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path.name}.*computed anew"):
        assert_same(cache.read(lengths(good | bad)), good)
    cache.write(bad)
    assert_same(cache.read(lengths(good | bad)), good | bad)


def test_a_file_of_another_reference_is_not_believed(tmp_path: Path) -> None:
    ours, theirs = (ReferenceCache(str(tmp_path), {**REFERENCE, "weights": w}) for w in "ab")
    values = values_of(3)
    theirs.write(values)
    Path(theirs.folder).rename(ours.folder)
    with pytest.warns(UserWarning, match="of another reference"):
        assert ours.read(lengths(values)) == {}


def test_values_that_are_not_finite_are_not_believed(tmp_path: Path) -> None:
    cache = ReferenceCache(str(tmp_path), REFERENCE)
    values = {key: np.full_like(each, -np.inf) for key, each in values_of(3).items()}
    cache.write(values)
    with pytest.warns(UserWarning, match="not finite"):
        assert cache.read(lengths(values)) == {}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    cache = ReferenceCache(str(tmp_path), REFERENCE)
    values = values_of(3)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(values)
    assert list(Path(cache.folder).iterdir()) == []
    assert cache.read(lengths(values)) == {}


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("403, forbidden")])
def test_errors_that_clouds_have_of_their_own_are_errors_of_writing(
    error: Exception, monkeypatch: Any
) -> None:
    cache = ReferenceCache("memory://reference-cache-that-fails", REFERENCE)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cache._files, "pipe_file", fails)
    with pytest.raises(OSError, match=r"NotImplementedError|403"):
        cache.write(values_of(3))


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    cache = ReferenceCache(str(tmp_path), REFERENCE)
    Path(cache.folder).write_text("")
    assert cache.read(lengths(values_of(3))) == {}
    with pytest.raises(OSError, match="exists"):
        cache.write(values_of(3))
