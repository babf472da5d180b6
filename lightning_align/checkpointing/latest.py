"""The checkpoints of a folder: which are whole, which is the newest, and what is in one."""

import os
import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

import torch

from lightning_align._errors import argument_error
from lightning_align.checkpointing.files import CHUNK_BYTES, Folder
from lightning_align.checkpointing.last_link import shown_by
from lightning_align.checkpointing.manifest import (
    DATA,
    MANIFEST,
    WITHDRAWN,
    Hashed,
    Manifest,
    StoredFile,
    check_size,
    newest_first,
    read_manifest,
)
from lightning_align.checkpointing.versions import versions


def verify(folder: Folder, manifest: Manifest) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        ValueError: If a file is missing or differs.
    """
    for file in manifest.files:
        check_size(folder, file)
        _compare(file, _chunks(folder, file.name))


def _compare(file: StoredFile, chunks: Iterable[bytes]) -> None:
    hashed = Hashed(chunks)
    for _ in hashed:
        pass
    if hashed.stored(file.name) != file:
        raise ValueError(f"{file.name} is damaged: its xxh3 digest differs")


def _chunks(folder: Folder, name: str) -> Iterator[bytes]:
    with folder.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def committed_checkpoints(
    dirpath: str | os.PathLike[str] | Folder, storage_options: dict[str, Any] | None = None
) -> list[Manifest]:
    """Committed checkpoints of a folder, the newest first; those that cannot be read are left out.

    The newest was committed last. What its run had left behind by going back, or has withdrawn,
    comes at the end.

    Args:
        dirpath: Local path or URL.
        storage_options: Passed to the filesystem of the URL.
    """
    folder = dirpath if isinstance(dirpath, Folder) else Folder(dirpath, storage_options)
    manifests, names = [], folder.names()
    for file in names:
        if not file.endswith(MANIFEST):
            continue
        try:
            manifests.append(read_manifest(folder, file.removesuffix(MANIFEST)))
        except FileNotFoundError:  # deleted since we listed
            continue
        except (ValueError, OSError) as error:
            warnings.warn(f"{folder.path(file)} is passed over: {error}.", stacklevel=2)
    return newest_first(manifests, withdrawn_names(names))


def withdrawn_names(files: Iterable[str]) -> set[str]:
    """Names of the checkpoints that were withdrawn.

    Args:
        files: Names of the files in the folder.
    """
    return {file.removesuffix(WITHDRAWN) for file in files if file.endswith(WITHDRAWN)}


def latest_valid_checkpoint(
    dirpath: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
) -> str | None:
    """Path of the newest checkpoint that is whole, or ``None``.

    Every byte is read and compared. A damaged checkpoint is passed over with a warning. It may be
    in a version of the folder (``version_1``), which a later run has written.

    Args:
        dirpath: Local path or URL of the folder.
        storage_options: Passed to the filesystem of the URL.
    """
    newest = newest_of_versions(Folder(dirpath, storage_options))
    return newest[1].path(newest[0].name + DATA) if newest is not None else None


def newest_of_versions(folder: Folder) -> tuple[Manifest, Folder] | None:
    """The newest checkpoint that is whole in a folder and its versions, and where it lies."""
    each = list(versions(folder).values())
    if len(each) > 1:
        found = {here: committed_checkpoints(here) for here in each}
        each = sorted((here for here in each if found[here]), key=lambda here: found[here][0].order)
    whole = ((newest_whole(here), here) for here in reversed(each))
    return next(((newest, here) for newest, here in whole if newest is not None), None)


def newest_whole(folder: Folder) -> Manifest | None:
    """The newest checkpoint of a folder that is whole, or ``None``; damaged ones are warned of."""
    for manifest in committed_checkpoints(folder):
        path = folder.path(manifest.name + DATA)
        try:
            verify(folder, manifest)
        except (ValueError, OSError) as error:
            warnings.warn(
                f"{path} (step {manifest.step}) is passed over: {error}. Falling back to the"
                " checkpoint before it.",
                stacklevel=3,
            )
        else:
            if manifest.name + WITHDRAWN in folder.names():
                warnings.warn(
                    f"{path} (step {manifest.step}) is of a stretch that its run had gone back"
                    " behind, and nothing else is whole: what spoiled it may be in it.",
                    stacklevel=3,
                )
            return manifest
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
    name = shown_by(folder, file.removesuffix(DATA))

    def error(rule: str, way_out: str) -> ValueError:
        return argument_error("load_checkpoint", "path", os.fspath(path), rule, way_out)

    fall_back = "latest_valid_checkpoint(dirpath) finds the newest one that is whole"
    try:
        manifest = read_manifest(folder, name)
        data = _verified_data(folder, manifest)
    except FileNotFoundError:
        if file not in folder.names():
            message = f"load_checkpoint(path={os.fspath(path)!r}): no such file."
            raise FileNotFoundError(message) from None
        raise error(
            f"it has no manifest ({name + MANIFEST}), so it was never completed, or something else"
            " wrote it",
            f"In the first case {fall_back}; in the second use torch.load",
        ) from None
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
        check_size(folder, file)
        content = folder.read(file.name)
        _compare(file, [content])
        if file.name == manifest.name + DATA:
            data = BytesIO(content)
    return data
