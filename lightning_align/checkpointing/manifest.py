"""What makes files a checkpoint: a manifest, written after them, with their sizes and digests.

``<name>.ckpt`` holds the state, as torch.save writes it. ``<name>.ckpt.json`` is the manifest; it
exists only once everything that it lists is durable, so writing it is the commit. No rename is
needed, which object stores do not have. ``<name>.ckpt.writing`` says that files of this name may be
incomplete: only what was announced that way is ever swept, never the file of another program.
``<name>.ckpt.withdrawn`` says that its run has gone back behind it: it is the last one to be taken.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from lightning_align.checkpointing.files import CHUNK_BYTES, Bytes, Folder

FORMAT = 1
DATA, MANIFEST, WRITING = ".ckpt", ".ckpt.json", ".ckpt.writing"
WITHDRAWN = ".ckpt.withdrawn"
LINEAGE = "lineage"  # key of the metadata that SnapshotEngine writes itself

_LARGEST_BYTES = 1 << 26  # of a manifest: what is larger was not written here, and is not read
_LARGEST_INT = 1 << 63
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_DIGEST = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint."""

    name: str
    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    files: tuple[StoredFile, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0  # seconds since 1970

    @property
    def commit_number(self) -> int:
        """How many commits its folder had seen; 0 if it was written before they were counted."""
        number: int = self.metadata.get(LINEAGE, {}).get("commit", 0)
        return number

    @property
    def parent(self) -> str | None:
        """Name of the checkpoint that its run had committed before, or had gone on from."""
        parent: str | None = self.metadata.get(LINEAGE, {}).get("parent")
        return parent

    @property
    def abandoned(self) -> tuple[str, ...]:
        """Names of those in the folder that its run had left behind by going back."""
        return tuple(self.metadata.get(LINEAGE, {}).get("abandoned", ()))

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts by commit; those that have no number come before, by step."""
        return self.commit_number, self.step, self.saved_at

    def to_json(self) -> bytes:
        """The manifest as a file, with a digest of itself in the last line."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps(body, indent=1)
        digest = xxhash.xxh3_128_hexdigest(text.encode())
        return f'{text[:-2]},\n "xxh3_128": "{digest}"\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read a manifest.

        Raises:
            ValueError: If it is damaged, or of a format that is not known here.
        """
        try:
            body = json.loads(data.decode())
            digest = body.pop("xxh3_128")
            text = json.dumps(body, indent=1)
            if digest != xxhash.xxh3_128_hexdigest(text.encode()):
                raise ValueError("its digest differs")
            if body.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}: a newer version wrote it")
            files = tuple(StoredFile(**entry) for entry in body.pop("files"))
            manifest = cls(files=files, **body)
            if fault := _fault(manifest):
                raise ValueError(fault)
            if manifest.to_json() != data:  # keys that occur twice, another encoding
                raise ValueError("it is not as it was written")
        except _DAMAGE as error:
            raise ValueError(f"the manifest is damaged ({error})") from error
        return manifest


def _fault(manifest: Any) -> str:
    """What no checkpoint of ours would say of itself, or an empty string."""
    name, files, saved_at = manifest.name, manifest.files, manifest.saved_at
    if not isinstance(name, str) or not name:
        return "its name is none"
    if not _is_count(abs(manifest.step) if type(manifest.step) is int else None):
        return "its step is no number of steps"
    if not isinstance(saved_at, (int, float)) or not math.isfinite(saved_at):
        return "its time is none"
    if not all(isinstance(file.name, str) and belongs(file.name, name) for file in files):
        return "it names a file that is not its own"
    names = [file.name for file in files]
    if name + DATA not in names or len(set(names)) < len(names):
        return f"it must list {name + DATA!r}, and each file once"
    for file in files:
        if not (_is_count(file.size) and _is_digest(file.xxh3_128)):
            return f"the size or the digest of {file.name} is none"
    if not isinstance(manifest.metadata, dict):
        return "its metadata are none"
    return _fault_of_lineage(manifest.metadata.get(LINEAGE, {"commit": 0}))


def _fault_of_lineage(lineage: Any) -> str:
    whole = (
        isinstance(lineage, dict)
        and _is_count(lineage.get("commit"))
        and isinstance(lineage.get("parent", ""), (str, type(None)))
        and isinstance(lineage.get("abandoned", []), list)
        and all(isinstance(name, str) for name in lineage.get("abandoned", []))
    )
    return "" if whole else "its lineage is none"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_INT


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def belongs(file: str, name: str) -> bool:
    """Whether a file of that name may be one of the checkpoint ``name``."""
    own = file == name + DATA or file.startswith(name + DATA + ".part")
    return own and not re.search(r"[/\\\0]", file)


def newest_first(manifests: Iterable[Manifest], withdrawn: Collection[str] = ()) -> list[Manifest]:
    """Checkpoints of one folder in the order in which a run would take them.

    The newest is the one that was committed last, whatever its step and the clock; what its run
    had left behind comes last, so that a fall back keeps to the branch.

    Args:
        manifests: Of the checkpoints.
        withdrawn: Names of those that the run had gone back behind before it committed another.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.order, reverse=True)
    newest = next((found for found in ordered if found.name not in withdrawn), None)
    left = {*withdrawn, *(newest.abandoned if newest is not None else ())}
    return sorted(ordered, key=lambda manifest: manifest.name in left)


class Hashed:
    """Passes chunks through, no longer than CHUNK_BYTES, and keeps their size and digest."""

    def __init__(self, chunks: Iterable[Bytes]) -> None:
        self._chunks = chunks
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def __iter__(self) -> Iterator[Bytes]:
        for chunk in self._chunks:
            whole = memoryview(chunk)
            for start in range(0, len(whole), CHUNK_BYTES):
                part = whole[start : start + CHUNK_BYTES]
                self._hash.update(part)
                self.size += len(part)
                yield part

    def stored(self, name: str) -> StoredFile:
        """The entry of the file in the manifest."""
        return StoredFile(name, self.size, self._hash.hexdigest())


def read_manifest(folder: Folder, name: str) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises:
        ValueError: If it is damaged, or of another checkpoint.
        FileNotFoundError: If there is none.
    """
    manifest = Manifest.from_json(folder.read(name + MANIFEST, _LARGEST_BYTES))
    if manifest.name != name:
        raise ValueError(f"the manifest is that of {manifest.name!r}")
    return manifest


def check_size(folder: Folder, file: StoredFile) -> None:
    """Compare the size of a file with its entry.

    Raises:
        ValueError: If it is missing or has another size.
    """
    size = folder.size(file.name)
    if size is None:
        raise ValueError(f"{file.name} is missing")
    if size != file.size:
        raise ValueError(f"{file.name} has {size} bytes instead of {file.size}")
