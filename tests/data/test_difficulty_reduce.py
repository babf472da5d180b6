import multiprocessing
import resource

import numpy as np
import pytest

from lightning_align.data import difficulty_reduce
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.difficulty_reduce import build_index
from tests.helpers.small_disk import small_disk  # noqa: F401

fork = multiprocessing.get_context("fork")
RANDOM = np.random.default_rng(0)
KINDS = {
    "small whole numbers": RANDOM.integers(5, 70, 5003),
    "all of int8": RANDOM.integers(-128, 128, 5003).astype(np.int8),
    "negative ones of 16 bits": RANDOM.integers(-32768, 32768, 5003),
    "more than 16 bits apart": RANDOM.integers(-3, 10**6, 5003),
    "enormous ones": RANDOM.integers(0, 2**62, 5003),
    "enormous ones of both signs": RANDOM.integers(-(2**62), 2**62, 5003),
    "floats": RANDOM.normal(size=5003),
    "few floats": RANDOM.integers(0, 9, 5003) / 8,
    "whole numbers and floats": np.arange(5003) // 7,
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(difficulty_reduce, "PIECE", 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_core_is_what_sorting_in_memory_gives(tmp_path, small_pieces, kind):
    values = KINDS[kind]
    pieces = np.array_split(values, 7)
    if kind == "whole numbers and floats":
        pieces[3] = pieces[3].astype(np.float64)
    build_index(tmp_path / "x", "x", lambda: pieces)
    ours = DifficultyIndex.open(tmp_path / "x")
    theirs = DifficultyIndex.of_values(values.astype(ours.values.dtype))
    for name in ("values", "levels", "offsets", "order"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.order.dtype == np.int32
    assert (ours.values.dtype.kind == "f") == ("floats" in kind)
    assert not ours.joined


def test_values_take_the_narrowest_type(tmp_path):
    for high, dtype in ((255, np.uint8), (256, np.uint16), (65536, np.uint32)):
        values = np.array([0, high])
        build_index(tmp_path / "x", "x", lambda values=values: [values])
        assert DifficultyIndex.open(tmp_path / "x").values.dtype == dtype


def test_finer_difficulties_are_joined(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(difficulty_reduce, "MAX_LEVELS", 16)
    values = KINDS["floats"].astype(np.float32)
    build_index(tmp_path / "x", "x", lambda: [values])
    index = DifficultyIndex.open(tmp_path / "x")
    assert index.joined
    assert len(index.levels) == 16
    assert sorted(index.order.tolist()) == list(range(5003))
    for level, greatest in enumerate(index.levels):
        samples = index.samples(level)
        assert values[samples].max() == greatest
        assert (np.diff(samples) > 0).all()
    assert np.diff(index.offsets)[1:].max() < 2 * 5003 / 15


def test_not_a_number_is_named_by_its_sample(tmp_path):
    pieces = [np.array([1.0, 2.0]), np.array([3.0, np.nan])]
    with pytest.raises(ValueError, match=r"build_index\(loss=nan\): .*sample 3"):
        build_index(tmp_path / "x", "loss", lambda: pieces)
    assert not (tmp_path / "x").exists()


def test_nothing_to_order_is_refused(tmp_path):
    pieces = [np.full(3, 65), np.full(2, 65)]
    with pytest.raises(ValueError, match=r"length=65\): is the difficulty of all 5 samples"):
        build_index(tmp_path / "x", "length", lambda: pieces)
    with pytest.raises(ValueError, match="there is no sample"):
        build_index(tmp_path / "x", "length", list)


def test_a_full_disk_leaves_the_index_that_was_there(small_disk):  # noqa: F811
    """200 KB of samples fit, 300 KB do not: the file is allocated before it is mapped."""
    folder, limit = small_disk
    old = np.arange(1000)
    build_index(folder / "x", "x", lambda: [old])
    report = fork.Queue()

    def work():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            build_index(folder / "x", "x", lambda: [np.arange(75_000) % 100])
        except OSError as error:
            report.put(str(error))

    process = fork.Process(target=work)
    process.start()
    message = report.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert "build_index: the disk is full" in message
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert DifficultyIndex.open(folder / "x").num_samples == 1000
