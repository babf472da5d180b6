"""What can teach is kept, what cannot is counted, and a file has one format."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.paths import find_files
from lightning_align.data.samples import (
    close,
    common_length,
    read_samples,
    records_of_one_format,
)


def files(tmp_path, **contents):
    for name, text in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return find_files("Here", "paths", [str(tmp_path / f"{name}.jsonl") for name in contents])


def numbers(file):
    """The numbers of a file; odd ones are of no use."""
    for _, record in file.records():
        yield record["n"] if record["n"] % 2 == 0 else "it is odd"


def test_samples_of_all_files_in_their_order(tmp_path):
    found = files(tmp_path, a='{"n": 4}\n{"n": 2}\n', b='{"n": 8}\n')
    assert read_samples(found, numbers, "numbers") == [4, 2, 8]


def test_what_is_dropped_is_counted_once_over_all_files(tmp_path):
    found = files(tmp_path, a='{"n": 1}\n{"n": 2}\n', b='{"n": 3}\n')
    with pytest.warns(UserWarning, match="2 of 3 numbers dropped: 2 because it is odd") as seen:
        assert read_samples(found, numbers, "numbers") == [2]
    assert len(seen) == 1


def test_a_file_of_dropped_samples_is_not_empty_but_nothing_may_be_left(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is left \(1 of 1 numbers dropped"):
        read_samples(files(tmp_path, a='{"n": 1}\n'), numbers, "numbers")


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"b\.jsonl.*is empty, and must hold numbers"):
        read_samples(files(tmp_path, a='{"n": 2}\n', b=""), numbers, "numbers")


def test_a_file_has_one_format_and_the_error_names_both_places(tmp_path):
    (file,) = files(tmp_path, a='{"n": 1}\n{"n": 2}\n{"m": 3}\n')
    records = records_of_one_format(file, lambda file, place, record: "/".join(record), "nm")
    assert [record for _, _, record in (next(records), next(records))] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ValueError, match="line 3 holds m, but line 1 n"):
        next(records)


@given(st.lists(st.integers(0, 9)))
def test_a_sample_is_closed_once(ids):
    closed = close(ids, 9)
    assert closed.dtype == np.int32
    assert closed.tolist() == (ids if ids[-1:] == [9] else [*ids, 9])
    assert close(ids, None).tolist() == ids


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length(first, second):
    length = common_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first)
