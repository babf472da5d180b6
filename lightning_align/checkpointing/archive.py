"""The file of torch.save, laid out before there is anything to save.

torch.save writes a zip archive of uncompressed records: one per storage, one pickle that refers to
them. Where each record lies depends on the sizes of the storages alone. So the host buffer *is* the
file: the zip headers are written between the tensors once, when the buffer is laid out, and a save
is one large sequential write and a tail (pickle, central directory). Small tensors cost no more
than large ones, and the writing thread hardly ever holds the interpreter lock.

Records of storages carry no CRC32, like those of torch.serialization.set_crc32_options(False): it
takes ten times as long as xxh3, and torch.load does not look at it. The manifest has the digest.

Zip format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

import io
import pickle
import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_align._compat import torch_storage

ALIGNMENT = 64  # bytes, as torch.save: any dtype can be read from a memory map
_ROOT = "archive"  # any word will do: torch.load takes the folder of the first record
_LIMIT_32 = 0xFFFFFFFF  # sizes and offsets from here on live in zip64 fields
_VERSION_NEEDED = 45  # zip64
_DATE_1980 = 0x21
PROTOCOL = 2  # what torch.save uses, and what weights_only=True reads


@dataclass(frozen=True)
class Record:
    """One record of the archive: a name and where its bytes are."""

    name: str
    header_offset: int
    size: int
    crc: int = 0

    def header(self) -> bytes:
        """Local file header, padded so that the bytes behind it are aligned."""
        name = f"{_ROOT}/{self.name}".encode()
        sizes, extra = _sizes_32(self.size, None)
        length = 30 + len(name) + len(extra) + 4  # 4: head of the padding field
        padding = -(self.header_offset + length) % ALIGNMENT
        extra += struct.pack("<HH", 0x4246, padding) + bytes(padding)  # "FB", as torch.save
        fields = (_VERSION_NEEDED, 0, 0, 0, _DATE_1980, self.crc, *sizes, len(name), len(extra))
        return b"PK\x03\x04" + struct.pack("<5H3I2H", *fields) + name + extra

    def entry(self) -> bytes:
        """The record's line in the central directory."""
        name = f"{_ROOT}/{self.name}".encode()
        sizes, extra = _sizes_32(self.size, self.header_offset)
        offset = min(self.header_offset, _LIMIT_32)
        head = (_VERSION_NEEDED, _VERSION_NEEDED, 0, 0, 0, _DATE_1980, self.crc, *sizes)
        rest = (len(name), len(extra), 0, 0, 0, 0, offset)
        return (
            b"PK\x01\x02" + struct.pack("<6H3I", *head) + struct.pack("<5H2I", *rest) + name + extra
        )


def _sizes_32(size: int, offset: int | None) -> tuple[tuple[int, int], bytes]:
    """Compressed and full size as 32-bit fields, and the zip64 field for what does not fit."""
    wide = b""
    if size >= _LIMIT_32:
        wide += struct.pack("<2Q", size, size)
    if offset is not None and offset >= _LIMIT_32:
        wide += struct.pack("<Q", offset)
    extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    shown = min(size, _LIMIT_32)
    return (shown, shown), extra


@dataclass
class Archive:
    """Records one behind the other, and how far they reach."""

    entries: list[bytes] = field(default_factory=list)
    end: int = 0

    def add(self, name: str, size: int, crc: int = 0) -> bytes:
        """Append a record and return its header; ``size`` bytes of data must follow it."""
        record = Record(name, self.end, size, crc)
        header = record.header()
        self.end += len(header) + size
        self.entries.append(record.entry())
        return header

    def directory(self) -> bytes:
        """Central directory and end record: the last bytes of the file."""
        entries = b"".join(self.entries)
        count, size, offset = len(self.entries), len(entries), self.end
        wide = b""
        if count >= 0xFFFF or size >= _LIMIT_32 or offset >= _LIMIT_32:
            end_64 = (44, _VERSION_NEEDED, _VERSION_NEEDED, 0, 0, count, count, size, offset)
            wide = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", *end_64)
            wide += b"PK\x06\x07" + struct.pack("<IQI", 0, offset + size, 1)
        count, size, offset = min(count, 0xFFFF), min(size, _LIMIT_32), min(offset, _LIMIT_32)
        end = struct.pack("<4H2IH", 0, 0, count, count, size, offset, 0)
        return entries + wide + b"PK\x05\x06" + end


@dataclass(frozen=True)
class StorageKey:
    """Stands for a storage in the pickle: what torch.load is given to find its record."""

    persistent_id: tuple[str, type, str, str, int]


@dataclass(frozen=True, eq=False)
class Reduced:
    """An object whose pickling was worked out in advance, as ``__reduce_ex__`` returns it."""

    value: tuple[Any, ...]


@dataclass(frozen=True)
class Leaf:
    """Takes the place of tensor number ``index`` in a frozen state."""

    index: int


@dataclass(frozen=True, eq=False)
class TypedLeaf:
    """Takes the place of a tensor of a subclass, or with attributes, over tensor ``index``."""

    index: int
    kind: type
    attributes: Any


class _Pickler(pickle.Pickler):
    """Pickles a frozen state; storages that are in no record yet are collected in ``strays``."""

    def __init__(self, file: io.BytesIO, leaves: list[Reduced], num_records: int) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self._leaves = leaves
        self._num_records = num_records
        self._keys: dict[int, StorageKey] = {}
        self.strays: list[torch.UntypedStorage] = []

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if type(obj) is StorageKey:
            return obj.persistent_id
        if torch_storage.is_storage(obj):
            return self._stray(obj).persistent_id
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Leaf:
            return self._leaves[obj.index].value
        if type(obj) is Reduced:
            return obj.value
        if type(obj) is TypedLeaf:
            function, arguments = self._leaves[obj.index].value
            return torch_storage.rebuild_typed, (function, obj.kind, arguments, obj.attributes)
        return NotImplemented

    def _stray(self, storage: Any) -> StorageKey:
        """A storage of a tensor inside an object that was copied as a whole."""
        plain = torch_storage.untyped(storage)
        if torch_storage.identity(plain) not in self._keys:
            number = self._num_records + len(self.strays)
            self._keys[torch_storage.identity(plain)] = storage_key(storage, number, plain.nbytes())
            self.strays.append(plain)
        return self._keys[torch_storage.identity(plain)]


def reduce_ex(value: Any) -> tuple[Any, ...]:
    """How torch.save pickles a tensor or parameter: a function and its arguments."""
    function, arguments = value.__reduce_ex__(PROTOCOL)
    return function, arguments


def storage_key(storage: Any, number: int, nbytes: int) -> StorageKey:
    """Name record ``number`` as torch.load wants it: with the type and length of the storage.

    Args:
        storage: What the record stands for, typed or not.
        number: Place of the record in the order of pickling.
        nbytes: Bytes of the record, of which the key tells how many values they are.
    """
    kind, length = torch_storage.pickled_type(storage, nbytes)
    return StorageKey(("storage", kind, str(number), "cpu", length))


def ending(structure: Any, leaves: list[Reduced], archive: Archive) -> Iterable[bytes | memoryview]:
    """Everything behind the storages of the host buffer: what torch.save writes besides them."""
    file = io.BytesIO()
    pickler = _Pickler(file, leaves, len(archive.entries))
    pickler.dump(structure)
    whole = Archive(list(archive.entries), archive.end)
    for storage in pickler.strays:
        number, size = len(whole.entries), storage.nbytes()
        yield whole.add(f"data/{number}", size)
        if size:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            yield memoryview(flat.cpu().numpy())  # type: ignore[arg-type]
    records = {"data.pkl": file.getvalue(), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
    for name, value in records.items():
        yield whole.add(name, len(value), zlib.crc32(value)) + value
    yield whole.directory()
