"""Parts of files as tensors."""

import gc
import resource

import pytest
import torch

from lightning_align.mapped import Part, mapped, part_of, source_of
from tests.helpers.children import in_child

PAGE = 4096


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(4)))
    with path.open("rb") as stream:
        yield stream


def test_parts_are_shown_one_behind_the_other(file):
    descriptor = file.fileno()
    shown = mapped([Part(descriptor, 3 * PAGE, PAGE), Part(descriptor, PAGE, PAGE + 5)])
    assert shown.tolist() == [3] * PAGE + [1] * PAGE + [2] * 5


def test_a_file_stays_as_it_is_and_may_be_closed_and_deleted(file, tmp_path):
    shown = mapped([Part(file.fileno(), 0, 2 * PAGE)])
    shown[PAGE] = 9
    assert (tmp_path / "file").read_bytes()[PAGE] == 1
    file.close()
    (tmp_path / "file").unlink()
    assert (int(shown[PAGE]), int(shown[PAGE + 1])) == (9, 1)


def test_the_end_is_told_when_nobody_looks_any_longer(file):
    ends = []
    shown = mapped([Part(file.fileno(), 0, PAGE)], "file", lambda: ends.append(1))
    part = part_of(shown, 64, (2, 8), torch.float32)
    address = part.data_ptr()
    assert part.untyped_storage().nbytes() == 64
    assert source_of(part[1]) == ("file", 64 + 32)
    assert source_of(part.clone()) is None
    del shown
    gc.collect()
    assert not ends
    part.zero_()
    del part
    gc.collect()
    assert ends == [1]
    assert source_of(torch.empty(1)) is None
    assert address


def test_nothing_is_told_of_what_has_no_source(file):
    assert source_of(mapped([Part(file.fileno(), 0, PAGE)])) is None


def test_nothing_at_all_may_be_shown():
    ends = []
    assert mapped([], "file", lambda: ends.append(1)).shape == (0,)
    assert ends == [1]
    assert part_of(torch.empty(8, dtype=torch.uint8), 4, (0, 3), torch.float32).shape == (0, 3)


def test_where_memory_is_limited_it_counts_nothing(file):
    """Linux counts private memory that can be changed by RLIMIT_DATA, not what can only be read."""
    file.close()
    with open(file.name, "r+b") as larger:
        larger.truncate(1 << 28)

        def show():
            used, hard = data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (used + (100 << 20), hard))
            shown = mapped([Part(larger.fileno(), 0, 1 << 28)], may_be_fixed=True)
            assert (int(shown[PAGE]), int(shown[-1])) == (1, 0)
            assert data_bytes() < used + (50 << 20)

        assert in_child(show) == 0


def data_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


def test_a_part_may_be_a_single_number(file):
    shown = mapped([Part(file.fileno(), 0, PAGE)])
    assert part_of(shown, 0, (), torch.float32).shape == ()
    assert part_of(shown, 0, (), torch.uint8) == 0
