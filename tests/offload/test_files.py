"""Direct files: what is written is read, and whatever goes wrong is told with its place."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_align._compat.torch_storage import is_shared_with_others
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads, filesystem


@pytest.fixture
def threads():
    threads = Threads(block_size=8192)
    yield threads
    threads.close()


def filled(nbytes, value=None):
    memory = BufferPool().take(nbytes)
    return memory.copy_(torch.arange(nbytes) % 251) if value is None else memory.fill_(value)


@pytest.mark.parametrize("direct_io", ["auto", False])
def test_what_is_written_is_read(tmp_path, direct_io):
    threads = Threads(block_size=8192, direct_io=direct_io)
    file = DirectFile(tmp_path / "file", threads)
    written = filled(8192 * 3 + 4096)
    file.write(written, 4096).wait()
    file.sync().wait()
    found = filled(len(written), 0)
    file.read(found, 4096).wait()
    assert torch.equal(found, written)
    assert (threads.traffic.written, threads.traffic.read) == (len(written), len(written))


def test_transfers_that_stop_short_go_on(tmp_path, threads, monkeypatch):
    whole = {"preadv": os.preadv, "pwritev": os.pwritev}
    for name, call in whole.items():
        monkeypatch.setattr(
            os, name, lambda fd, views, at, call=call: call(fd, [views[0][:4096]], at)
        )
    file = DirectFile(tmp_path / "file", threads)
    written = filled(8192 * 3)
    file.write(written, 0).wait()
    found = filled(len(written), 0)
    file.read(found, 0).wait()
    assert torch.equal(found, written)


@pytest.mark.parametrize("call", ["preadv", "pwritev", "fdatasync"])
def test_an_error_of_the_disk_names_the_file(tmp_path, threads, monkeypatch, call):
    file = DirectFile(tmp_path / "file", threads)
    file.write(filled(8192), 0).wait()

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    memory = filled(8192)
    start = {"preadv": file.read, "pwritev": file.write}.get(call)
    transfer = start(memory, 0) if start else file.sync()
    with pytest.raises(OSError, match=f"failed: Input/output error.*{tmp_path}/file") as error:
        transfer.wait()
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize("size", [4096, 5000])
def test_a_truncated_file_is_told_from_a_whole_one(tmp_path, threads, size):
    file = DirectFile(tmp_path / "file", threads)
    file.write(filled(8192), 0).wait()
    os.truncate(tmp_path / "file", size)
    with pytest.raises(OSError, match=f"the file has {size:,} bytes and is truncated"):
        file.read(filled(8192), 0).wait()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_no_room_is_told_in_bytes(tmp_path, threads, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    file = DirectFile(tmp_path / "file", threads)
    with pytest.raises(OSError, match=r"1,000,000 bytes are needed and [\d,]+ are free") as error:
        file.allocate(1_000_000)
    assert error.value.errno == code


def test_more_than_the_disk_has_is_refused_before_it_is_full(tmp_path, threads, monkeypatch):
    """A failed fallocate of ext4 leaves what it has got until there was none."""
    tried = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: tried.append(arguments))
    file = DirectFile(tmp_path / "file", threads)
    with pytest.raises(OSError, match="bytes are needed"):
        file.allocate(shutil.disk_usage(tmp_path).total * 2)
    assert not tried
    assert (tmp_path / "file").stat().st_size == 0


def test_without_direct_io_a_file_is_buffered_and_says_so(tmp_path, threads, monkeypatch):
    opened = os.open

    def refuse(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="has no direct I/O"):
        file = DirectFile(tmp_path / "file", threads)
    file.write(filled(4096), 0).wait()
    DirectFile(tmp_path / "other", threads)  # told once
    with pytest.raises(ValueError, match=r"direct_io=True\): the filesystem of"):
        DirectFile(tmp_path / "third", Threads(direct_io=True))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct I/O here")
def test_direct_io_that_is_refused_at_the_first_transfer_is_buffered(
    tmp_path, threads, monkeypatch
):
    whole = {"preadv": os.preadv, "pwritev": os.pwritev}

    def refusing(call):
        def move(descriptor, views, at):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(descriptor, views, at)

        return move

    for name, call in whole.items():
        monkeypatch.setattr(os, name, refusing(call))
    file = DirectFile(tmp_path / "file", threads)
    if not file.is_direct:
        pytest.skip("this filesystem has no direct I/O")
    strict = DirectFile(tmp_path / "strict", Threads(direct_io=True))
    written = filled(8192 * 3)
    with pytest.warns(UserWarning, match="has no direct I/O") as told:
        file.write(written, 0).wait()
    assert len(told) == 1
    assert not file.is_direct
    found = filled(len(written), 0)
    file.read(found, 0).wait()
    assert torch.equal(found, written)
    with pytest.raises(ValueError, match=r"direct_io=True\): the filesystem of"):
        strict.write(written, 0).wait()


def test_what_is_not_aligned_goes_through_the_page_cache(tmp_path, threads, monkeypatch):
    """ext4 refuses it otherwise, and tmpfs does not: the descriptor is looked at."""
    file = DirectFile(tmp_path / "file", threads)
    file.write(filled(8192 * 2), 0).wait()
    used, written = [], filled(8192)
    for name in ("preadv", "pwritev"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda fd, views, at, call=call: (
                used.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
                or call(fd, views, at)
            ),
        )
    direct = file.is_direct
    for memory, offset in ((written[:5000], 4096), (written[1:4097], 0), (written[:4096], 513)):
        file.write(memory, offset).wait()
        found = filled(len(memory) + 1, 0)[1:]
        file.read(found, offset).wait()
        assert torch.equal(found, memory)
    assert not any(used)
    assert file.is_direct == direct
    file.read(filled(4096), 4096).wait()
    assert used[-1] == direct
    file.close()


@pytest.mark.parametrize("arguments", [{"count": 0}, {"block_size": 5000}, {"block_size": 0}])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        Threads(**arguments)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux tells it there")
def test_a_filesystem_is_told_by_its_device(tmp_path):
    assert filesystem(Path("/proc")) == "proc"
    assert filesystem(tmp_path) != "proc"


def test_memory_is_free_as_soon_as_a_transfer_is_done(tmp_path, threads):
    """Whatever the thread that has moved it still holds: a buffer comes back, a view is alone."""
    file = DirectFile(tmp_path / "file", threads)
    for move in (file.write, file.read):
        for _ in range(200):
            memory = torch.zeros(4096, dtype=torch.uint8)
            move(memory, 0).wait()
            assert not is_shared_with_others(memory)
    file.close()
