import json
from pathlib import Path

import pytest
import xxhash

from lightning_align.checkpointing import (
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from lightning_align.checkpointing.manifest import Hashed, Manifest, StoredFile
from tests.helpers.faulty_files import flip


@pytest.mark.parametrize("place", [5, 60, -5])
def test_a_damaged_manifest(folder: Path, place: int) -> None:
    flip(folder / "step3.ckpt.json", place)

    with pytest.warns(
        UserWarning, match=r"step3.ckpt.json is passed over: the manifest is damaged"
    ):
        assert latest_valid_checkpoint(folder) == str(folder / "step2.ckpt")
    with pytest.raises(ValueError, match="the manifest is damaged"):
        load_checkpoint(folder / "step3.ckpt")


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


def test_a_digest_is_that_of_all_bytes() -> None:
    whole, pieces = Hashed([b"abcdef"]), Hashed([b"ab", b"", memoryview(b"cdef")])

    assert b"".join(whole) == b"".join(pieces) == b"abcdef"
    assert whole.stored("x") == pieces.stored("x")
    assert whole.stored("x").size == 6
