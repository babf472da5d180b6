"""Which checkpoints of a folder are whole, the newest of them, and what is in one."""

from pathlib import Path
from pickle import UnpicklingError

import pytest

from lightning_align.checkpointing import SnapshotEngine, latest_valid_checkpoint, load_checkpoint
from tests.helpers.faulty_files import flip


def test_the_newest_is_found(folder: Path) -> None:
    assert latest_valid_checkpoint(folder) == str(folder / "step3.ckpt")
    assert load_checkpoint(folder / "step3.ckpt")["weight"][0] == 3


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path) is None
    assert latest_valid_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("place", [0, 100, 1000, -1])
def test_one_flipped_bit_is_found_and_the_one_before_is_taken(folder: Path, place: int) -> None:
    flip(folder / "step3.ckpt", place)

    with pytest.warns(
        UserWarning, match=r"step3.ckpt \(step 3\) is passed over: step3.ckpt is dam"
    ):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")
    with pytest.raises(ValueError, match=r"step3.ckpt'\): step3.ckpt is damaged: its xxh3 digest"):
        load_checkpoint(folder / "step3.ckpt")


def test_a_truncated_file_is_found(folder: Path) -> None:
    data = (folder / "step3.ckpt").read_bytes()
    (folder / "step3.ckpt").write_bytes(data[:-1])

    with pytest.warns(UserWarning, match=f"has {len(data) - 1} bytes instead of {len(data)}"):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")
    with pytest.raises(ValueError, match="bytes instead of"):
        load_checkpoint(folder / "step3.ckpt")


def test_a_missing_file_of_a_committed_set(folder: Path) -> None:
    (folder / "step3.ckpt").unlink()

    with pytest.warns(UserWarning, match="step3.ckpt is missing. Falling back"):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")


def test_all_are_damaged(folder: Path) -> None:
    for file in folder.glob("*.ckpt"):
        flip(file, 200)

    with pytest.warns(UserWarning, match="passed over"):
        assert latest_valid_checkpoint(folder) is None


def test_a_file_that_was_never_committed_is_not_a_checkpoint(folder: Path) -> None:
    """What a kill leaves: data, or part of it, without a manifest."""
    (folder / "step4.ckpt").write_bytes((folder / "step3.ckpt").read_bytes())

    assert latest_valid_checkpoint(folder) == str(folder / "step3.ckpt")
    with pytest.raises(ValueError, match=r"it has no manifest \(step4.ckpt.json\)"):
        load_checkpoint(folder / "step4.ckpt")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint.*none.ckpt.*no such file"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    engine.save({"path": Path("x")}, "a", 1)
    engine.close()

    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        load_checkpoint(tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == {"path": Path("x")}


def test_a_url_that_has_no_filesystem() -> None:
    with pytest.raises(ValueError, match=r"dirpath='nothing://x'\): Protocol not known"):
        latest_valid_checkpoint("nothing://x")
