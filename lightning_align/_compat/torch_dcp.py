"""torch.distributed.checkpoint read as plain data, and the private APIs of it that this takes.

torch unpickles a folder's index and every value that is no tensor without a limit, so whoever wrote
the folder could run code. Here both take what torch itself writes, and nothing else.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import _get_fqns, _init_optim_state
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer
from typing_extensions import override

INDEX_FILE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_TYPES = {
    _METADATA: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}


class UnreadableError(ValueError):
    """Files of a folder cannot be read as plain data."""


class _IndexUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_TYPES.get(module, ()):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return getattr(pathlib, f"Pure{name}")  # a path of another system cannot be made here
        value = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's index")


class _PlainReader(FileSystemReader):
    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        assert index.storage_meta is not None
        index.storage_meta.load_id = self.load_id
        return index


class _PlainPlanner(DefaultLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_index(folder: Path) -> Metadata:
    """What is where in a folder.

    Raises:
        UnreadableError: If it is damaged, or names what torch does not write into an index.
    """
    with (folder / INDEX_FILE).open("rb") as file:
        try:
            index: Metadata = _IndexUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises whatever its bytes lead to
            raise UnreadableError(f"{INDEX_FILE}: {error}") from error
    return index


def names(index: Metadata) -> dict[str, tuple[Any, ...]]:
    """Key -> the names, level by level, that led to the value when it was saved."""
    found: dict[str, tuple[Any, ...]] = index.planner_data
    return found


def files(index: Metadata) -> dict[str, int]:
    """File -> bytes that it must have."""
    least: dict[str, int] = {}
    for entry in index.storage_data.values():
        end = entry.offset + entry.length
        least[entry.relative_path] = max(end, least.get(entry.relative_path, 0))
    return least


def on_meta(index: Metadata, key: str) -> Any:
    """A tensor of that shape without memory; None for what is no tensor."""
    about: Any = index.state_dict_metadata[key]
    if not hasattr(about, "size"):
        return None
    return torch.empty(about.size, dtype=about.properties.dtype, device="meta")


def read(folder: Path, index: Metadata, keys: Iterable[str]) -> dict[str, Any]:
    """Values of some keys, nested as they were when they were saved; reads them only.

    Raises:
        UnreadableError: If files are damaged, or hold more than plain data.
    """
    flat: dict[str, Any] = {}
    for key in keys:
        like = on_meta(index, key)
        flat[key] = None if like is None else torch.empty_like(like, device="cpu")
    planner = _PlainPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(flat, storage_reader=_PlainReader(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # a BaseException, of this rank alone
            causes = (cause for cause, _ in error.failures.values())
            raise UnreadableError("; ".join(str(c).splitlines()[0] for c in causes)) from error
    return unflatten_state_dict(flat, names(index))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have in a folder, without those of wrappers."""
    for name, parameter in model.named_parameters():
        (plain,) = _get_fqns(model, name)
        yield plain, parameter


def by_name(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one file, with the names of parameters for its numbers.

    Numbers that go through the groups one after another are places in them, as any optimizer
    numbers what it has; others are places in the model, as torch puts a sharded one together.

    Args:
        model: Whose parameters they are.
        optimizer: As it was built for the run that goes on.
        saved: ``state`` and ``param_groups``.
    """
    groups = saved["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if any(isinstance(number, str) for number in numbers):
        return dict(saved)
    named: dict[Any, str] = {parameter: name for name, parameter in named_parameters(model)}
    own = [named[p] for group in optimizer.param_groups for p in group["params"] if p in named]
    in_groups = numbers == list(range(len(own)))
    names = own if in_groups else list(named.values())
    return {
        "state": {names[number]: state for number, state in saved["state"].items()},
        "param_groups": [
            {**g, "params": [names[number] for number in g["params"]]} for g in groups
        ],
    }


def make_state(optimizer: Optimizer) -> None:
    """Take torch's step of zeros, for the parameters that require a gradient."""
    _init_optim_state(optimizer)
