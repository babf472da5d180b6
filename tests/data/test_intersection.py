"""What several measures allow is written once, and used only as it was written."""

import errno

import numpy as np
import pytest

from lightning_align.data import intersection
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.difficulty_reduce import build_index
from lightning_align.data.whole_folder import FileWriter
from tests.helpers.curriculum import linear

VALUES = {
    "length": np.arange(200) * 7 % 31 + 1,
    "rarity": np.arange(200) * 11 % 29 + 1,
}


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(intersection, "KEPT_FROM", 1)


@pytest.fixture
def folder(tmp_path):
    for name, values in VALUES.items():
        build_index(tmp_path / name, name, lambda values=values: [values])
    return tmp_path


def batches(folder, total=6):
    """Of a curriculum on both indices, and whether its samples are those of a file."""
    indices = {name: DifficultyIndex.open(folder / name) for name in VALUES}
    pace = {name: linear(total, 5, 31, 2) for name in VALUES}
    sampler = CurriculumSampler(indices, pace, 4)
    samples = sampler.order.levels.samples
    return [sampler.batch(n) for n in range(40)], isinstance(samples, np.memmap)


def in_memory(total=6):
    pace = {name: linear(total, 5, 31, 2) for name in VALUES}
    sampler = CurriculumSampler(VALUES, pace, 4)
    return [sampler.batch(n) for n in range(40)]


def files(folder):
    return [*(folder / "length").glob("intersection-*")]


def test_it_is_written_once_and_mapped_from_there(folder, monkeypatch):
    expected = in_memory()
    assert batches(folder) == (expected, False)
    monkeypatch.setattr(intersection, "_computed", None)  # not called again
    assert batches(folder) == (expected, True)
    assert len(files(folder)) == 1


def test_another_schedule_and_an_index_of_other_data_are_others(folder):
    batches(folder)
    (first,) = files(folder)
    assert batches(folder, total=9) == (in_memory(9), False)
    assert first not in files(folder)
    assert len(files(folder)) == 1
    build_index(folder / "rarity", "rarity", lambda: [VALUES["rarity"][::-1].copy()])
    assert batches(folder, total=9)[1] is False


def test_what_was_damaged_is_not_used(folder):
    batches(folder)
    order = files(folder)[0] / "order"
    order.write_bytes(order.read_bytes()[:-1] + b"\x07")
    assert batches(folder) == (in_memory(), False)
    order.write_bytes(order.read_bytes()[:-4])
    assert batches(folder) == (in_memory(), False)
    assert batches(folder) == (in_memory(), True)


def test_where_there_is_no_place_it_stays_in_memory(folder, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(FileWriter, "write", full)
    assert batches(folder) == (in_memory(), False)
    assert files(folder) == []
