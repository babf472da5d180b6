import json
from pathlib import Path
from typing import Any

import pytest

from lightning_align.data.skip_list import check_stream, read_skip_list, write_skip_list
from lightning_align.data.skipped import SkippedBatches

STREAM = {"seed": 5, "batch": 8, "fingerprint": "a1", "loaders": [{"samples": None}]}


def written(folder: Path, **changes: Any) -> str:
    path = str(folder / "list.json")
    write_skip_list(path, [(3, 5), (9, 12)], STREAM)
    body = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(json.dumps(body))
    return path


def test_what_is_written_is_read_from_any_filesystem(tmp_path: Path) -> None:
    for path in (str(tmp_path / "new" / "list.json"), "memory://skip_lists/list.json"):
        write_skip_list(path, SkippedBatches([(9, 12), (3, 5)]), STREAM)
        assert read_skip_list(path) == (SkippedBatches([(3, 5), (9, 12)]), STREAM)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"kind": "other"}, "is no skip list"),
        ({"format": 2}, "its format is not 1: a newer version wrote it"),
        ({"ranges": None}, "ranges or stream is missing"),
        ({"stream": []}, "ranges or stream is missing"),
        ({"ranges": [[4, 2]]}, "must be pairs"),
        ({"ranges": [3]}, "must be pairs"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, changes: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"Guard\(skip_list='.*list.json'\): .*{rule}"):
        read_skip_list(written(tmp_path, **changes), "Guard")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"7"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"skip_list=.*is no (skip list|JSON file).*lightning-align"
    ):
        read_skip_list(str(path))


def test_no_file_and_no_filesystem_are_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none.json"), "nosuch://list.json"):
        with pytest.raises(ValueError, match=r"read_skip_list\(skip_list=.*(read|no JSON)"):
            read_skip_list(path)


def test_the_list_of_other_data_is_refused() -> None:
    check_stream("Guard", "list.json", STREAM, dict(STREAM))
    rule = r"Guard\(skip_list='list.json'\): .* other data: fingerprint was 'a1' and is 'b2'"
    with pytest.raises(ValueError, match=rule):
        check_stream("Guard", "list.json", STREAM, {**STREAM, "fingerprint": "b2"})
    with pytest.raises(ValueError, match="epoch was None and is 3"):
        check_stream("Guard", "list.json", STREAM, {**STREAM, "epoch": 3})
