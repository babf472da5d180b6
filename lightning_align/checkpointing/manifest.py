"""What makes files a checkpoint: a manifest, written after them, with their sizes and digests.

``<name>.ckpt`` holds the state, as torch.save writes it. ``<name>.ckpt.json`` is the manifest; it
exists only once everything that it lists is durable, so writing it is the commit. No rename is
needed, which object stores do not have. ``<name>.ckpt.writing`` says that files of this name may be
incomplete: only what was announced that way is ever swept, never the file of another program.
"""

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import torch
import xxhash

from lightning_align._errors import argument_error
from lightning_align.checkpointing.files import CHUNK_BYTES, Bytes, Folder

FORMAT = 1
DATA, MANIFEST, WRITING = ".ckpt", ".ckpt.json", ".ckpt.writing"


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

    def to_json(self) -> bytes:
        """The manifest as a file, with a digest of itself in the last line."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps(body, indent=1)
        digest = xxhash.xxh3_128_hexdigest(text.encode())
        return f'{text[:-2]},\n "xxh3_128": "{digest}"\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read a manifest.

        Args:
            data: The file.

        Raises:
            ValueError: If it is damaged, or of a format that is not known here.
        """
        try:
            body = json.loads(data)
            digest = body.pop("xxh3_128")
            text = json.dumps(body, indent=1)
            if digest != xxhash.xxh3_128_hexdigest(text.encode()):
                raise ValueError("its digest differs")
            if body.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}: a newer version wrote it")
            files = tuple(StoredFile(**entry) for entry in body.pop("files"))
            manifest = cls(files=files, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest is damaged ({error})") from error
        return manifest


class Hashed:
    """Passes chunks through, no longer than CHUNK_BYTES, and keeps their size and digest.

    Args:
        chunks: The bytes of a file.
    """

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
        """The entry of the file in the manifest.

        Args:
            name: Name of the file.
        """
        return StoredFile(name, self.size, self._hash.hexdigest())


def commit(
    folder: Folder,
    name: str,
    step: int,
    files: dict[str, Iterable[Bytes]],
    metadata: dict[str, Any],
) -> Manifest:
    """Write a checkpoint's files, then its manifest.

    Args:
        folder: Where to.
        name: Name of the checkpoint.
        step: Its step.
        files: Name -> bytes of its files.
        metadata: Plain values to keep in the manifest.
    """
    folder.write(name + WRITING, [b""])
    stored = []
    for file_name, chunks in files.items():
        hashed = Hashed(chunks)
        folder.write(file_name, hashed)
        stored.append(hashed.stored(file_name))
    folder.sync()
    manifest = Manifest(name, step, tuple(stored), metadata, time.time())
    folder.write(name + MANIFEST, [manifest.to_json()])
    folder.sync()
    folder.delete(name + WRITING)
    return manifest


def remove(folder: Folder, name: str, files: Iterable[str], announce: bool = True) -> None:
    """Delete a checkpoint: first what makes it one, then its files.

    Args:
        folder: Where it is.
        name: Name of the checkpoint.
        files: Names of its files.
        announce: Whether to say first that they will be incomplete; a save that failed has done so.
    """
    if announce:
        folder.write(name + WRITING, [b""])
    folder.delete(name + MANIFEST)
    folder.sync()
    for file in files:
        folder.delete(file)
    folder.delete(name + WRITING)


def sweep(folder: Folder) -> list[str]:
    """Delete what saves that were interrupted have left; only one run may be writing here.

    Args:
        folder: Where.

    Returns:
        Names of the files that were deleted.
    """
    names = folder.names()
    swept = []
    for marker in [name for name in names if name.endswith(WRITING)]:
        name = marker.removesuffix(WRITING)
        if _readable(folder, name) is None:
            leftovers = (n for n in names if n == name + MANIFEST or _belongs(n, name))
            for leftover in leftovers:
                folder.delete(leftover)
                swept.append(leftover)
        folder.delete(marker)
    return swept


def _belongs(file: str, name: str) -> bool:
    return file == name + DATA or file.startswith(name + DATA + ".part")


def _readable(folder: Folder, name: str) -> Manifest | None:
    try:
        return read_manifest(folder, name)
    except (ValueError, FileNotFoundError):
        return None


def read_manifest(folder: Folder, name: str) -> Manifest:
    """The manifest of a committed checkpoint.

    Args:
        folder: Where it is.
        name: Name of the checkpoint.

    Raises:
        ValueError: If it is damaged, or of another checkpoint.
        FileNotFoundError: If there is none.
    """
    manifest = Manifest.from_json(folder.read(name + MANIFEST))
    if manifest.name != name:
        raise ValueError(f"the manifest is that of {manifest.name!r}")
    if any("/" in file.name or os.sep in file.name for file in manifest.files):
        raise ValueError("the manifest names a file in another folder")
    return manifest


def verify(folder: Folder, manifest: Manifest) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        folder: Where it is.
        manifest: What its files must be.

    Raises:
        ValueError: If a file is missing or differs.
    """
    for file in manifest.files:
        _check_size(folder, file)
        hashed = Hashed(_chunks(folder, file.name))
        for _ in hashed:
            pass
        if hashed.stored(file.name) != file:
            raise ValueError(f"{file.name} is damaged: its xxh3 digest differs")


def _check_size(folder: Folder, file: StoredFile) -> None:
    size = folder.size(file.name)
    if size is None:
        raise ValueError(f"{file.name} is missing")
    if size != file.size:
        raise ValueError(f"{file.name} has {size} bytes instead of {file.size}")


def _chunks(folder: Folder, name: str) -> Iterator[bytes]:
    with folder.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def committed_checkpoints(
    dirpath: str | os.PathLike[str] | Folder, storage_options: dict[str, Any] | None = None
) -> list[Manifest]:
    """Committed checkpoints of a folder, the newest first; those that cannot be read are left out.

    Args:
        dirpath: Local path or URL.
        storage_options: Passed to the filesystem of the URL.
    """
    folder = dirpath if isinstance(dirpath, Folder) else Folder(dirpath, storage_options)
    manifests = []
    for file in folder.names():
        if not file.endswith(MANIFEST):
            continue
        try:
            manifests.append(read_manifest(folder, file.removesuffix(MANIFEST)))
        except FileNotFoundError:  # deleted since we listed
            continue
        except (ValueError, OSError) as error:
            warnings.warn(f"{folder.path(file)} is passed over: {error}.", stacklevel=2)
    return sorted(manifests, key=lambda manifest: (manifest.step, manifest.saved_at), reverse=True)


def latest_valid_checkpoint(
    dirpath: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
) -> str | None:
    """Path of the newest checkpoint that is whole, or ``None``.

    Every byte is read and compared. A damaged checkpoint is passed over with a warning.

    Args:
        dirpath: Local path or URL of the folder.
        storage_options: Passed to the filesystem of the URL.
    """
    folder = Folder(dirpath, storage_options)
    for manifest in committed_checkpoints(folder):
        path = folder.path(manifest.name + DATA)
        try:
            verify(folder, manifest)
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(
                f"{path} (step {manifest.step}) is passed over: {error}. Falling back to the"
                " checkpoint before it.",
                stacklevel=2,
            )
        else:
            return path
    return None


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    weights_only: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Any:
    """Load a committed checkpoint, after comparing its bytes with the manifest.

    Args:
        path: Path or URL of the ``.ckpt`` file.
        map_location: Where the tensors go, as in ``torch.load``.
        weights_only: Whether to refuse anything but tensors and plain values.
        storage_options: Passed to the filesystem of the URL.

    Raises:
        ValueError: If the checkpoint is not committed, or a file of it is missing or damaged.
        FileNotFoundError: If there is no such file.
    """
    dirpath, _, file = os.fspath(path).replace(os.sep, "/").rpartition("/")
    folder = Folder(dirpath or ".", storage_options)
    name = file.removesuffix(DATA)

    def error(rule: str, way_out: str) -> ValueError:
        return argument_error("load_checkpoint", "path", os.fspath(path), rule, way_out)

    fall_back = "latest_valid_checkpoint(dirpath) finds the newest one that is whole"
    if folder.size(name + MANIFEST) is None:
        if folder.size(file) is None:
            raise FileNotFoundError(f"load_checkpoint(path={os.fspath(path)!r}): no such file.")
        raise error(
            f"it has no manifest ({name + MANIFEST}), so it was never completed, or something else"
            " wrote it",
            f"In the first case {fall_back}; in the second use torch.load",
        )
    try:
        manifest = read_manifest(folder, name)
        data = _verified_data(folder, manifest)
    except ValueError as damage:
        raise error(str(damage), fall_back) from damage
    with data:
        return torch.load(data, map_location=map_location, weights_only=weights_only)


def _verified_data(folder: Folder, manifest: Manifest) -> Any:
    """The data file, open for reading, after every byte of it was compared."""
    if folder.is_local:
        verify(folder, manifest)
        return folder.open(manifest.name + DATA)
    for file in manifest.files:  # fetched once
        _check_size(folder, file)
        content = folder.read(file.name)
        hashed = Hashed([content])
        for _ in hashed:
            pass
        if hashed.stored(file.name) != file:
            raise ValueError(f"{file.name} is damaged: its xxh3 digest differs")
        if file.name == manifest.name + DATA:
            data = BytesIO(content)
    return data
