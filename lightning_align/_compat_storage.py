"""Private APIs of torch's storages and of how they are pickled, with a test each."""

from typing import Any

import torch
from torch import Tensor

# Like _rebuild_tensor_v2, which torch.save writes for most dtypes, but it is told the dtype.
rebuild_with_dtype: Any = torch._utils._rebuild_tensor_v3


def is_storage(value: Any) -> bool:
    """Whether a pickler of tensors meets a value as a storage.

    Args:
        value: Anything.
    """
    return isinstance(value, (torch.TypedStorage, torch.UntypedStorage))


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
    """The same for two Python objects of one storage.

    Args:
        storage: Which storage.
    """
    return int(storage._cdata)


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
    """A view that shows the negative of what is in memory, like ``x.conj().imag``.

    Args:
        tensor: A tensor.
    """
    return torch._neg_view(tensor)
