"""The commit record: read as it was written, or refused."""

import pytest
import torch

from lightning_align.offload.places import placed
from lightning_align.offload.record import FILE, Record, StatePlace, read_record


def test_a_record_is_read_as_it_was_written(tmp_path):
    places, _ = placed({"exp_avg": torch.zeros(3, 4, dtype=torch.float64)})
    states = {"block": {"weight": StatePlace(4096, 8192, places)}}
    written = Record(7, {"block": 1}, states, "layout", b"pay\nload")
    written.prepare(tmp_path)
    written.put_in_place(tmp_path)
    assert read_record(tmp_path) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_record_is_refused(tmp_path, place):
    record = Record(7, {"block": 1}, {}, "layout", b"payload")
    record.prepare(tmp_path)
    record.put_in_place(tmp_path)
    data = bytearray((tmp_path / FILE).read_bytes())
    data[place] ^= 1
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_record(tmp_path)
    (tmp_path / FILE).write_bytes(data[:30])
    with pytest.raises(ValueError, match="is damaged"):
        read_record(tmp_path)
