"""How a checkpoint comes to be and goes: its manifest is written last and deleted first."""

from pathlib import Path

import pytest

from lightning_align.checkpointing import committed_checkpoints
from lightning_align.checkpointing.commit import commit, remove, sweep
from lightning_align.checkpointing.files import Folder
from tests.helpers.faulty_files import faulty


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


@pytest.mark.parametrize("announce", [True, False])
def test_the_manifest_goes_before_its_files(announce: bool) -> None:
    """What is left of a deletion that is killed is no checkpoint, and the next run sweeps it."""
    with faulty() as files:
        folder = Folder("faulty://run")
        commit(folder, "a", 1, {"a.ckpt": [b"1"]}, {})
        files.log.clear()
        remove(folder, "a", ["a.ckpt"], announce=announce)

        assert files.log == [
            *([("write", "a.ckpt.writing")] if announce else []),
            *(("delete", "a.ckpt.json"), ("delete", "a.ckpt"), ("delete", "a.ckpt.writing")),
        ]
        assert folder.names() == []


def test_a_file_that_is_gone_by_the_end_is_not_committed() -> None:
    def sweep_it(operation: str, name: str) -> None:
        if name == "a.ckpt.part1":
            Folder("faulty://run").delete("a.ckpt")

    files = {"a.ckpt": [b"1"], "a.ckpt.part1": [b"2"]}
    with faulty(sweep_it):
        with pytest.raises(ValueError, match=r"a\.ckpt is missing"):
            commit(Folder("faulty://run"), "a", 1, files, {})
        assert committed_checkpoints("faulty://run") == []


def test_what_cannot_be_swept_is_passed_over() -> None:
    def refuse(operation: str, name: str) -> None:
        if (operation, name) == ("delete", "a.ckpt"):
            raise PermissionError(13, "denied")

    with faulty(refuse):
        folder = Folder("faulty://run")
        for name in ("a", "b"):
            folder.write(f"{name}.ckpt", [b"half"])
            folder.write(f"{name}.ckpt.writing", [b""])
        with pytest.warns(UserWarning, match=r"a\.ckpt\.writing is passed over: .*denied"):
            assert sweep(folder) == ["b.ckpt"]
        assert sorted(folder.names()) == ["a.ckpt", "a.ckpt.writing"]
