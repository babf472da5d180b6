import pickle

import numpy as np
import pytest

from lightning_align.data.difficulty import DifficultyIndex, whole_dtype
from lightning_align.data.difficulty_reduce import build_index
from tests.helpers.faulty_files import flip

VALUES = [3, 1, 2, 1, 3, 3, 7]


@pytest.fixture
def folder(tmp_path):
    values = np.array(VALUES)
    build_index(tmp_path / "length", "length", lambda: [values], fingerprint="these")
    return tmp_path / "length"


def test_levels_are_sorted_and_samples_rise_inside_one():
    index = DifficultyIndex.of_values(VALUES)
    assert index.levels.tolist() == [1, 2, 3, 7]
    assert index.order.tolist() == [1, 3, 2, 0, 4, 5, 6]
    assert index.offsets.tolist() == [0, 2, 3, 6, 7]
    assert index.samples(2).tolist() == [0, 4, 5]
    assert index.values.tolist() == VALUES
    assert not index.joined


@pytest.mark.parametrize("max_levels", [1, 2, 3, 7, 50])
def test_joined_levels_are_never_harder_than_their_name(max_levels):
    values = np.random.default_rng(0).normal(size=997)
    index = DifficultyIndex.of_values(values)
    joined = index.merged(max_levels)
    assert len(joined.levels) == max_levels
    assert joined.joined
    assert joined.order is index.order
    for level, greatest in enumerate(joined.levels):
        assert values[joined.samples(level)].max() == greatest
        assert abs(len(joined.samples(level)) - 997 / max_levels) < 2
    assert index.merged(1000) is index


def test_joining_keeps_a_level_that_is_larger_than_its_part():
    index = DifficultyIndex.of_values([0] * 90 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).merged(4)
    assert index.levels.tolist() == [0, 10]
    assert index.offsets.tolist() == [0, 90, 100]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ([], "one number for each sample"),
        ([[1, 2]], "one number for each sample"),
        (["a"], "one number for each sample"),
        ([1.0, float("nan"), 2.0], r"sample 1 is the first that is not"),
        ([1.0, 2.0, float("inf")], r"sample 2 is the first that is not"),
    ],
)
def test_difficulties_that_are_none_are_refused(values, rule):
    with pytest.raises(ValueError, match=rule):
        DifficultyIndex.of_values(values)


def test_an_index_is_mapped_and_travels_as_a_path(folder):
    index = DifficultyIndex.open(folder)
    assert isinstance(index.order, np.memmap)
    assert (index.name, index.fingerprint, index.num_samples) == ("length", "these", 7)
    message = pickle.dumps(index)
    assert len(message) < 500
    assert pickle.loads(message).order.tolist() == index.order.tolist()
    joined = pickle.loads(pickle.dumps(index.merged(2)))
    assert joined.levels.tolist() == index.merged(2).levels.tolist()


def cut(folder):
    (folder / "order").write_bytes((folder / "order").read_bytes()[:-1])


DAMAGES = {
    "cut short": (cut, "order has 27 bytes and not 28"),
    "a bit flipped": (lambda folder: flip(folder / "order", 3), "the content of order has"),
    "a file gone": (lambda folder: (folder / "levels").unlink(), "levels is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_refused(folder, damage):
    do, found = damage
    do(folder)
    with pytest.raises(ValueError, match=rf"Curriculum\(order='.*'\): .*{found}.*difficulty`"):
        DifficultyIndex.open(folder, where="Curriculum", argument="order")


def test_an_index_of_other_data_is_refused(folder):
    index = DifficultyIndex.open(folder)
    index.check_data("X", "order", 7, "these")
    index.check_data("X", "order", 7)
    with pytest.raises(ValueError, match=r"X\(order='.*'\): is of 7 samples, and there are 8"):
        index.check_data("X", "order", 8, "these")
    with pytest.raises(ValueError, match="is of other data: of 'these', and this is 'those'"):
        index.check_data("X", "order", 7, "those")
    DifficultyIndex.of_values(VALUES).check_data("X", "order", 7, "those")


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, np.uint8),
        (0, 256, np.uint16),
        (-1, 127, np.int8),
        (-1, 128, np.int16),
        (-128, 0, np.int8),
        (-129, 0, np.int16),
        (-1, 2**40, np.int64),
        (0, 2**64 - 1, np.uint64),
        (-(2**63), 2**63 - 1, np.int64),
    ],
)
def test_whole_numbers_take_the_narrowest_type(low, high, dtype):
    assert whole_dtype(low, high) == dtype
