import json
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
import xxhash

from lightning_align.checkpointing import (
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from lightning_align.checkpointing.commit import commit, sweep
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.manifest import Hashed, Manifest, StoredFile
from tests.helpers.faulty_files import faulty


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    with_engine = SnapshotEngine(tmp_path)
    for step in (1, 2, 3):
        with_engine.save({"weight": torch.full((500,), float(step))}, f"step{step}", step)
    assert with_engine.close()
    return tmp_path


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


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


@pytest.mark.parametrize("place", [5, 60, -5])
def test_a_damaged_manifest(folder: Path, place: int) -> None:
    flip(folder / "step3.ckpt.json", place)

    with pytest.warns(
        UserWarning, match=r"step3.ckpt.json is passed over: the manifest is damaged"
    ):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")
    with pytest.raises(ValueError, match="the manifest is damaged"):
        load_checkpoint(folder / "step3.ckpt")


def test_all_are_damaged(folder: Path) -> None:
    for file in folder.glob("*.ckpt"):
        flip(file, 200)

    with pytest.warns(UserWarning, match="passed over"):
        assert latest_valid_checkpoint(folder) is None


def test_a_manifest_of_a_newer_format(folder: Path) -> None:
    """Its digest is right, so it is not damage; the message says so."""
    text = (folder / "step3.ckpt.json").read_text()
    manifest = Manifest.from_json(text.encode())
    body = json.loads(text)
    newer = manifest.to_json().decode().replace('"format": 1', '"format": 2')
    assert body["format"] == 1
    digest = json.loads(newer).pop("xxh3_128")
    core = newer.replace(f',\n "xxh3_128": "{digest}"', "").rstrip()
    newer = newer.replace(digest, xxhash.xxh3_128_hexdigest(core.encode()))
    with pytest.raises(ValueError, match="its format is not 1: a newer version wrote it"):
        Manifest.from_json(newer.encode())


def test_a_file_that_was_never_committed_is_not_a_checkpoint(folder: Path) -> None:
    """What a kill leaves: data, or part of it, without a manifest."""
    (folder / "step4.ckpt").write_bytes((folder / "step3.ckpt").read_bytes())

    assert latest_valid_checkpoint(folder) == str(folder / "step3.ckpt")
    with pytest.raises(ValueError, match=r"it has no manifest \(step4.ckpt.json\)"):
        load_checkpoint(folder / "step4.ckpt")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint.*none.ckpt.*no such file"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_a_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    stolen = Manifest("x", 9, (StoredFile("../secret", 1, "0"),))
    (folder / "x.ckpt.json").write_bytes(stolen.to_json())

    with pytest.warns(UserWarning, match="names a file that is not its own"):
        assert [found.name for found in committed_checkpoints(folder)] == [
            "step3",
            "step2",
            "step1",
        ]


def test_a_renamed_manifest_is_not_trusted(folder: Path) -> None:
    (folder / "step3.ckpt.json").rename(folder / "step9.ckpt.json")

    with pytest.warns(UserWarning, match="the manifest is that of 'step3'"):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    engine.save({"path": Path("x")}, "a", 1)
    engine.close()

    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        load_checkpoint(tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == {"path": Path("x")}


def test_files_come_first_and_the_manifest_last() -> None:
    with faulty() as files:
        commit(
            Folder("faulty://run"), "a", 1, {"a.ckpt": [b"12", b"3"], "a.ckpt.part1": [b"4"]}, {}
        )

        writes = [name for operation, name in files.log if operation == "write"]
        assert writes == ["a.ckpt.writing", "a.ckpt", "a.ckpt.part1", "a.ckpt.json"]
        assert files.log[-1] == ("delete", "a.ckpt.writing")
        (manifest,) = committed_checkpoints("faulty://run")
        assert [(file.name, file.size) for file in manifest.files] == [
            ("a.ckpt", 3),
            ("a.ckpt.part1", 1),
        ]


def test_sweeping_leaves_what_it_did_not_write(folder: Path) -> None:
    """A checkpoint of Lightning's ModelCheckpoint has no manifest either."""
    (folder / "epoch=1.ckpt").write_bytes(b"foreign")
    (folder / "step4.ckpt").write_bytes(b"half")
    (folder / "step4.ckpt.json").write_bytes(b"{")
    (folder / "step4.ckpt.writing").touch()
    (folder / "step2.ckpt.writing").touch()  # killed right after the commit

    assert sorted(sweep(Folder(folder))) == ["step4.ckpt", "step4.ckpt.json"]

    names = {path.name for path in folder.iterdir()}
    assert {"epoch=1.ckpt", "step2.ckpt", "step2.ckpt.json"} <= names
    assert not any(name.startswith("step4") or name.endswith(".writing") for name in names)


def test_a_digest_is_that_of_all_bytes() -> None:
    whole, pieces = Hashed([b"abcdef"]), Hashed([b"ab", b"", memoryview(b"cdef")])

    assert b"".join(whole) == b"".join(pieces) == b"abcdef"
    assert whole.stored("x") == pieces.stored("x")
    assert whole.stored("x").size == 6


def test_a_url_that_has_no_filesystem() -> None:
    with pytest.raises(ValueError, match=r"dirpath='nothing://x'\): Protocol not known"):
        latest_valid_checkpoint("nothing://x")
