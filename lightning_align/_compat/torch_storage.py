"""Private APIs of torch's storages and of how they are pickled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Like _rebuild_tensor_v2, which torch.save writes for most dtypes, but it is told the dtype.
rebuild_with_dtype: Any = torch._utils._rebuild_tensor_v3
# What torch.save writes for a tensor of a subclass, or one with attributes.
rebuild_typed: Any = torch._tensor._rebuild_from_type_v2
_REBUILD_DENSE: tuple[Any, ...] = (rebuild_with_dtype, torch._utils._rebuild_tensor_v2)


_STORAGES = torch.TypedStorage, torch.UntypedStorage  # here, as each value of a state is asked for


def is_storage(value: Any) -> bool:
    """Whether a pickler of tensors meets a value as a storage."""
    return isinstance(value, _STORAGES)


def untyped(storage: Any) -> torch.UntypedStorage:
    """The bytes behind a storage, without the warning that typed ones are deprecated.

    Args:
        storage: Typed or untyped.
    """
    if isinstance(storage, torch.TypedStorage):
        return storage._untyped_storage
    bytes_: torch.UntypedStorage = storage
    return bytes_


def identity(storage: torch.UntypedStorage) -> int:
    """The same for two Python objects of one storage."""
    return int(storage._cdata)


def expiry(storage: torch.UntypedStorage) -> Callable[[], bool]:
    """Whether a storage is gone; as long as this can be asked, no other has its identity."""
    weak: Any = StorageWeakRef
    expired: Callable[[], bool] = weak(storage).expired
    return expired


def pickled_type(storage: Any, nbytes: int) -> tuple[type, int]:
    """The class that torch.save names for a storage, and the length in its elements.

    Args:
        storage: Typed or untyped.
        nbytes: Its length in bytes.
    """
    if not isinstance(storage, torch.TypedStorage):
        return torch.UntypedStorage, nbytes
    typed: Any = storage
    return getattr(torch, typed._pickle_storage_type()), nbytes // typed._element_size()


def negative_view(tensor: Tensor) -> Tensor:
    """A view that shows the negative of what is in memory, like ``x.conj().imag``."""
    return torch._neg_view(tensor)


def rebuilds_dense(reduced: tuple[Any, ...]) -> bool:
    """Whether a pickled tensor is one with memory of its own, under a type or with attributes.

    Args:
        reduced: What its ``__reduce_ex__`` returned.
    """
    function, arguments = reduced[:2]
    return function is rebuild_typed and arguments[0] in _REBUILD_DENSE


def plain_alias(tensor: Tensor) -> Tensor | None:
    """The same memory as a plain tensor, without attributes; None if the type keeps it to itself.

    Args:
        tensor: One of a subclass, or with attributes.
    """
    with torch._C.DisableTorchFunctionSubclass():
        alias = tensor.as_subclass(Tensor)
        if type(tensor) is Tensor:
            alias = tensor.view_as(tensor)
    plain = type(alias) is Tensor and not alias.__dict__
    return alias if plain and alias.data_ptr() == tensor.data_ptr() else None


def retyped(storage: torch.UntypedStorage, like: Any) -> Any:
    """A storage of the type of another one, without the warning that typed ones are deprecated.

    Args:
        storage: Its bytes.
        like: Typed or untyped.
    """
    typed: Any = torch.TypedStorage
    if not isinstance(like, typed):
        return storage
    return typed(wrap_storage=storage, dtype=like.dtype, _internal=True)


def is_shared_with_others(tensor: Tensor) -> bool:
    """Whether another tensor looks at its memory, or somebody holds its storage."""
    own = 2  # the tensor itself, and the object that is asked here
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) > own
