"""What a frozen reference says about completions: each token's log-probability, kept for ever.

A completion is found by its tokens and those of its prompt, so added data lacks only itself, and
order, batches and paths do not matter. The folder is named after the reference; loss, beta, cuts by
length and learning rates come after these values and are no part of the name. Files are written
whole or not at all, each with a checksum; what cannot be used is named, and its values are lacking.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.data.samples import Ids
from lightning_align.data.whole_folder import write_whole_file

SCHEMA = 1
ENTRY = "reference_cache"  # of a file's metadata
KEY_BYTES = 16
PIECE = 256  # completions that are computed, and written, at a time
MOST_PIECES = 1024

UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)

Values = NDArray[np.float32]


def completion_key(prompt: Ids, completion: Ids) -> bytes:
    """What a completion is found by: a hash of its tokens and those of its prompt."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    for ids in (prompt, completion):
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
    return digest.digest()


def num_predicted(prompt: Ids, completion: Ids) -> int:
    """Completion tokens that something stands before, and so have a log-probability."""
    return len(completion) - (len(prompt) == 0)


def pieces(num_completions: int) -> Iterator[range]:
    """The completions in pieces, which depend on their number alone.

    A piece is computed and written as one. Whoever goes on after a kill finds each there or not,
    and so computes the others in the same batches, to the same bits, as if there had been no kill.
    """
    size = max(PIECE, -(-num_completions // MOST_PIECES))
    for start in range(0, num_completions, size):
        yield range(start, min(start + size, num_completions))


@declared
class ReferenceCache:
    """The values of one reference, in a folder of its own.

    Args:
        url: Folder of the caches of all references, local or at any fsspec URL.
        reference: All that decides the values, beside the tokens: the reference's fingerprint and
            the precision that it runs in.

    Attributes:
        folder: Path of this reference's folder on its file system.

    Raises:
        ValueError: If fsspec cannot open the URL.
    """

    def __init__(self, url: str, reference: Mapping[str, str]) -> None:
        text = json.dumps({**reference, "schema": SCHEMA}, sort_keys=True)
        self.name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        try:
            self._files, root = url_to_fs(os.path.expanduser(url))
        except (ImportError, ValueError) as error:
            rule = f"fsspec cannot open such a URL ({error})"
            raise argument_error("ReferenceCache", "url", url, rule) from None
        self.folder = f"{root.rstrip('/')}/{self.name}"

    def read(self, lengths: Mapping[bytes, int]) -> dict[bytes, Values]:
        """Values of those among the completions that are there.

        A file that cannot be used is named in a warning, and its values count as not there.

        Args:
            lengths: Predicted tokens of each completion that is wanted, by ``completion_key``.
        """
        found: dict[bytes, Values] = {}
        for path in self._paths():
            try:
                keys, parts = self._open(self._files.cat_file(path))
            except UNUSABLE as error:
                warn_unusable(path, error)
                continue
            for key, values in zip(keys, parts, strict=True):
                if lengths.get(key) == len(values):
                    found.setdefault(key, values.copy())  # a view would hold the whole file
        return found

    def _paths(self) -> list[str]:
        try:
            self._files.invalidate_cache(self.folder)
            names = self._files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            warn_unusable(self.folder, error)
            return []
        return sorted(str(name) for name in names if str(name).endswith(".safetensors"))

    def _open(self, data: bytes) -> tuple[list[bytes], list[Values]]:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        if ENTRY not in metadata:
            raise ValueError("it is no file of a reference cache")
        about = json.loads(metadata[ENTRY])
        if about["reference"] != self.name:
            raise ValueError("its values are of another reference")
        if about["checksum"] != _checksum(tensors):
            raise ValueError("its content has changed")
        values, ends = tensors["values"], tensors["ends"]
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        return [key.tobytes() for key in tensors["keys"]], np.split(values, ends[:-1])

    def write(self, values: Mapping[bytes, Values]) -> None:
        """Keep values: a file that is there whole, or not at all.

        Args:
            values: Log-probabilities of the predicted tokens of each completion, at least one, by
                ``completion_key``.

        Raises:
            OSError: If it cannot be written.
        """
        keys = sorted(values)
        tensors: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "ends": np.cumsum([len(values[key]) for key in keys], dtype=np.int64),
            "values": np.concatenate([values[key] for key in keys]).astype(np.float32),
        }
        about = {"reference": self.name, "checksum": _checksum(tensors), "schema": SCHEMA}
        data = save(tensors, {ENTRY: json.dumps(about)})
        # Of the same completions the same name: what is damaged makes way to what replaces it.
        name = hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()
        self._write(f"{self.folder}/{name}.safetensors", data)

    def _write(self, path: str, data: bytes) -> None:
        writer = f"{socket.gethostname()}-{os.getpid()}"
        if isinstance(self._files, LocalFileSystem):
            self._files.makedirs(self.folder, exist_ok=True)
            write_whole_file(Path(path), data, writer)
            return
        temporary = f"{path}.{writer}.tmp"
        try:
            self._files.makedirs(self.folder, exist_ok=True)
            self._files.pipe_file(temporary, data)
            self._files.mv(temporary, path)
        except OSError:
            raise
        except Exception as error:  # clouds have errors of their own, and some only read
            raise OSError(str(error) or type(error).__name__) from error


def warn_unusable(path: str, error: Exception) -> None:
    """Name what cannot be used; its values are lacking, and nothing else is lost."""
    problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
    warnings.warn(
        f"reference cache {path}: {problem}; what it may hold is computed anew", stacklevel=3
    )


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
