"""Read an offline ``run-*.wandb`` file: what W&B would have uploaded.

wandb no longer ships a reader. The file is a 7-byte header (":W&B", a magic number, a version),
then LevelDB's log format: 32 KiB blocks of chunks, each with crc (4 bytes), length (2), type (1:
whole record, 2-4: its first, middle, last part); a record is one protobuf message.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_BYTES, HEADER_BYTES, CHUNK_HEADER_BYTES = 32 * 1024, 7, 7
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class WandbRun:
    history: list[dict] = field(default_factory=list)  # one dict per logged row, in order
    config: dict = field(default_factory=dict)
    media: list[Path] = field(default_factory=list)  # pictures and tables, as files that exist


def read_wandb_run(save_dir):
    """The one offline run under ``save_dir``; ends every run of this process."""
    import wandb

    wandb.finish()  # or the next logger of this process would go on with a dead run
    wandb.teardown()  # run.finish() returns before its service process has written the file
    (path,) = Path(save_dir).glob("**/run-*.wandb")
    run = WandbRun()
    for record in records(path.read_bytes()):
        if record.HasField("history"):
            run.history.append(_read_items({}, record.history.item))
        if record.HasField("config"):
            _read_items(run.config, record.config.update)
        run.media += [
            path.parent / "files" / file.path
            for file in record.files.files
            if file.path.startswith("media/")
        ]
    return run


def records(data):
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B", "not a W&B run file"
    at, parts = HEADER_BYTES, b""
    while at + CHUNK_HEADER_BYTES <= len(data):
        left_in_block = BLOCK_BYTES - at % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER_BYTES:  # too small for a chunk: padding
            at += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += CHUNK_HEADER_BYTES
        parts = (b"" if kind in (WHOLE, FIRST) else parts) + data[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)


def _read_items(into, items):
    for item in items:
        *parents, name = item.nested_key or [item.key]
        inner = into
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = json.loads(item.value_json)
    return into
