"""Files that say which batches of a stream to leave out, and of which stream they speak.

A number means a batch only in the stream that it was counted in. So the file holds what tells that
stream from others, and whoever reads it compares.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec

from lightning_align._errors import argument_error
from lightning_align.data.files import parse_json
from lightning_align.data.skipped import SkippedBatches

_KIND, _FORMAT = "lightning_align.skip_list", 1


def write_skip_list(
    path: str, skipped: SkippedBatches | Iterable[Iterable[int]], stream: Mapping[str, Any]
) -> None:
    """Write a skip list as JSON.

    Args:
        path: File or fsspec URL, whose folder is made if there is none.
        skipped: What to leave out.
        stream: What tells the stream from others, as ``run.skip_list.stream_of`` returns it.

    Raises:
        OSError: If it cannot be written.
    """
    ranges = SkippedBatches.of(skipped).plain()
    body = {"kind": _KIND, "format": _FORMAT, "stream": dict(stream), "ranges": ranges}
    with fsspec.open(path, "wt", encoding="utf-8", auto_mkdir=True) as file:
        file.write(json.dumps(body, indent=1) + "\n")


def read_skip_list(
    path: str, where: str = "read_skip_list"
) -> tuple[SkippedBatches, dict[str, Any]]:
    """What a skip list leaves out, and of which stream.

    Args:
        path: File or fsspec URL.
        where: Who names the file, for errors.

    Raises:
        ValueError: If it cannot be read, or is none.
    """

    def error(rule: str) -> ValueError:
        way_out = "'lightning-align spikes FOLDER --skip_list FILE' writes one"
        return argument_error(where, "skip_list", path, rule, way_out)

    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            body = parse_json(file.read())
    except (OSError, ImportError) as reason:
        raise error(f"cannot be read ({reason})") from None
    except ValueError as reason:
        raise error(f"is no JSON file ({reason})") from None
    if not isinstance(body, dict) or body.get("kind") != _KIND:
        raise error("is no skip list")
    if body.get("format") != _FORMAT:
        raise error(f"its format is not {_FORMAT}: a newer version wrote it")
    ranges, stream = body.get("ranges"), body.get("stream")
    if not isinstance(ranges, list) or not isinstance(stream, dict):
        raise error("ranges or stream is missing")
    try:
        return SkippedBatches(ranges), stream
    except ValueError as reason:
        raise error(str(reason).rstrip(".")) from None


def check_stream(
    where: str, path: str, listed: Mapping[str, Any], present: Mapping[str, Any]
) -> None:
    """Refuse a skip list of another stream.

    Args:
        where: Who names the file.
        path: The file.
        listed: The stream that it speaks of.
        present: The stream of the run.

    Raises:
        ValueError: If they differ.
    """
    names = sorted({*listed, *present})
    differing = [name for name in names if listed.get(name) != present.get(name)]
    if differing:
        name = differing[0]
        was, now = listed.get(name), present.get(name)
        rule = f"its batches are of other data: {name} was {was!r} and is {now!r}"
        way_out = "Train on the same data with the same seed, batch size and ranks, or leave it out"
        raise argument_error(where, "skip_list", path, rule, way_out)
