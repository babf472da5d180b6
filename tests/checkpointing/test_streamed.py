"""A file that is written piece by piece."""

import pytest
import torch

from lightning_align.checkpointing import streamed
from lightning_align.checkpointing.snapshot import HostBuffer
from lightning_align.checkpointing.streamed import save_streamed
from lightning_align.mapped import Part, mapped, part_of


@pytest.fixture
def shown(tmp_path):
    """A tensor of a file, and one of it that is transposed."""
    path = tmp_path / "file"
    path.write_bytes(torch.arange(48, dtype=torch.float32).numpy().tobytes())
    with path.open("rb") as stream:
        whole = mapped([Part(stream.fileno(), 0, 192)], "file")
    return part_of(whole, 0, (4, 8), torch.float32), part_of(whole, 128, (2, 8), torch.float32).T


def test_what_is_written_is_what_torch_would_have_written(tmp_path, shown):
    first, second = shown
    own = torch.arange(5, dtype=torch.float64)
    state = {
        "shown": [first, second, first[1:3]],
        "own": own,
        "shares": own[2:],
        "outline": torch.empty(3, 2, device="meta"),
        "number": 7,
    }
    save_streamed(state, tmp_path / "made" / "state.ckpt")
    for mmap in (False, True):
        found = torch.load(tmp_path / "made" / "state.ckpt", weights_only=True, mmap=mmap)
        assert found.keys() == state.keys()
        assert all(map(torch.equal, found["shown"], state["shown"]))
        assert torch.equal(found["own"], own)
        assert found["own"].untyped_storage().data_ptr() == found["shares"].data_ptr() - 16
        assert (found["outline"].shape, found["outline"].is_meta) == ((3, 2), True)
        assert found["number"] == 7
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["state.ckpt"]


def test_what_files_show_is_not_copied_and_let_go_afterwards(shown):
    buffer = HostBuffer()
    assert buffer.copy([shown[0], torch.ones(3)]) == 12
    assert buffer.let_go()
    assert buffer.copy([torch.ones(3)]) == 12
    assert not buffer.let_go()


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    save_streamed({"step": 1}, tmp_path / "state.ckpt")

    def fails(self, structure):
        yield b"half of it"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed.HostBuffer, "file", fails)
    with pytest.raises(OSError, match="No space left"):
        save_streamed({"step": 2}, tmp_path / "state.ckpt")
    assert torch.load(tmp_path / "state.ckpt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.ckpt"]


def test_a_url_is_written_in_place():
    save_streamed({"step": 3}, "memory://streamed/state.ckpt")
    import fsspec

    with fsspec.open("memory://streamed/state.ckpt") as file:
        assert torch.load(file) == {"step": 3}
